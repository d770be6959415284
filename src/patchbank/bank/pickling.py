"""One tensor, one pickle: the files that EZ-HOI reads, as reproducible bytes.

``pickle.dump(tensor)`` writes the storage's memory address as its key, so that no two processes write the same bytes;
and it writes a view's whole storage. This module assembles the same structure with a fixed key around the tensor's own
numbers. Any torch unpickles it with plain ``pickle.load``.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from patchbank.files import open_regular
from patchbank.torch_pickles import DTYPES

PROTOCOL = 4  # the default of Python 3.8 to 3.13, which is what the original scripts wrote

_STORAGES = {dtype: name for name, dtype in DTYPES.items()}
# What torch writes about the machine; it reads only the byte order.
_SYSTEM = {
    "protocol_version": PROTOCOL_VERSION,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def to_pickle(tensor: Tensor) -> tuple[bytes, memoryview, bytes]:
    """The pickle of a CPU tensor, in three consecutive pieces.

    Args:
        tensor: float32, float16 or bfloat16 on the CPU; copied only if it is not contiguous.
    """
    head, tail = _frame(tuple(tensor.shape), tensor.dtype)
    numbers: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return head, numbers.cast("B"), tail


def pickle_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The size of such a pickle in bytes."""
    head, tail = _frame(shape, dtype)
    return len(head) + torch.Size(shape).numel() * dtype.itemsize + len(tail)


class _Call:
    """Pickles as the call of a global function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


@lru_cache(maxsize=16)
def _frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What precedes and follows the numbers in the pickle of every tensor of this shape and dtype."""
    size = torch.Size(shape).numel()
    strides = torch.empty(shape, device="meta").stride()
    preamble = _legacy_preamble(_STORAGES[dtype], size)
    numbers = bytes(size * dtype.itemsize)
    whole = pickle.dumps(
        _Call(
            torch._utils._rebuild_tensor_v2,
            _Call(torch.storage._load_from_bytes, preamble + numbers),
            *(0, tuple(shape), strides, False, collections.OrderedDict()),
        ),
        protocol=PROTOCOL,
    )
    start = whole.index(preamble) + len(preamble)
    return whole[:start], whole[start + len(numbers) :]


def _legacy_preamble(storage: str, size: int) -> bytes:
    """torch's serialisation of a CPU storage up to its numbers (``torch.serialization._legacy_save``).

    The storage's key is "0"; torch itself writes a memory address.
    """
    key, stream = "0", io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", getattr(torch, storage), key, "cpu", size, None) if value is stream else None

    for value in (MAGIC_NUMBER, PROTOCOL_VERSION, _SYSTEM):
        pickle.dump(value, stream, protocol=2)
    Pickler(stream, protocol=2).dump(stream)  # a stand-in for the storage
    pickle.dump([key], stream, protocol=2)
    stream.write(struct.pack("<q", size))
    return stream.getvalue()


def read_own(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> NDArray[np.uint8] | None:
    """The numbers in a pickle that `to_pickle` wrote, as bytes, without unpickling; None if the file is anything else.

    Raises OSError where the file cannot be read.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= (size := math.prod(shape) * dtype.itemsize):
            return None  # before anything of that size is made
        head, tail = _frame(shape, dtype)
        numbers = np.empty(size, np.uint8)
        own = file.read(len(head)) == head and file.readinto(numbers.data) == size and file.read(len(tail) + 1) == tail
    return numbers if own else None
