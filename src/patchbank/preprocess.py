"""An image file to the model's input: decode, resize, RGB. Pillow's pixels, as OpenAI's preprocessing makes them.

Or, where that is asked for, resized by torch, which calculates with shorter whole numbers. It is ready in two thirds of
the time (``python -m benchmarks.decode``), and of a thousand numbers some differ from Pillow's by one, seldom by two.

A picture that cannot be had becomes a `Failure` with its reason; nothing is put in its place.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from patchbank.budget import ByteBudget
from patchbank.config import Decode, ResizeMode
from patchbank.datasets.samples import Decoded, Failure, Sample
from patchbank.encoders.openai.registry import MEAN
from patchbank.transform import ImageTransform

_MEAN_COLOUR = tuple(round(255 * mean) for mean in MEAN)

# Pillow refuses to open pictures of more pixels; no resized picture may have more either.
MAX_PIXELS = 2 * int(Image.MAX_IMAGE_PIXELS or 89_478_485)


def load(
    sample: Sample, mode: ResizeMode, input_size: int, budget: ByteBudget, decode: Decode = "exact"
) -> Decoded | Failure:
    """Decode one image file and bring it to the model's input size. Holds `budget` while pixels are large.

    Raises DatasetError where not this image but all of them are gone.
    """
    try:
        with Image.open(sample.source.content(sample)) as image:
            width, height = size = image.size
            resized = ImageTransform(width, height, mode, input_size, 1).resized
            if resized[0] * resized[1] > MAX_PIXELS:
                return Failure(sample.key, f"too elongated: {width} x {height} pixels")
            # The picture and its resized form, at four bytes a pixel, and what decoder and resizer hold beside.
            with budget.reserve((12 if decode == "fast" else 8) * (width * height + resized[0] * resized[1])):
                return Decoded(sample.key, preprocess(image, mode, input_size, decode), size)
    except FileNotFoundError:
        sample.source.require()
        return Failure(sample.key, "missing: there is no such file")
    except UnidentifiedImageError:
        return Failure(sample.key, "not an image that Pillow can identify")
    except Image.DecompressionBombError:
        return Failure(sample.key, f"too large: more than {MAX_PIXELS:,} pixels")
    except MemoryError:
        return Failure(sample.key, "out of memory while decoding")
    except OSError as error:
        if error.errno is not None:  # of the system, and not of Pillow
            sample.source.require()
        return Failure(sample.key, error.strerror or _first_line(error))
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        return Failure(sample.key, f"{type(error).__name__}: {_first_line(error)}")


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
