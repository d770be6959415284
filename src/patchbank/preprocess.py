"""An image file to the model's input: decode, resize, RGB. Pillow's pixels, as OpenAI's preprocessing makes them.

Or, where that is asked for, resized by torch, which calculates with shorter whole numbers. It is ready in two thirds of
the time (``python -m benchmarks.decode``), and of a thousand numbers some differ from Pillow's by one, seldom by two.

A picture that cannot be had becomes a `Failure` with its reason; nothing is put in its place.
"""

from __future__ import annotations

import re
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
    """Decode one image file and bring it to the model's input size. Holds `budget` while pixels are large.

    Raises DatasetError where not this image but all of them are gone.
    """
    try:
        with Image.open(record.source.content(record)) as image:
            width, height = size = image.size
            resized = ImageTransform(width, height, mode, input_size, 1).resized
            if resized[0] * resized[1] > MAX_PIXELS:
                return Failure(record.key, f"too elongated: {width} x {height} pixels")
            # The picture and its resized form, at four bytes a pixel, and what decoder and resizer hold beside.
            with budget.reserve((12 if decode == "fast" else 8) * (width * height + resized[0] * resized[1])):
                return Decoded(record.key, preprocess(image, mode, input_size, decode), size)
    except FileNotFoundError:
        record.source.require()
        return Failure(record.key, "missing: there is no such file")
    except UnidentifiedImageError:
        return Failure(record.key, "not an image that Pillow can identify")
    except Image.DecompressionBombError:
        return Failure(record.key, f"too large: more than {MAX_PIXELS:,} pixels")
    except MemoryError:
        return Failure(record.key, "out of memory while decoding")
    except OSError as error:
        if error.errno is not None:  # of the system, and not of Pillow
            record.source.require()
        return Failure(record.key, error.strerror or _first_line(error))
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        return Failure(record.key, f"{type(error).__name__}: {_first_line(error)}")


def preprocess(image: Image.Image, mode: ResizeMode, input_size: int, decode: Decode = "exact") -> NDArray[np.uint8]:
    """An opened image to (n, n, 3) uint8 RGB.

    ``center-crop`` gives the pixels of CLIP's own preprocessing: bicubic in the image's own mode, the central
    square, and only then RGB, which matters for palette, CMYK and 1-bit pictures. EXIF rotation is not applied.
    """
    transform = ImageTransform(*image.size, mode, input_size, 1)
    if image.size != transform.resized:
        if decode == "fast" and image.mode == "RGB":
            image = _resize_fast(image, transform.resized)
        else:
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


def _resize_fast(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An RGB picture, bicubic."""
    import torch  # here, since the readers of a bank import this module's names alone
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, height, width), in memory as it was
    resized = interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())


def _first_line(error: Exception) -> str:
    """The message without addresses and line breaks, so that the same file always fails with the same words."""
    text = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0]
