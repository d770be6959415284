"""Pictures to decode where there are none: JPEGs with edges and noise, of the sizes that HICO-DET's images have."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.random import default_rng  # now: what a signal raises would be lost while this is imported
from PIL import Image

_SIZES = ((640, 480), (640, 427), (480, 640), (640, 426), (500, 375))  # (width, height), the commonest first


def jpeg(number: int = 0) -> bytes:
    """A JPEG of about 80 kB; each number's is another one, and always the same."""
    generator = default_rng(number)
    width, height = _SIZES[number % len(_SIZES)]
    coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(pixels + generator.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_pictures(directory: Path, count: int) -> None:
    """Write so many of them, different ones, into a new directory."""
    directory.mkdir(parents=True)
    for number in range(count):
        (directory / f"picture_{number:05}.jpg").write_bytes(jpeg(number))
