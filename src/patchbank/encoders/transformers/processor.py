"""The preprocessor_config.json of a repository: how images become the input."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

import numpy as np
from PIL import Image

from patchbank.encoders.transformers.configuration import reading
from patchbank.encoders.transformers.place import Place
from patchbank.errors import ConfigError
from patchbank.features import Input, Interpolation, Rgb

# Image processors that resize, cut out the centre and normalise, and do nothing else; what they are made of.
_PROCESSORS = ("Beit", "Bit", "CLIP", "ChineseCLIP", "DINOv3ViT", "DeiT", "Siglip", "Tipsv2", "ViT")
_FIELDS = (
    *("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
)
_PROCESSOR_TYPES = ("image_processor_type", "feature_extractor_type")
_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MOST_SIDE = 4096  # of a resized image


def input_of(library: Any, name: str, place: Place, patch: int) -> tuple[Input, tuple[int, int]]:
    """How a repository's image processor makes an input, and the (h, w) to resize to before the centre is cut out.

    Raises ConfigError if an `Input` cannot say it.
    """
    data = place.read("processor_config.json", "preprocessor_config.json")
    if isinstance(nested := data.get("image_processor"), dict):
        data = nested
    elif not any(each in data for each in _PROCESSOR_TYPES):
        data = place.read("preprocessor_config.json")
    kind = str(next((data[each] for each in _PROCESSOR_TYPES if each in data), None))
    plain = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
    if plain not in _PROCESSORS:
        raise ConfigError(f"{name} prepares images by {kind}, which patchbank does not know.")
    with reading("preprocessor_config.json", name):
        # Pillow's, if there is one: DINOv3's is made for torchvision alone.
        ends = ("Pil", "", "Fast")
        processor = next(filter(None, (getattr(library, f"{plain}ImageProcessor{end}", None) for end in ends)))
        made = processor(**{each: data[each] for each in _FIELDS if each in data})
        size, crop = (dict(each or {}) for each in (made.size, getattr(made, "crop_size", None)))
        crops = bool(getattr(made, "do_center_crop", False))
        shortest = set(size) == {"shortest_edge"}
        cover: Any = (size["shortest_edge"],) * 2 if shortest else (size.get("height"), size.get("width"))
        cut: Any = (crop["height"], crop["width"]) if crops else cover
        sides = all(type(side) is int and 0 < side <= least for side, least in zip(cut, cover, strict=True))
        if data.get("do_pad") or "crop_pct" in data:
            raise ConfigError(f"{name} pads images, or has a crop_pct, which patchbank does not know.")
        if not (made.do_resize and sides and max(cover) <= _MOST_SIDE and crops >= shortest):
            raise ConfigError(
                f"{name} prepares images in a way that patchbank does not know: size {size}, crop {crop}."
            )
        scale = round(255 * (made.rescale_factor if made.do_rescale else 1), 9)  # what 255 becomes
        mean, std = (
            tuple(float(each) / scale for each in (value if isinstance(value, list | tuple) else [value] * 3))
            for value in ((made.image_mean, made.image_std) if made.do_normalize else (0.0, 1.0))
        )
        if not (len(mean) == len(std) == 3 and all(map(isfinite, mean)) and all(0 < each < 1e6 for each in std)):
            raise ValueError(f"images are normalised by {mean} and {std}")
        return Input(
            size=cut,
            patch=patch,
            mean=mean,
            std=std,
            interpolation=_FILTERS[int(made.resample)],
            resize="center-crop" if shortest else "squash",
            crop="down",
            rgb=_rgb(library) if getattr(made, "do_convert_rgb", None) else "first",
        ), cover


def _rgb(library: Any) -> Rgb:
    """How the library makes RGB of what is transparent: since version 5, over white."""
    made = library.image_transforms.convert_to_rgb(Image.new("RGBA", (1, 1)))
    return "white" if np.asarray(made).any() else "first"
