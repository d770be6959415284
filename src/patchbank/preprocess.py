"""An image file to the model's input: decode, resize, RGB. Pillow's pixels, as OpenAI's preprocessing makes them.

Or, where that is asked for, torchvision's of JPEGs. They are ready in a third of the time (``python -m
benchmarks.decode``), since torchvision resizes with shorter whole numbers: of a thousand pixels some differ from
Pillow's by one (``python -m benchmarks.fidelity``).

A picture that cannot be had becomes a `Failure` with its reason; nothing is put in its place.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from patchbank.budget import ByteBudget
from patchbank.config import Decode, ResizeMode
from patchbank.datasets.records import Record
from patchbank.geometry import ImageTransform
from patchbank.models import MEAN

_MEAN_COLOUR = tuple(round(255 * mean) for mean in MEAN)

# Pillow refuses to open pictures of more pixels; no resized picture may have more either.
MAX_PIXELS = 2 * int(Image.MAX_IMAGE_PIXELS or 89_478_485)


class Decoded(NamedTuple):
    """One image, ready for the encoder.

    Attributes:
        key: the record's.
        pixels: (n, n, 3) uint8 RGB.
        size: (width, height) of the original, in pixels.
    """

    key: str
    pixels: NDArray[np.uint8]
    size: tuple[int, int]


class Failure(NamedTuple):
    """One image that could not be had, and why."""

    key: str
    reason: str


def load(
    record: Record, mode: ResizeMode, input_size: int, budget: ByteBudget, decode: Decode = "exact"
) -> Decoded | Failure:
    """Decode one image file and bring it to the model's input size. Holds `budget` while pixels are large."""
    try:
        if not stat.S_ISREG((status := record.path.stat()).st_mode):
            return Failure(record.key, "not a regular file")
        if status.st_size == 0:
            return Failure(record.key, "the file is empty")
        with Image.open(record.path) as image:
            width, height = size = image.size
            resized = ImageTransform(width, height, mode, input_size, 1).resized
            if resized[0] * resized[1] > MAX_PIXELS:
                return Failure(record.key, f"too elongated: {width} x {height} pixels")
            # The picture and its resized form, at four bytes a pixel, and what decoder and resizer hold beside.
            with budget.reserve(8 * (width * height + resized[0] * resized[1])):
                pixels = _preprocess_jpeg(image, record.path, mode, input_size) if decode == "fast" else None
                return Decoded(record.key, preprocess(image, mode, input_size) if pixels is None else pixels, size)
    except FileNotFoundError:
        return Failure(record.key, "missing: there is no such file")
    except UnidentifiedImageError:
        return Failure(record.key, "not an image that Pillow can identify")
    except Image.DecompressionBombError:
        return Failure(record.key, f"too large: more than {MAX_PIXELS:,} pixels")
    except MemoryError:
        return Failure(record.key, "out of memory while decoding")
    except OSError as error:
        return Failure(record.key, error.strerror or _first_line(error))
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        return Failure(record.key, f"{type(error).__name__}: {_first_line(error)}")


def preprocess(image: Image.Image, mode: ResizeMode, input_size: int) -> NDArray[np.uint8]:
    """An opened image to (n, n, 3) uint8 RGB.

    ``center-crop`` gives the pixels of CLIP's own preprocessing: bicubic in the image's own mode, the central
    square, and only then RGB, which matters for palette, CMYK and 1-bit pictures. EXIF rotation is not applied.
    """
    transform = ImageTransform(*image.size, mode, input_size, 1)
    if image.size != transform.resized:
        image = image.resize(transform.resized, Image.Resampling.BICUBIC)
    left, top = transform.offset
    if mode == "center-crop":
        image = image.crop((-left, -top, input_size - left, input_size - top))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if mode == "pad":
        canvas = Image.new("RGB", (input_size, input_size), _MEAN_COLOUR)
        canvas.paste(image, (left, top))
        image = canvas
    return np.asarray(image)


def _preprocess_jpeg(image: Image.Image, path: Path, mode: ResizeMode, input_size: int) -> NDArray[np.uint8] | None:
    """As `preprocess`, by torchvision; None of what is no usual JPEG, which Pillow then has."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    import torch
    import torchvision.transforms.v2.functional as transforms
    from torchvision.io import ImageReadMode, decode_jpeg

    transform = ImageTransform(*image.size, mode, input_size, 1)
    try:
        encoded = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)  # (3, height, width), in memory as Pillow's
    except RuntimeError:
        return None  # Pillow finds the words for what is wrong with it
    width, height = transform.resized
    pixels = transforms.resize(pixels, [height, width], transforms.InterpolationMode.BICUBIC, antialias=True)
    left, top = transform.offset
    resized: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    if mode == "center-crop":
        resized = resized[-top : input_size - top, -left : input_size - left]
    if mode == "pad":
        canvas = np.full((input_size, input_size, 3), _MEAN_COLOUR, np.uint8)
        canvas[top : top + height, left : left + width] = resized
        resized = canvas
    return resized


def _first_line(error: Exception) -> str:
    """The message without addresses and line breaks, so that the same file always fails with the same words."""
    text = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0]
