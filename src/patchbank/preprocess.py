"""An image file to an encoder's input pixels: decode, resize, RGB.

``exact`` gives Pillow's pixels. ``fast`` resizes with torch in two thirds of the time (``python -m
benchmarks.decode``); some values of a thousand differ from Pillow's by one, few by two.

An image that cannot be read becomes a `Failure` with its reason; nothing replaces it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchbank.budget import ByteBudget
from patchbank.config import ResizeMode
from patchbank.datasets.samples import Decoded, Failure, Sample
from patchbank.errors import first_line
from patchbank.features import Input
from patchbank.images import MAX_PIXELS, open_image

_FAST = ("bicubic", "bilinear")  # torch's filters that look at as many pixels as Pillow's


def load(sample: Sample, wanted: Input, budget: ByteBudget) -> Decoded | Failure:
    """Decode one image file and bring it to the input's size. Holds `budget` while pixels are large.

    Raises DatasetError if the whole source of the images is gone.
    """
    try:
        with open_image(sample.source.content(sample)) as image:
            width, height = size = image.size
            resized = wanted.transform(size).resized
            if resized[0] * resized[1] > MAX_PIXELS:
                return Failure(sample.key, f"too elongated: {width} x {height} pixels")
            # The picture and its resized form, at four bytes a pixel, and as much again in decoder and resizer.
            bytes_a_pixel = 16 if _is_laid_over_white(image, wanted) else 12 if wanted.decoder == "fast" else 8
            with budget.reserve(bytes_a_pixel * (width * height + resized[0] * resized[1])):
                try:
                    return Decoded(sample.key, preprocess(image, wanted), size)
                finally:
                    image.close()  # frees the picture
    except FileNotFoundError:
        sample.source.require()
        return Failure(sample.key, "missing: there is no such file")
    except OSError as error:
        if error.errno is not None:  # the system's, not the image's
            sample.source.require()
        return Failure(sample.key, error.strerror or first_line(error))
    except Exception as error:  # of a name that no file has, or a library that reads the source
        return Failure(sample.key, f"{type(error).__name__}: {first_line(error)}")


def preprocess(image: Image.Image, wanted: Input, resize: ResizeMode | None = None) -> NDArray[np.uint8]:
    """An opened image to (h, w, 3) uint8 RGB.

    With ``rgb`` last, these are the pixels of CLIP's own preprocessing: resized in the image's own mode, cropped, and
    only then RGB, which matters for palette, CMYK and 1-bit images. EXIF rotation is not applied.

    Args:
        resize: instead of the input's mode.
    """
    wanted = wanted.resized_by(resize)
    if _is_laid_over_white(image, wanted):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if wanted.rgb != "last" and image.mode != "RGB":
        image = image.convert("RGB")
    transform = wanted.transform(image.size)
    if image.size != transform.resized:
        if wanted.decoder == "fast" and image.mode == "RGB" and wanted.interpolation in _FAST:
            image = _resize_fast(image, transform.resized, wanted.interpolation)
        else:
            image = image.resize(transform.resized, Image.Resampling[wanted.interpolation.upper()])
    left, top = transform.offset
    height, width = wanted.size
    if wanted.resize != "pad" and image.size != (width, height):
        image = image.crop((-left, -top, width - left, height - top))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if wanted.resize == "pad":
        red, green, blue = (round(255 * mean) for mean in wanted.mean)
        canvas = Image.new("RGB", (width, height), (red, green, blue))
        canvas.paste(image, (left, top))
        image = canvas
    return np.asarray(image)


def _is_laid_over_white(image: Image.Image, wanted: Input) -> bool:
    return wanted.rgb == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None)


def _resize_fast(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """An RGB picture."""
    import torch  # here: not every importer of this module needs it
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, height, width), a view
    resized = interpolate(pixels, size[::-1], mode=interpolation, antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())
