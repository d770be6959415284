"""Features as they are stored: the dtypes, and int8 with one scale for each token.

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
from patchbank.features import Output

if TYPE_CHECKING:
    from torch import Tensor

_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE = ".scale"  # added to an int8 output's name

_MOST_A_PART = 100_000  # samples: readers hold a part's keys in memory, and tars leave as much room between them


class NotFiniteError(PatchbankError):
    """Features that hold NaN or Inf, or would in their stored dtype."""


class Field(NamedTuple):
    """One of the tensors that are stored of every sample.

    Attributes:
        name: an output's, or an int8 output's with `SCALE`.
        dtype: torch's name of it.
        shape: of one sample.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def fields(outputs: Mapping[str, Output]) -> tuple[Field, ...]:
    """What is stored of each sample, in the file's order: wider dtypes come first."""
    found = []
    for name, output in outputs.items():
        if output.dtype == "int8":
            found.append(Field(name + SCALE, "float32", output.shape[:1]))
        found.append(Field(name, output.dtype, output.shape))
    return tuple(sorted(found, key=lambda field: -ITEM_BYTES[field.dtype]))


def sample_bytes(outputs: Mapping[str, Output]) -> int:
    """Bytes of one sample's features."""
    return sum(field.nbytes for field in fields(outputs))


def samples_a_shard(outputs: Mapping[str, Output], shard_size: int) -> int:
    """How many samples' features take approximately `shard_size` bytes."""
    return max(1, min(_MOST_A_PART, shard_size // sample_bytes(outputs)))


def pack(manifest: Manifest, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One sample's features as the bank stores them, by field; each is contiguous and owns its storage.

    Args:
        values: each of the bank's outputs on the CPU, of any float dtype; others are ignored.

    Raises:
        NotFiniteError: they hold NaN or Inf, or exceed the stored dtype.
        ValueError: an output is missing, or its shape is not the bank's.
    """
    import torch

    packed: dict[str, Tensor] = {}
    for name, output in manifest.outputs.items():
        value = values.get(name)
        if value is None or tuple(value.shape) != output.shape:
            raise ValueError(f"{name} must be {output.shape}, not {None if value is None else tuple(value.shape)}")
        if output.dtype == "int8":
            packed[name + SCALE], packed[name] = quantise(value)
            checked = packed[name + SCALE]
        else:
            checked = packed[name] = _copy(value.to(getattr(torch, output.dtype)))
        if not _finite(checked):
            raise NotFiniteError(f"the features are not finite numbers, or too large for {output.dtype}")
    return {field.name: packed[field.name] for field in fields(manifest.outputs)}


def _bits(tensor: Tensor) -> NDArray[np.signedinteger[Any]]:
    """A float tensor's numbers as integers of the same bits, since numpy has no bfloat16.

    numpy starts no threads; torch would start some for each of several writing threads, which then wait for each other.
    """
    import torch

    whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    bits: NDArray[np.signedinteger[Any]] = tensor.contiguous().view(whole).numpy()
    return bits


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy of a float tensor, with a storage of its own."""
    import torch

    return torch.from_numpy(_bits(tensor).copy()).view(tensor.dtype)


def _finite(tensor: Tensor) -> bool:
    """Whether no number's exponent is all ones, as those of NaN and Inf are."""
    exponent = _EXPONENTS[str(tensor.dtype).removeprefix("torch.")]
    return not bool((_bits(tensor) & exponent == exponent).any())


def unpack(output: Output, name: str, numbers: Mapping[str, NDArray[np.uint8]], out: Tensor) -> None:
    """Fill `out`, (count, ...) of any float dtype, with an output of `count` samples from its fields' bytes.

    Numbers of int8 are multiplied by their scales in float32.
    """
    import torch

    value = torch.from_numpy(numbers[name]).view(getattr(torch, output.dtype)).view(out.shape)
    if output.dtype == "int8":
        scale = torch.from_numpy(numbers[name + SCALE]).view(torch.float32).view(*out.shape[:-1], 1)
        value = (out.copy_(value) if out.dtype == torch.float32 else value.float()).mul_(scale)
    out.copy_(value)  # of a tensor to itself: nothing


def quantise(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) float tokens to their scales, (N,) float32, and numbers, (N, D) int8 within -127 to 127."""
    import torch

    numbers = tokens.float().numpy()
    scale = np.abs(numbers).max(axis=-1) / np.float32(127)
    rounded = ((scale.view(np.int32) + 0xFF) & ~0xFF).view(np.float32)
    scale = np.where(np.isfinite(scale), rounded, np.float32(np.nan))
    divisor = np.where(scale > 0, scale, np.float32(1))[:, None]
    with np.errstate(invalid="ignore"):  # the scale of what is not finite is not finite: the caller checks it
        return torch.from_numpy(scale), torch.from_numpy(np.rint(numbers / divisor).astype(np.int8))


def memory(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes."""
    import torch

    return tensor.view(torch.uint8).numpy().data.cast("B")
