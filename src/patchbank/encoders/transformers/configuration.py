"""The config.json of a repository, and the classes of the library that it names. No code of a repository runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from patchbank.encoders.quiet import quiet
from patchbank.errors import ConfigError, WeightsError, first_line, install

PREFIX = "transformers/"
# The model types that are plain vision transformers, alone or beside a text tower.
KINDS = (
    *("aimv2", "aimv2_vision_model", "altclip", "beit", "chinese_clip", "chinese_clip_vision_model", "clip"),
    *("clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa"),
    *("metaclip_2", "mlcd", "mlcd_vision_model", "siglip", "siglip_vision_model", "tipsv2", "tipsv2_vision_model"),
    *("vit", "vit_mae", "vit_msn"),
)
_NAFLEX = ("siglip2", "siglip2_vision_model")
_SETTINGS = {"vit_mae": {"mask_ratio": 0.0}}  # its encoder sees all patches
# What a config.json may ask for: layers, tokens of an image, any other number.
_MOST_LAYERS, _MOST_TOKENS, _MOST = 512, 1 << 14, 1 << 24
# Its entries that say nothing of the numbers, but change what a model returns, how it computes, or what code runs.
_IGNORED = (
    *("auto_map", "attn_implementation", "dtype", "torch_dtype", "gradient_checkpointing", "output_attentions"),
    *("output_hidden_states", "return_dict", "use_return_dict", "torchscript", "transformers_version"),
    *("out_features", "out_indices", "stage_names", "num_labels", "id2label", "label2id"),
)


@contextlib.contextmanager
def installed() -> Iterator[Any]:
    """transformers, without its words and bars on the terminal. Raises ConfigError if it is not installed."""
    missing = f"--model {PREFIX}... needs transformers: {install('transformers')}"
    with quiet("transformers", missing, "transformers") as library:
        logging = library.utils.logging
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield library
        finally:
            if bars:
                logging.enable_progress_bar()


@contextlib.contextmanager
def reading(file: str, name: str) -> Iterator[None]:
    """Whatever the library says of a file that is not right is a WeightsError."""
    try:
        yield
    except (ConfigError, WeightsError):
        raise
    except Exception as error:
        raise WeightsError(f"The {file} of {name} is not as transformers reads it: {first_line(error)}") from error


def checked(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what would run code or change the outputs. Raises ConfigError, WeightsError."""
    kind = data.get("model_type")
    if kind in _NAFLEX:
        raise ConfigError(
            f"{name} is a NaFlex model, without a fixed grid. Use one of a fixed size, of the type siglip."
        )
    if kind not in KINDS:
        raise ConfigError(
            f"{name} is of the type {kind!r}, which patchbank does not read: it is no plain vision transformer. Known "
            f"types: {', '.join(sorted(KINDS))}."
        )
    if "quantization_config" in data:
        raise ConfigError(f"{name} is quantised. Use a repository with weights in float32, bfloat16 or float16.")
    return {**_bounded(name, data), **_SETTINGS.get(kind, {})}


def _bounded(name: str, data: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in data.items():
        if key in _IGNORED or key.startswith("_"):
            continue
        if isinstance(value, dict):
            value = _bounded(name, value)
        most = _MOST_LAYERS if "layers" in key else _MOST
        if isinstance(value, int | float) and not abs(value) <= most:
            raise WeightsError(f"The config.json of {name} is damaged: {key} is {value}.")
        kept[key] = value
    return kept


def class_of(library: Any, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a config.json, and its configuration. Raises ConfigError if this version has no such models."""
    kind, named = data["model_type"], data.get("architectures")
    if kind not in library.CONFIG_MAPPING:
        raise ConfigError(f"transformers {library.__version__} has no models of the type {kind}: install a newer one.")
    config = library.CONFIG_MAPPING[kind].from_dict(dict(data))
    vision = getattr(config, "vision_config", config)
    size, patch = (
        each if isinstance(each, list | tuple) else [each] * 2 for each in (vision.image_size, vision.patch_size)
    )
    if (size[0] // patch[0]) * (size[1] // patch[1]) > _MOST_TOKENS:
        raise ValueError(f"its images have more than {_MOST_TOKENS:,} patches")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    projected = name.endswith("VisionModelWithProjection") and hasattr(library, name)
    model_class = getattr(library, name) if projected else library.MODEL_MAPPING[type(config)]
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    return model_class, config
