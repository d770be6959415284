"""Checkpoints: where they are looked for, that they are the right ones, and their parameters as OpenAI names them."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.errors import WeightsError
from patchbank.files import fsync_directory, make_directory, scratch_directory, sha256_of

CACHE = Path("~/.cache/clip")  # where OpenAI's own package keeps them
CHECKPOINTS = Path("checkpoints/pretrained_CLIP")  # where an EZ-HOI checkout does
_TIMEOUT = 30.0  # seconds without a byte

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is on disk and may be used.

    Attributes:
        path: the file.
        sha256: of its content; of an official file it has been compared with OpenAI's.
    """

    path: Path
    sha256: str


def places(model: Model, checkpoints: Path | None) -> list[Path]:
    """Where the official file is looked for, in order."""
    directories = [CACHE.expanduser()]
    if checkpoints is not None:
        # EZ-HOI writes pretrained_CLIP; other code of the field writes pretrained_clip.
        directories[:0] = [checkpoints, checkpoints.parent / "pretrained_clip"]
    return [directory / model.file_name for directory in dict.fromkeys(directories)]


def find_checkpoint(model: Model, weights: Path | None, checkpoints: Path | None) -> Checkpoint | None:
    """The user's own file, or the official one where it lies; None if it has to be downloaded.

    Raises WeightsError where the user's file is missing, or a file under the official name is not the official one.
    """
    if weights is not None:
        if not weights.is_file():
            raise WeightsError(f"There is no checkpoint {weights}. Give --weights an existing file.")
        return Checkpoint(weights, _sha256(weights))
    for path in places(model, checkpoints):
        if path.is_file():
            return Checkpoint(path, _check_official(model, path))
    return None


def is_there(checkpoint: Checkpoint) -> bool:
    """Whether this machine has the file, with the same content."""
    return checkpoint.path.is_file() and _sha256(checkpoint.path) == checkpoint.sha256


def obtain_checkpoint(
    model: Model, weights: Path | None, checkpoints: Path | None, progress: Progress | None = None
) -> Checkpoint:
    """As `find_checkpoint`, and downloads the official file where it is nowhere. Raises WeightsError."""
    if found := find_checkpoint(model, weights, checkpoints):
        return found
    candidates = places(model, checkpoints)
    try:
        return download(model, candidates[0], progress)
    except WeightsError as error:
        listed = ", ".join(str(path) for path in candidates)
        raise WeightsError(f"There is no checkpoint of {model.name}: none of {listed}. {error}") from error


def _sha256(path: Path) -> str:
    try:
        status = path.stat()
        return _sha256_of_version(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise WeightsError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=16)
def _sha256_of_version(path: Path, _size: int, _modified: int) -> str:
    """Cached: one run plans several banks with the same file of hundreds of megabytes."""
    return sha256_of(path)


def _check_official(model: Model, path: Path) -> str:
    sha256 = _sha256(path)
    if sha256 != model.sha256:
        raise WeightsError(
            f"{path} is not OpenAI's {model.name}: its SHA-256 is {sha256}, not {model.sha256}. "
            f"A download cut short is the usual cause ({path.stat().st_size:,} bytes are here): delete the file "
            f"and run again. To use it as a checkpoint of your own, give it with --weights."
        )
    return sha256


def download(model: Model, target: Path, progress: Progress | None = None) -> Checkpoint:
    """Fetch the official file: to a temporary name, compared with its SHA-256, then renamed to `target`.

    Raises WeightsError where it cannot be had, saying which file to put where.
    """
    if not model.url:
        raise WeightsError("None can be downloaded either: give one with --weights.")
    try:
        with urllib.request.urlopen(model.url, timeout=_TIMEOUT) as response:
            make_directory(target.parent)
            with scratch_directory(target.parent) as scratch:
                _receive(response, model, scratch / target.name, progress)
                (scratch / target.name).rename(target)
                fsync_directory(target.parent)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise WeightsError(
            f"{model.name} could not be downloaded ({reason}). Fetch {model.url} on a machine with a network and "
            f"put it at {target}."
        ) from error
    return Checkpoint(target, model.sha256)


def _receive(response: http.client.HTTPResponse, model: Model, path: Path, progress: Progress | None) -> None:
    """Write what the server sends to `path`, durably. Raises WeightsError if it is not the official file."""
    digest, received = hashlib.sha256(), 0
    total = int(response.headers.get("Content-Length") or 0)
    with open(path, "wb") as file:
        while chunk := response.read(1 << 20):
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
            if progress:
                progress(received, total)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256:
        raise WeightsError(
            f"The download of {model.name} from {model.url} is damaged ({received:,} bytes, "
            f"{total or 'an unknown number'} announced; SHA-256 {digest.hexdigest()}). Nothing was kept: try again."
        )


