"""Tokens as they are stored: the dtypes, and int8 with one scale a token.

A token x is stored as int8 numbers q and the scale s of its largest component, q = round(x / s), s = max|x| / 127. The
scale is rounded up to 16 significant bits: then 127 s is exact in float32, and so is what is read back quantised again,
so that int8 -> float32 -> int8 gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.manifest import Manifest
from patchbank.errors import PatchbankError
from patchbank.files import sha256_of_chunks

if TYPE_CHECKING:
    from torch import Tensor

_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

_MOST_A_SHARD = 100_000  # images: readers hold a shard's keys in memory, and tars leave that much room between them


class NotFiniteError(PatchbankError):
    """Features that hold NaN or Inf, or would in the dtype they are to be stored in."""


class Field(NamedTuple):
    """One of the tensors that are stored of every image.

    Attributes:
        name: ``scale``, ``cls``, ``patch_tokens``.
        dtype: torch's name of it.
        shape: of one image's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one image's."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def fields(manifest: Manifest) -> tuple[Field, ...]:
    """What is stored of each image of a bank, in the order it lies in: no dtype stands behind a smaller one."""
    dtype, dim = manifest.dtype, manifest.dim
    scale = (Field("scale", "float32", manifest.shape[:1]),) if dtype == "int8" else ()
    # [CLS] is a feature by itself, and small: int8 would save nothing on it.
    cls = (Field("cls", "float16" if dtype == "int8" else dtype, (dim,)),) if manifest.cls else ()
    return (*scale, *cls, Field("patch_tokens", dtype, manifest.shape))


def image_bytes(manifest: Manifest) -> int:
    """Bytes of one image's features."""
    return sum(field.nbytes for field in fields(manifest))


def images_a_shard(manifest: Manifest, shard_size: int) -> int:
    """How many images' features take about so many bytes."""
    return max(1, min(_MOST_A_SHARD, shard_size // image_bytes(manifest)))


def pack(manifest: Manifest, tokens: Tensor, cls: Tensor | None) -> dict[str, Tensor]:
    """One image's features as the bank stores them, by field; each is contiguous and owns its storage.

    Args:
        tokens: (N, D) on the CPU, of any float dtype.
        cls: (D,) likewise; None where the bank stores none.

    Raises:
        NotFiniteError: there is NaN or Inf among them, or the stored dtype cannot hold them.
        ValueError: a shape is not the bank's.
    """
    import torch

    given = {"patch_tokens": tokens, "cls": cls}
    packed: dict[str, Tensor] = {}
    for name, dtype, shape in fields(manifest):
        value = given.get(name)
        if name in given and (value is None or tuple(value.shape) != shape):
            raise ValueError(f"{name} must be {shape}, not {None if value is None else tuple(value.shape)}")
        if name == "scale":
            packed["scale"], packed["patch_tokens"] = quantise(tokens)
        elif value is not None and name not in packed:
            packed[name] = _copy(value.to(getattr(torch, dtype)))
        if packed[name].is_floating_point() and not _finite(packed[name]):
            raise NotFiniteError(f"the features are not finite numbers, or too large for {dtype}")
    return packed


def _bits(tensor: Tensor) -> NDArray[np.signedinteger[Any]]:
    """A float tensor's numbers as whole ones of the same bits: numpy has no bfloat16.

    And no threads: torch would wake a team of them for each of several writing threads, and where cores are busy, those
    wait for each other far longer than this takes.
    """
    import torch

    whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    bits: NDArray[np.signedinteger[Any]] = tensor.contiguous().view(whole).numpy()
    return bits


def _copy(tensor: Tensor) -> Tensor:
    """Of a float tensor: contiguous, with a storage of its own."""
    import torch

    return torch.from_numpy(_bits(tensor).copy()).view(tensor.dtype)


def _finite(tensor: Tensor) -> bool:
    """Whether no number's exponent is all ones, as those of NaN and Inf are."""
    exponent = _EXPONENTS[str(tensor.dtype).removeprefix("torch.")]
    return not bool((_bits(tensor) & exponent == exponent).any())


def dequantise(numbers: Tensor, scale: Tensor) -> Tensor:
    """(N, D) int8 and its (N,) scales to the float32 tokens that they stand for."""
    return numbers.float().mul_(scale.unsqueeze(-1))


def quantise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) float tokens to their scales, (N,) float32, and numbers, (N, D) int8 within -127 to 127."""
    import torch

    numbers = tokens.float().numpy()
    scale = np.abs(numbers).max(axis=-1) / np.float32(127)
    rounded = ((scale.view(np.int32) + 0xFF) & ~0xFF).view(np.float32)
    scale = np.where(np.isfinite(scale), rounded, np.float32(np.nan))
    divisor = np.where(scale > 0, scale, np.float32(1))[:, None]
    with np.errstate(invalid="ignore"):  # of what is not finite the scale is not either: the caller looks at that
        return torch.from_numpy(scale), torch.from_numpy(np.rint(numbers / divisor).astype(np.int8))


def checksum(packed: Mapping[str, memoryview]) -> str:
    """The SHA-256 of the bytes of one image's features as they are stored; fields in the order of `fields`."""
    return sha256_of_chunks(packed[name] for name in ("scale", "cls", "patch_tokens") if name in packed)


def memory(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes."""
    import torch

    return tensor.view(torch.uint8).numpy().data.cast("B")
