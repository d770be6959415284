"""One tensor, one pickle: the files EZ-HOI reads, as reproducible bytes, and read without running what they name.

``pickle.dump(tensor)`` writes the storage's memory address as its key, so that no two processes write the same
bytes; and of a view it writes the whole storage. Here the same structure is assembled with a fixed key around the
tensor's own numbers. Any torch unpickles it with plain ``pickle.load``.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from patchbank.errors import BankError

PROTOCOL = 4  # the default of Python 3.8 to 3.13, which is what the original scripts wrote

_STORAGES: dict[torch.dtype, str] = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
}
_MAGIC = pickle.dumps(MAGIC_NUMBER, protocol=2)
# What torch writes of the machine; it reads only the byte order.
_SYSTEM = {
    "protocol_version": PROTOCOL_VERSION,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def to_pickle(tensor: Tensor) -> tuple[bytes, memoryview, bytes]:
    """The pickle of a CPU tensor, in three parts to be written one after the other.

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
    """What stands before and behind the numbers in the pickle of every tensor of this shape and dtype."""
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


def read_own(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The tensor in a pickle that `to_pickle` wrote, with no unpickling; None where the file is anything else.

    Raises OSError where the file cannot be read.
    """
    head, tail = _frame(shape, dtype)
    tensor = torch.empty(shape, dtype=dtype)
    numbers = memoryview(tensor.view(torch.uint8).numpy().data).cast("B")
    with open(path, "rb") as file:
        own = file.read(len(head)) == head and file.readinto(numbers) == len(numbers) and file.read() == tail
    return tensor if own else None


def _load_storage(content: bytes) -> Any:
    # What torch pickles of a storage has this form; its other one is a zip archive, of which a few bytes may swell.
    if not isinstance(content, bytes) or not content.startswith(_MAGIC):
        raise pickle.UnpicklingError("a storage in a form that no tensor's pickle has")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """``torch._utils._rebuild_tensor_v2``, for arguments that somebody else chose."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor that is not made of a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    held, dtype = storage._untyped_storage, storage.dtype
    count = held.nbytes() // dtype.itemsize
    if 0 in size or last >= count or math.prod(size) > count:
        raise pickle.UnpicklingError("a tensor that is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(held, offset, size, stride)


class _Admitted:
    """A function that a pickle may call, and whose attributes it cannot set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes what it was given")


class _TensorUnpickler(pickle.Unpickler):
    """Admits what the pickle of a tensor names, and no other global."""

    _ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _Admitted(_rebuild_tensor),
        ("torch.storage", "_load_from_bytes"): _Admitted(_load_storage),
        ("collections", "OrderedDict"): _Admitted(lambda: None),  # the backward hooks that a feature has not
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no tensor's pickle does; nothing was run"
            ) from None


def read_pickle(path: Path) -> Tensor:
    """The tensor in a pickle, on the CPU. Runs nothing that the file names beyond the rebuilding of a tensor.

    Raises BankError where the file cannot be read or holds anything else.
    """
    try:
        # From memory: a file cannot then make the unpickler set aside more than it has itself.
        value = _TensorUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BankError(f"{path} is not the pickle of a tensor: {reason}.") from error
    if type(value) is not Tensor:
        raise BankError(f"{path} holds a {type(value).__name__}, not a tensor.")
    return value