@lru_cache(maxsize=1)
def load_visual(model: Model, checkpoint: Checkpoint, *, rounding: bool) -> Mapping[str, Tensor]:
    """The image tower's parameters under OpenAI's names less ``visual.``, as float32 on the CPU.

    Takes OpenAI's TorchScript archives and plain state dicts (``.pt``, ``.safetensors``). As ``clip.load`` does,
    the parameters of convolutions, linear layers, attention and projections are rounded to float16 first: official
    files hold nothing finer, and so other files give the original scripts' numbers too. Not to be written to: the
    last file's parameters are kept, since planning a run looks at them before the run does.

    A state dict is read without running what it names. A TorchScript archive is a program that torch may run in part
    while it loads: only the official files are known to be harmless.

    Raises WeightsError where the file is no such checkpoint, or its shapes are another model's.
    """
    path = checkpoint.path
    state = load_state(path)
    visual = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    if not visual:
        raise WeightsError(
            f"{path} holds no CLIP image tower: no parameter's name begins with 'visual.' "
            f"(it has {', '.join(sorted(state)[:3]) or 'none'} ...). OpenAI's names are expected."
        )
    _check_shapes(model, path, visual)
    return {name: _round(name, value) if rounding else value.float() for name, value in visual.items()}


def load_state(path: Path) -> dict[str, Tensor]:
    """All parameters of a checkpoint under their names, as they are stored. Raises WeightsError."""
    return _strip(_read_state(path))


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit")  # deprecated, but what the files are
                return dict(torch.jit.load(path, map_location="cpu").state_dict())  # type: ignore[no-untyped-call]
        # weights_only: nothing that a pickle names is run, only tensors are rebuilt.
        return _state_dict_in(torch.load(path, map_location="cpu", weights_only=True), path)
    except WeightsError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise WeightsError(
            f"{path} cannot be read as a CLIP checkpoint ({first_line}). Was its download cut short?"
        ) from error
    except Exception as error:  # pickle.UnpicklingError and whatever else a foreign file provokes
        raise WeightsError(
            f"{path} is no checkpoint that can be read safely ({type(error).__name__}). Expected is OpenAI's "
            f"TorchScript archive, or a plain state dict in .pt or .safetensors."
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself, or the one that training code keeps under ``state_dict`` or ``model``."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the ``module.`` that DataParallel puts before them."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def _check_shapes(model: Model, path: Path, visual: dict[str, Tensor]) -> None:
    expected = expected_shapes(model)
    found = {name: tuple(value.shape) for name, value in visual.items()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            has = f"has the shape {found[name]}" if name in found else "is missing"
            raise WeightsError(
                f"{path} is not a {model.name}: visual.{name} {has}, expected is {shape}. "
                f"{_guess(found)}Give the --model that the file was made for."
            )
    if extra := sorted(found.keys() - expected.keys()):
        raise WeightsError(
            f"{path} is not a {model.name}: it has {len(extra)} more parameters, such as visual.{extra[0]}. "
            f"{_guess(found)}Give the --model that the file was made for."
        )


def _guess(found: dict[str, tuple[int, ...]]) -> str:
    match = next((model.name for model in MODELS.values() if expected_shapes(model) == found), None)
    return f"By its shapes it is a {match}. " if match else ""


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every parameter of the image tower, under OpenAI's names less ``visual.``, and its shape."""
    width, patch = model.width, model.patch_size
    return {
        "class_embedding": (width,),
        "positional_embedding": (model.tokens + 1, width),
        "proj": (width, model.output_dim),
        "conv1.weight": (width, 3, patch, patch),
        **_norm("ln_pre", width),
        **transformer_shapes(width, model.layers),
        **_norm("ln_post", width),
    }


def transformer_shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a tower's residual blocks and their shapes; image and text tower name them alike."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            **_norm(f"{block}.ln_1", width),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
            **_norm(f"{block}.ln_2", width),
        }
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def is_half(name: str) -> bool:
    """Whether OpenAI's ``convert_weights`` stores this parameter as float16: all but norms and embeddings."""
    return not (".ln_" in f".{name}" or name.endswith(("_embedding", "token_embedding.weight", "logit_scale")))


def _round(name: str, value: Tensor) -> Tensor:
    return (value.half() if is_half(name) else value).float().contiguous()


def holds_halves(model: Model, checkpoint: Checkpoint) -> bool:
    """Whether rounding to float16 changes nothing, since the file holds nothing finer."""
    exact, rounded = (load_visual(model, checkpoint, rounding=rounding) for rounding in (False, True))
    return all(torch.equal(value, rounded[name]) for name, value in exact.items())


def resolve_activation(checkpoint: Checkpoint, asked: Any) -> Any:
    return asked or "quickgelu"
