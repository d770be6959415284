"""One tensor, one pickle: the files that EZ-HOI reads, as reproducible bytes.

``pickle.dump(tensor)`` writes the storage's memory address as its key, so that no two processes write the same bytes;
and it writes a view's whole storage. This module assembles the same structure with a fixed key around the tensor's own
numbers. Any torch unpickles it with plain ``pickle.load``.

A plan needs the size of such a file, and so the structure is made without torch.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchbank.files import open_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROTOCOL = 4  # the default of Python 3.8 to 3.13, which is what the original scripts wrote

# Of ``torch.serialization``: its older form, and what it writes about the machine (it reads only the byte order).
_MAGIC_NUMBER, _PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001
_SYSTEM = {
    "protocol_version": _PROTOCOL_VERSION,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def to_pickle(tensor: Tensor) -> tuple[bytes, memoryview, bytes]:
    """The pickle of a CPU tensor, in three consecutive pieces.

    Args:
        tensor: float32, float16 or bfloat16 on the CPU; copied only if it is not contiguous.
    """
    import torch

    head, tail = _frame(tuple(tensor.shape), _name(tensor.dtype))
    numbers: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return head, numbers.cast("B"), tail


def pickle_bytes(shape: tuple[int, ...], dtype: torch.dtype | str) -> int:
    """The size of such a pickle in bytes; the dtype may be its name."""
    head, tail = _frame(shape, _name(dtype))
    return len(head) + math.prod(shape) * _itemsize(_name(dtype)) + len(tail)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


class _Global(NamedTuple):
    """A global of a module that is not imported."""

    module: str
    name: str


class _Call(NamedTuple):
    """The call of a global function."""

    function: _Global
    arguments: tuple[Any, ...]


_InPython: Any = pickle._Pickler  # a subclass of it may write what it likes


class _Pickler(_InPython):  # type: ignore[misc]
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global) and self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        elif isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)
            return
        self.memoize(obj)


@lru_cache(maxsize=16)
def _frame(shape: tuple[int, ...], dtype: str) -> tuple[bytes, bytes]:
    """What precedes and follows the numbers in the pickle of every tensor of this shape and dtype."""
    size = math.prod(shape)
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    preamble = _legacy_preamble(_STORAGES[dtype], size)
    numbers = bytes(size * _itemsize(dtype))
    storage = _Call(_Global("torch.storage", "_load_from_bytes"), (preamble + numbers,))
    view: tuple[Any, ...] = (storage, 0, tuple(shape), strides, False, collections.OrderedDict())
    stream = io.BytesIO()
    _Pickler(stream, PROTOCOL).dump(_Call(_Global("torch._utils", "_rebuild_tensor_v2"), view))
    whole = stream.getvalue()
    start = whole.index(preamble) + len(preamble)
    return whole[:start], whole[start + len(numbers) :]


def _legacy_preamble(storage: str, size: int) -> bytes:
    """torch's serialisation of a CPU storage up to its numbers (``torch.serialization._legacy_save``).

    The storage's key is "0"; torch itself writes a memory address.
    """
    key, stream = "0", io.BytesIO()

    class Pickler(_Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", _Global("torch", storage), key, "cpu", size, None) if value is stream else None

    for value in (_MAGIC_NUMBER, _PROTOCOL_VERSION, _SYSTEM):
        pickle.dump(value, stream, protocol=2)
    Pickler(stream, 2).dump(stream)  # a stand-in for the storage
    pickle.dump([key], stream, protocol=2)
    stream.write(struct.pack("<q", size))
    return stream.getvalue()


def read_own(
    path: str, shape: tuple[int, ...], dtype: torch.dtype, into: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8] | None:
    """The numbers in a pickle that `to_pickle` wrote, as bytes, without unpickling; None if the file is anything else.

    They are read into `into`, or else into an array of their own.

    Raises OSError where the file cannot be read.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= (size := math.prod(shape) * dtype.itemsize):
            return None  # before anything of that size is made
        head, tail = _frame(shape, _name(dtype))
        numbers = np.empty(size, np.uint8) if into is None else into
        own = file.read(len(head)) == head and file.readinto(numbers.data) == size and file.read(len(tail) + 1) == tail
    return numbers if own else None
