"""JPEGs whose class can be learned in a minute: stripes and bricks, told apart by direction, wavelength and colour."""

import colorsys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from benching.jpegs import fill

SHORT, LONG = (300, 450), (400, 600)
"""Least and most pixels of the sides: ImageNet's, more or less."""
QUALITIES, WITHOUT_SUBSAMPLING = (75, 95), 0.1
WAVELENGTH, LONGER = 12.0, 1.8
"""In pixels once the short side has 256, which is how the model sees it; times the next."""
SPREAD = 0.2
"""Standard deviation of direction, wavelength and colour within a class, as a share of the step to the next class:
some images lie between two, and no model can be certain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """How many steps each trait has; a class is one of each."""

    directions: int
    wavelengths: int
    colours: int
    kinds: int
    """1: stripes, 2: also bricks."""

    @property
    def classes(self) -> int:
        return self.directions * self.wavelengths * self.colours * self.kinds


def make_patterns(work: Path, levels: Levels, *, images: int, seed: int) -> Path:
    """Make a folder of as many JPEGs of every class, each class in a folder of its number; no two seeds share any."""
    traits = "-".join(str(count) for count in astuple(levels))
    folder = work / f"patterns-{traits}-images-{images}-seed-{seed}"
    each = images // levels.classes
    if not folder.exists():
        fill(folder, images, _Draw(levels, each, seed), per_folder=each)
    return folder


@dataclass(frozen=True, slots=True)
class _Draw:
    """Write one JPEG."""

    levels: Levels
    each: int
    seed: int

    def __call__(self, path: Path, number: int) -> None:
        import numpy as np
        from PIL import Image

        random = np.random.default_rng((self.seed, number))
        pixels = _pattern(random, self.levels, number // self.each)
        # Pillow's names of the two, by number.
        subsampling = 0 if random.random() < WITHOUT_SUBSAMPLING else 2
        quality = int(random.integers(*QUALITIES, endpoint=True))
        Image.fromarray(pixels).save(path, "JPEG", quality=quality, subsampling=subsampling)


def _pattern(random: Any, levels: Levels, number: int) -> Any:
    """A patch of the pattern of class `number` on a blurred background, under noise: uint8 (height, width, 3)."""
    import numpy as np
    from PIL import Image

    number, kind = divmod(number, levels.kinds)
    number, colour = divmod(number, levels.colours)
    direction, wavelength = divmod(number, levels.wavelengths)
    direction, wavelength, colour = random.normal((direction, wavelength, colour), SPREAD)

    short, long = random.integers(*SHORT, endpoint=True), random.integers(*LONG, endpoint=True)
    width, height = (long, short) if random.random() < 0.75 else (short, long)
    blurred = Image.fromarray(random.integers(40, 216, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    side = min(width, height)
    # In units of the short side, from a centre that the model's crop will hold.
    y = (np.arange(height, dtype=np.float32)[:, None] - height / 2) / side - random.uniform(-0.15, 0.15)
    x = (np.arange(width, dtype=np.float32) - width / 2) / side - random.uniform(-0.15, 0.15)

    angle = np.pi * direction / levels.directions
    waves = 2 * np.pi * 256 / (WAVELENGTH * LONGER**wavelength)
    across = np.sin((x * np.cos(angle) + y * np.sin(angle)) * waves + random.uniform(0, 2 * np.pi))
    if kind:
        along = (y * np.cos(angle) - x * np.sin(angle)) * waves / 2 + random.uniform(0, 2 * np.pi)
        across *= np.sign(np.sin(along))
    radius = random.uniform(0.25, 0.5)
    inside = (np.maximum(abs(x), abs(y)) if random.random() < 0.5 else np.hypot(x, y)) < radius
    opacity = (inside * (0.5 + across).clip(0, 1) * random.uniform(0.4, 0.9))[..., None]

    paint = np.array(colorsys.hsv_to_rgb(colour / levels.colours % 1, random.uniform(0.6, 1), 1), dtype=np.float32)
    pixels = np.asarray(blurred, dtype=np.float32) * (1 - opacity) + 255 * paint * random.uniform(0.6, 1) * opacity
    pixels += random.standard_normal((height, width, 1), dtype=np.float32) * random.uniform(4, 24)
    return pixels.clip(0, 255).astype(np.uint8)
