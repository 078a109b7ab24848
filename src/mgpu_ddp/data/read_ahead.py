"""Images that are requested before they are needed, so that the network is waited for once and not per image."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future

Request = Callable[[int], Future[bytes]]
"""Start to fetch the image of an index."""


class ReadAhead:
    """Requests that were started for the images needed next."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._started: dict[int, Future[bytes]] = {}

    def expect(self, indices: Iterable[int]) -> None:
        """Start requests for these, in this order, and cancel those for any other."""
        wanted = dict.fromkeys(indices)
        for index in self._started.keys() - wanted.keys():
            self._started.pop(index).cancel()
        for index in wanted:
            if index not in self._started:
                self._started[index] = self._request(index)

    def take(self, index: int) -> bytes:
        """Wait for an image, requested before or only now."""
        started = self._started.pop(index, None)
        return (started or self._request(index)).result()
