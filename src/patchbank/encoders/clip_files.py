"""Files of CLIP models: their image and text towers as data, and open_clip's config beside them.

Only what reads parameters imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbank.config import Activation
from patchbank.encoders.weights import is_safetensors, opened
from patchbank.errors import WeightsError
from patchbank.files import parse_json, read_regular

if TYPE_CHECKING:
    from torch import Tensor

VISUAL = "visual."  # how the names of an image tower's parameters begin
CONFIG = "open_clip_config.json"  # beside the weights in open_clip's repositories on the Hugging Face hub
# Tensors of OpenAI's archives that are not parameters. No other exporter writes them.
_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})
_VISUAL = re.compile(r"(^|.*?\.)visual\.")


class Stated(NamedTuple):
    """What open_clip's config says of the weights beside it.

    Attributes:
        activation: of both towers; without ``quick_gelu`` it is GELU.
        vision: of the image tower, by open_clip's names.
        preprocess: of the pictures, likewise.
    """

    activation: Activation
    vision: dict[str, Any]
    preprocess: dict[str, Any]


def stated_beside(path: Path) -> Stated | None:
    """What the config beside a file says; None if there is no such file. Raises WeightsError if it cannot be read."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        return None
    try:
        content = parse_json(read_regular(config))
        quick = content["model_cfg"].get("quick_gelu", False)
        stated = dict(content["model_cfg"]["vision_cfg"]), dict(content.get("preprocess_cfg") or {})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{config} cannot be read as open_clip's config ({error}).") from error
    if type(quick) is not bool:
        raise WeightsError(f"{config} asks for quick_gelu {quick}: it is true or false.")
    return Stated("quickgelu" if quick else "gelu", *stated)


def marked_by_openai(path: Path) -> bool:
    """Whether a file is an archive as OpenAI's are, which need QuickGELU. Raises WeightsError."""
    from patchbank.encoders.archive import Archive

    if is_safetensors(path):
        return False
    with Archive(path) as archive:
        return archive.attributes >= _MARKS


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The names of the image tower's parameters, without ``visual.``, and their shapes. Raises WeightsError."""
    with opened(path) as (shapes, _):
        begin = _prefix(path, shapes) + VISUAL
        return {name.removeprefix(begin): shape for name, shape in shapes.items() if name.startswith(begin)}


def load_state(path: Path, part: str = "", without: str = "none") -> dict[str, Tensor]:
    """A model's parameters as stored: those whose names begin with `part`, which is cut off, and not with `without`.

    Raises WeightsError if the file cannot be read, or has none of them.
    """
    with opened(path) as (names, tensor):
        begin = _prefix(path, names)
        left_out, begin = begin + without, begin + part
        found = [name for name in names if name.startswith(begin) and not name.startswith(left_out)]
        loaded = {name.removeprefix(begin): tensor(name) for name in found}
    if part and not loaded:
        raise WeightsError(
            f"{path} holds no CLIP image tower: no parameter's name begins with '{part}' "
            f"(it has {', '.join(sorted(names)[:3]) or 'none'} ...). Expected OpenAI's names."
        )
    return loaded


def _prefix(path: Path, names: Iterable[str]) -> str:
    """The prefix of training code before the model's own names: ``module.`` (DataParallel), ``model.`` (Lightning)."""
    found = list(dict.fromkeys(match[1] for match in map(_VISUAL.match, names) if match))
    if len(found) > 1 and "" not in found:
        raise WeightsError(f"{path} holds several image towers: {', '.join(found[:5])}. Save a file with one of them.")
    return "" if "" in found or not found else found[0]
