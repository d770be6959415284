"""Files of weights, of any family: their names and tensors as data. Nothing in a file runs.

Only what reads tensors imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.errors import WeightsError, printable
from patchbank.files import LFS_POINTER, open_regular, sha256_of_chunks

if TYPE_CHECKING:
    from torch import Tensor

COUNT = "num_batches_tracked"  # how the names of a batch norm's counts end: whole numbers
_PIECE = 16 << 20  # bytes
_DTYPES = frozenset({"float32", "bfloat16", "float16", "float64"})


def sha256_of_weights(path: Path) -> str:
    """The SHA-256 of a file's content. Raises WeightsError if there is no such file, or it cannot be read."""
    if path.is_dir():
        raise WeightsError(f"{path} is a directory. Give --weights a file; only transformers' models take a directory.")
    if not path.is_file():
        raise WeightsError(f"There is no checkpoint {path}. Give --weights an existing file.")
    try:
        status = path.stat()
        return _sha256_of_version(path.absolute(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise WeightsError(f"The checkpoint {path} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=16)
def _sha256_of_version(path: Path, _size: int, _modified: int) -> str:
    """Cached, since one run may plan several banks with the same large file.

    In large pieces: after each, Python's lock may be with an import in another thread for a while.
    """
    piece = memoryview(bytearray(_PIECE))
    with open_regular(path) as file:
        return sha256_of_chunks(piece[:count] for count in iter(partial(file.readinto, piece), 0))


def refuse_pointer(path: Path) -> None:
    """Raise WeightsError if a file is what Git LFS leaves in the place of a large one."""
    with open_regular(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WeightsError(f"{path} is a Git LFS pointer, not the weights: git lfs pull fetches them.")


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """The names and shapes in a file, and a function that reads a tensor as it is stored.

    Reads ``.safetensors``, ``torch.save``'s state dicts, also within a training checkpoint, and TorchScript archives.

    Raises WeightsError if it is none of these, a part of one, or holds no tensors.
    """
    from safetensors import SafetensorError, safe_open

    from patchbank.encoders.archive import Archive

    try:
        refuse_pointer(path)
        if is_safetensors(path):
            with safe_open(path, "pt") as file:
                # A tensor of safetensors is mapped from the file, and would change with it.
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                yield _checked(path, shapes), lambda name: file.get_tensor(name).clone()
        else:
            with Archive(path) as archive:
                yield _checked(path, archive.shapes()), archive.get_tensor
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a checkpoint ({error}). Was its download cut short?") from error


def is_safetensors(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".safetensors"


def _checked(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same. Raises WeightsError if there are no tensors, or one has a shape or a name that no model's has."""
    if not shapes:
        raise WeightsError(f"{path} holds no tensors: give a file of weights.")
    for name, shape in shapes.items():
        if not name.isprintable() or prod(max(1, side) for side in shape) >> 60:  # an empty one too
            raise WeightsError(f"{path} is damaged: it has a tensor {printable(name)} of the shape {shape}.")
    return shapes


def read_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, as `opened` reads them: name -> tensor on the CPU. Raises WeightsError."""
    with opened(path) as (shapes, tensor):
        return {name: tensor(name) for name in shapes}


def as_float32(path: Path, name: str, value: Tensor) -> Tensor:
    """A parameter as float32. Raises WeightsError if it is quantised, or a number is not finite."""
    if (dtype := str(value.dtype).removeprefix("torch.")) not in _DTYPES:
        raise WeightsError(
            f"{path}: {name} holds {dtype} numbers. Use a checkpoint that is "
            "not quantised: in float32, bfloat16 or float16."
        )
    made = value.float()
    if not made.is_meta and not all_finite(made):
        raise WeightsError(
            f"{path} is damaged: {name} holds NaN or Inf, or a number too large for float32. Use another checkpoint."
        )
    return made


def all_finite(value: Tensor) -> bool:
    """Whether all numbers are finite. One that is not makes their sum so: most tensors are read once."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def first_wrong(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], prefix: str = "") -> str:
    """The first parameter that is not a model's, of names after a prefix; empty if there is none."""
    for name, shape in expected.items():
        if found.get(name) != shape:
            has = f"has the shape {found[name]}, expected {shape}" if name in found else "is missing"
            return f"{prefix}{name} {has}"
    more = sorted(found.keys() - expected.keys())
    return f"it has {len(more)} more parameters, such as {prefix}{more[0]}" if more else ""


def guess(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file probably is, by its names, and what to do."""
    if any("embeddings.patch_embedding" in name for name in shapes):
        return "By its names it is a model of transformers: give --model transformers/ORG/NAME."
    if any(name.startswith(("visual.", "module.visual.")) for name in shapes):
        return "By its names it is a CLIP: give its --model open_clip/ARCH, or a CLIP model of OpenAI's."
    patch = next((x for name, x in shapes.items() if name.endswith("patch_embed.proj.weight") and len(x) == 4), None)
    if patch is None:
        return f"Its first parameters are {', '.join(list(shapes)[:3]) or 'none'}: give the --model it was made for."
    blocks = {match[1] for name in shapes if (match := re.search(r"blocks\.(\d+)\.", name))}
    return (
        f"By its shapes it is a vision transformer with patches of {patch[-1]}, tokens of {patch[0]} and "
        f"{len(blocks)} blocks. Give the --model that it was made for."
    )
