"""An image file to an encoder's input pixels: decode, resize, RGB.

``exact`` gives Pillow's pixels. ``fast`` resizes with torch in two thirds of the time (``python -m
benchmarks.decode``); some values of a thousand differ from Pillow's by one, few by two.

An image that cannot be read becomes a `Failure` with its reason; nothing replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchbank.budget import ByteBudget
from patchbank.config import ResizeMode
from patchbank.datasets.samples import Decoded, Failure, Sample
from patchbank.errors import first_line
from patchbank.features import Input
from patchbank.images import MAX_PIXELS, open_image
from patchbank.regions import cut_size, fault_of, rectangle

_FAST = ("bicubic", "bilinear")  # torch's filters that look at as many pixels as Pillow's


def load(sample: Sample, wanted: Input, budget: ByteBudget) -> Decoded | Failure:
    """Decode one sample's image and bring the sample to the input's size. As `load_all`."""
    return load_all({wanted: [sample]}, budget)[wanted][0]


def load_all(wanted: Mapping[Input, Sequence[Sample]], budget: ByteBudget) -> dict[Input, list[Decoded | Failure]]:
    """Decode one image, and bring its samples to the size of each input. Holds `budget` while pixels are large.

    Raises DatasetError if the whole source of the images is gone.
    """
    sample = next(iter(wanted.values()))[0]
    try:
        with open_image(sample.source.content(sample)) as image:
            needed = {each: [_pixels(one, image.size, each) for one in samples] for each, samples in wanted.items()}
            with budget.reserve(max(_bytes(image, sample, *each) for each in needed.items())):
                try:
                    image.load()  # before all else: a picture's mode and transparency are known only then
                    return {each: _tried(image, samples, each, needed[each]) for each, samples in wanted.items()}
                finally:
                    image.close()  # frees the picture
    except FileNotFoundError:
        sample.source.require()
        reason = "missing: there is no such file"
    except OSError as error:
        if error.errno is not None:  # the system's, not the image's
            sample.source.require()
        reason = _reason(error)
    except Exception as error:  # of a name that no file has, or a library that reads the source
        reason = _reason(error)
    return {each: [Failure(one.key, reason) for one in samples] for each, samples in wanted.items()}


def _bytes(image: Image.Image, sample: Sample, wanted: Input, needed: Sequence[int | str]) -> int:
    """Of the picture and its resized form, at four bytes a pixel, and as much again in decoder and resizer."""
    less = wanted.decoder != "fast" and sample.region is None
    a_pixel = 16 if _is_laid_over_white(image, wanted) else 8 if less else 12
    return a_pixel * (image.size[0] * image.size[1] + max(each for each in (0, *needed) if isinstance(each, int)))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _tried(
    image: Image.Image, samples: Sequence[Sample], wanted: Input, needed: Sequence[int | str]
) -> list[Decoded | Failure]:
    """The samples for one input, which may refuse what another takes."""
    try:
        return _made(image, samples, wanted, needed)
    except Exception as error:
        return [Failure(each.key, _reason(error)) for each in samples]


def _made(
    image: Image.Image, samples: Sequence[Sample], wanted: Input, needed: Sequence[int | str]
) -> list[Decoded | Failure]:
    """The samples of an opened image; a text in `needed` is why there are no pixels."""
    whole = image if samples[0].region is None else _rgb(image, wanted)
    return [
        Decoded(each, preprocess(_cut_out(whole, each, wanted), wanted), image.size)
        if isinstance(found, int)
        else Failure(each.key, found)
        for each, found in zip(samples, needed, strict=True)
    ]


def _pixels(sample: Sample, size: tuple[int, int], wanted: Input) -> int | str:
    """The pixels of what is cut out of an image, and of its resized form; or why there are none."""
    taken = 0
    if sample.region is not None and (box := sample.region.box) is not None:
        if fault := fault_of(box, size):
            return fault
        try:
            size = cut_size(box, wanted.cut, size)
        except ValueError as error:
            return str(error)
        taken = size[0] * size[1]
    width, height = wanted.transform(size).resized
    if width * height > MAX_PIXELS:
        return f"too elongated: {size[0]} x {size[1]} pixels"
    return taken + width * height


def _cut_out(image: Image.Image, sample: Sample, wanted: Input) -> Image.Image:
    """The sample's part of an RGB image; what lies outside of it is black."""
    if sample.region is None or (box := sample.region.box) is None:
        return image
    part = image.crop(rectangle(box, wanted.cut, image.size))
    if wanted.cut != "pad":
        return part
    width, height = part.size
    side = max(part.size)
    square = Image.new("RGB", (side, side))
    square.paste(part, ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(image: Image.Image, wanted: Input, resize: ResizeMode | None = None) -> NDArray[np.uint8]:
    """An opened image to (h, w, 3) uint8 RGB.

    With ``rgb`` last, these are the pixels of CLIP's own preprocessing: resized in the image's own mode, cropped, and
    only then RGB, which matters for palette, CMYK and 1-bit images. EXIF rotation is not applied.

    Args:
        resize: instead of the input's mode.
    """
    wanted = wanted.resized_by(resize)
    if wanted.rgb != "last":
        image = _rgb(image, wanted)
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


def _rgb(image: Image.Image, wanted: Input) -> Image.Image:
    if _is_laid_over_white(image, wanted):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_laid_over_white(image: Image.Image, wanted: Input) -> bool:
    return wanted.rgb == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None)


def _resize_fast(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    """An RGB picture."""
    import torch  # here: not every importer of this module needs it
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, height, width), a view
    resized = interpolate(pixels, size[::-1], mode=interpolation, antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).numpy())
