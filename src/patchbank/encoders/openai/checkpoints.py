"""Checkpoints: finding, checking and downloading them; their activation; their parameters.

Only what reads parameters imports torch: a plan finds and checks official files without it.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.config import Activation
from patchbank.encoders.base import Progress
from patchbank.encoders.clip_files import CONFIG, load_state, marked_by_openai, stated_beside
from patchbank.encoders.openai.registry import HEAD, MEAN, MODELS, STD, Model
from patchbank.encoders.openai.shapes import expected_shapes, is_half
from patchbank.encoders.weights import all_finite, as_float32, first_wrong, refuse_pointer, sha256_of_weights
from patchbank.errors import WeightsError
from patchbank.files import (
    fsync_directory,
    make_directory,
    scratch_directory,
    sha256_of,
    write_and_sync,
)

if TYPE_CHECKING:
    from torch import Tensor

CACHE = Path("~/.cache/clip")  # OpenAI's own package keeps its files here
CHECKPOINTS = Path("checkpoints/pretrained_CLIP")  # an EZ-HOI checkout keeps its files here
_TIMEOUT = 30.0  # seconds without a byte
# What open_clip's config may say, if it says it: OpenAI's models and their preprocessing.
_OURS = {
    **{"mean": list(MEAN), "std": list(STD), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"},
    **{"head_width": HEAD, "pool_type": "tok", "global_average_pool": False, "attentional_pool": False},
    **{"act_kwargs": {}, "norm_kwargs": {}, "timm_model_name": None},
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: the file.
        sha256: of its content; an official file's has been compared with OpenAI's.
    """

    path: Path
    sha256: str


def places(model: Model, checkpoints: Path | None) -> list[Path]:
    """The possible paths of the official file, in the order of search."""
    directories = [CACHE.expanduser()]
    if checkpoints is not None:
        # EZ-HOI writes pretrained_CLIP; other code of the field writes pretrained_clip.
        directories[:0] = [checkpoints, checkpoints.parent / "pretrained_clip"]
    return [directory / model.file_name for directory in dict.fromkeys(directories)]


def find_checkpoint(model: Model, weights: Path | None, checkpoints: Path | None) -> Checkpoint | None:
    """The user's own file, or the official one on this machine; None if it has to be downloaded.

    Raises WeightsError if the user's file is missing, or a file with the official name is not the official one.
    """
    if weights is not None:
        return Checkpoint(weights, sha256_of_weights(weights))
    for path in places(model, checkpoints):
        if path.is_file():
            return Checkpoint(path, _check_official(model, path))
    return None


def is_there(checkpoint: Checkpoint) -> bool:
    """Whether this machine has the file, with the same content."""
    return checkpoint.path.is_file() and sha256_of_weights(checkpoint.path) == checkpoint.sha256


def obtain_checkpoint(model: Model, checkpoints: Path | None, progress: Progress | None = None) -> Checkpoint:
    """The official file; downloads it if this machine lacks it. Raises WeightsError."""
    if found := find_checkpoint(model, None, checkpoints):
        return found
    candidates = places(model, checkpoints)
    try:
        return download(model, candidates[0], progress)
    except WeightsError as error:
        listed = ", ".join(str(path) for path in candidates)
        raise WeightsError(f"There is no checkpoint of {model.name}: none of {listed}. {error}") from error


def _check_official(model: Model, path: Path) -> str:
    sha256 = sha256_of_weights(path)
    if sha256 != model.sha256:
        refuse_pointer(path)
        raise WeightsError(
            f"{path} is not OpenAI's {model.name}: its SHA-256 is {sha256}, not {model.sha256}. "
            f"A download cut short is the usual cause (the file has {path.stat().st_size:,} bytes): delete it "
            f"and run again. To use it as a checkpoint of your own, give it with --weights."
        )
    return sha256


def download(model: Model, target: Path, progress: Progress | None = None) -> Checkpoint:
    """Download the official file under a temporary name, compare its SHA-256, then rename it to `target`.

    Calls `progress` after each piece. Raises WeightsError, which says which file to put where, if the download fails.
    """
    if not model.url:
        raise WeightsError("There is none to download either: give one with --weights.")
    try:
        with urllib.request.urlopen(model.url, timeout=_TIMEOUT) as response:
            make_directory(target.parent)
            with scratch_directory(target.parent) as scratch:
                received = scratch / target.name
                write_and_sync(received, _pieces(response, progress))
                if (sha256 := sha256_of(received)) != model.sha256:
                    announced = response.headers.get("Content-Length", "an unknown number")
                    raise WeightsError(
                        f"The download of {model.name} from {model.url} is damaged ({received.stat().st_size} bytes of "
                        f"{announced}; SHA-256 {sha256}). Nothing was kept: try again."
                    )
                received.rename(target)
                fsync_directory(target.parent)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise WeightsError(
            f"{model.name} could not be downloaded ({reason}). Fetch {model.url} on a machine with a network and "
            f"put it at {target}."
        ) from error
    return Checkpoint(target, model.sha256)


