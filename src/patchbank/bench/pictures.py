"""Generated JPEGs to decode: with edges and noise, in the sizes of HICO-DET's images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.random import default_rng  # here: an import that runs later would swallow the exception of a signal
from PIL import Image

_SIZES = ((640, 480), (640, 427), (480, 640), (640, 426), (500, 375))  # (width, height), the commonest first


def write_pictures(directory: Path, count: int) -> None:
    """Write `count` JPEGs of about 80 kB into a new directory; the same ones every time, all different."""
    directory.mkdir(parents=True)
    for number in range(count):
        _picture(number).save(directory / f"picture_{number:05}.jpg", quality=90)


def _picture(number: int) -> Image.Image:
    generator = default_rng(number)
    width, height = _SIZES[number % len(_SIZES)]
    coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(pixels + generator.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8))
