"""Hybrid decoding: while the GPU's JPEG decoder is what all wait for, loader workers decode some of the images."""

from collections.abc import Callable


class Share:
    """Which part of the images workers decode: more while the loop waits for the GPU's decoder, less while for them.

    Small steps up and large ones down keep it near the point where the loop waits for both alike.
    """

    UP, DOWN, MOST = 0.02, 0.7, 0.5

    def __init__(self, waits: Callable[[], tuple[float, float]]) -> None:
        """`waits` says how many seconds the loop has waited so far, for the loader and for the GPU's decoder."""
        self._waits, self._before = waits, waits()
        self.now = 0.0

    def adjust(self) -> None:
        """Draw the conclusion from what was waited for since the last time: once all batches in flight are new."""
        before, self._before = self._before, self._waits()
        loader_s, decoder_s = (now - then for now, then in zip(self._before, before, strict=True))
        self.now = min(self.now + self.UP, self.MOST) if decoder_s > loader_s else self.now * self.DOWN