def _pieces(response: http.client.HTTPResponse, progress: Progress | None) -> Iterator[bytes]:
    received, total = 0, int(response.headers.get("Content-Length") or 0)
    while piece := response.read(1 << 20):
        yield piece
        received += len(piece)
        if progress:
            progress(received, total)


def activation_of(path: Path) -> Activation | None:
    """The activation that a checkpoint was trained with, if the file or open_clip's config beside it proves one.

    OpenAI's own archives, and files with an official SHA-256, need ``quickgelu``. Other files have the same names and
    shapes with either activation. Raises WeightsError if the file cannot be read, or the config asks for something
    else than OpenAI's architecture.
    """
    if marked_by_openai(path) or sha256_of_weights(path) in {model.sha256 for model in MODELS.values()}:
        return "quickgelu"
    if (beside := stated_beside(path)) is None:
        return None
    stated = beside.vision | beside.preprocess
    if others := [f"{name} {stated[name]}" for name, own in _OURS.items() if stated.get(name) not in (None, own)]:
        raise WeightsError(
            f"{path.with_name(CONFIG)} asks for {', '.join(others)}, which OpenAI's models do not have. "
            "Use a checkpoint that was trained with OpenAI's preprocessing and layers."
        )
    return beside.activation


def resolve_activation(checkpoint: Checkpoint, asked: Activation | None) -> Activation:
    """The activation to compute with: the proven one, or else the one `asked` for.

    Raises WeightsError if there is neither, if they differ, and as `activation_of` does.
    """
    path = checkpoint.path
    proven = activation_of(path)
    if proven and asked and proven != asked:
        raise WeightsError(
            f"{path} was trained with {proven}, as its format or {CONFIG} says, not with {asked}. "
            f"Leave out --activation {asked}."
        )
    if found := proven or asked:
        return found
    raise WeightsError(
        f"{path} does not say which activation it was trained with (OpenAI's QuickGELU or GELU as LAION's and "
        "DataComp's models). Add --activation quickgelu or --activation gelu."
    )


@lru_cache(maxsize=1)
def load_visual(model: Model, checkpoint: Checkpoint, *, rounding: bool) -> Mapping[str, Tensor]:
    """The image tower's parameters under OpenAI's names less ``visual.``, as float32 on the CPU.

    Reads OpenAI's TorchScript archives and state dicts (``.pt``, ``.safetensors``), and runs no code in them. With
    `rounding`, the parameters of convolutions, linear layers, attention and projections are rounded to float16, as
    ``clip.load`` does; those of official files are exact in float16. Do not write to the tensors: the last call's are
    cached, since a run's plan checks them before the run loads them.

    Raises WeightsError if the file is no such checkpoint, its shapes are another model's, or a number is not finite.
    """
    path = checkpoint.path
    visual = load_state(path, "visual.")
    _check_shapes(model, path, visual)
    return {name: _float32(path, name, visual.pop(name), rounding) for name in list(visual)}


def holds_halves(parameters: Mapping[str, Tensor]) -> bool:
    """Whether rounding the parameters to float16 changes nothing."""
    import torch

    return all(torch.equal(value.half().float(), value) for name, value in parameters.items() if is_half(name))


def _check_shapes(model: Model, path: Path, visual: dict[str, Tensor]) -> None:
    expected = expected_shapes(model)
    found = {name: tuple(value.shape) for name, value in visual.items()}
    if not (wrong := first_wrong(expected, found, "visual.")):
        return
    match = next((each.name for each in MODELS.values() if expected_shapes(each) == found), None)
    guess = f"By its shapes it is a {match}. " if match else ""
    raise WeightsError(f"{path} is not a {model.name}: {wrong}. {guess}Give the --model that the file was made for.")


def _float32(path: Path, name: str, value: Tensor, rounding: bool) -> Tensor:
    exact = as_float32(path, f"visual.{name}", value).contiguous()
    if not rounding or not is_half(name) or str(value.dtype) == "torch.float16":
        return exact
    rounded = value.half().float().contiguous()
    if not all_finite(rounded):
        raise WeightsError(f"{path}: visual.{name} does not fit into float16. Leave out --round-weights.")
    return rounded
