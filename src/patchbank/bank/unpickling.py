"""Reading anybody's pickle of a tensor, and running nothing that it names.

A pickle is a program for a small machine. The pickle of a tensor uses few of that machine's instructions and names few
functions; a file that holds any other is refused before it is run. What it does name is not torch's own either, but the
few lines below, which take the numbers out of it and remember what a reader should know: the device they were saved
from, and how much of their storage they are.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from patchbank.errors import BankError

_LONGEST = 100  # instructions; a tensor's pickle has about fifty

_INSTRUCTIONS = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
        *("MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "NONE", "NEWTRUE", "NEWFALSE"),
        *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("BININT", "BININT1", "BININT2", "LONG1"),
        *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    }
)
_STORAGE_INSTRUCTIONS = _INSTRUCTIONS | {
    "BINPERSID",
    *("EMPTY_DICT", "SETITEM", "SETITEMS"),  # a description of the machine
    *("EMPTY_LIST", "APPEND", "APPENDS"),  # the list of the storages' keys
}

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class UnsafePickleError(BankError):
    """A pickle that would do something else than give a tensor. It was not run."""


class PickledTensor(NamedTuple):
    """A tensor as a pickle holds it.

    Attributes:
        tensor: on the CPU, with the strides it was saved with; it shares no memory with anything else.
        location: the device it was saved from, and goes back to with plain ``pickle.load``: ``cpu``, ``cuda:0``.
        storage_bytes: of the storage it is (a part of).
        requires_grad: whether it asks for gradients.
    """

    tensor: Tensor
    location: str
    storage_bytes: int
    requires_grad: bool


class _Storage(NamedTuple):
    dtype: torch.dtype
    location: str
    numbers: memoryview


class _Rebuilt(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


def read_pickle(path: Path) -> Tensor:
    """The tensor in a pickle, on the CPU, as `inspect_pickle` finds it. Raises what that does."""
    return inspect_pickle(path).tensor


def inspect_pickle(path: Path) -> PickledTensor:
    """Read a pickle of a tensor, whoever made it.

    Raises:
        UnsafePickleError: it names something that no tensor's pickle does.
        BankError: it cannot be read, is cut short, or holds anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        stream = io.BytesIO(content)
        _check(stream, _INSTRUCTIONS)
        value = _TensorUnpickler(io.BytesIO(content)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} is not the pickle of a tensor: {error}; nothing was run.") from None
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BankError(f"{path} is not the pickle of a tensor: {reason}.") from error
    if type(value) is not _Rebuilt:
        raise BankError(f"{path} holds a {type(value).__name__}, not a tensor.")
    storage = value.storage
    numbers = torch.frombuffer(bytearray(storage.numbers), dtype=storage.dtype)
    tensor = numbers.as_strided(value.size, value.stride, value.offset)
    return PickledTensor(tensor, storage.location, storage.numbers.nbytes, value.requires_grad)


def _check(stream: io.BytesIO, admitted: frozenset[str]) -> None:
    """Look at one pickle's instructions without following them; leaves `stream` behind it."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name not in admitted:
            raise UnsafePickleError(f"it uses {opcode.name}, which no tensor's pickle does")
        if number >= _LONGEST:
            raise UnsafePickleError("it is longer than any tensor's pickle")
        # The unpickler sets aside room for as many values as the greatest of these says.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > _LONGEST:
            raise UnsafePickleError("it keeps values where no tensor's pickle does")


class _Admitted:
    """A function that a pickle may call; it has no attributes that a pickle could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], requires_grad: Any = False, *_: Any
) -> _Rebuilt:
    """``torch._utils._rebuild_tensor_v2``, for arguments that somebody else chose."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor that is not made of a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor of impossible shape")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    count = storage.numbers.nbytes // storage.dtype.itemsize
    if 0 in size or last >= count or math.prod(size) > count:
        raise ValueError("a tensor that is larger than its storage")
    return _Rebuilt(storage, offset, size, stride, requires_grad is True)


def _load_storage(content: bytes) -> _Storage:
    """``torch.storage._load_from_bytes`` of what `torch.save` writes of a storage in its older form.

    Five pickles (a magic number, a version, the machine's properties, the storage's description, the list of the keys)
    and then the count of numbers and the numbers (``torch.serialization._legacy_save``).
    """
    if not isinstance(content, bytes):
        raise ValueError("a storage that is not made of bytes")
    stream = io.BytesIO(content)
    unpickler = _StorageUnpickler
    magic, version, machine, storage, keys = (unpickler.next(stream) for _ in range(5))
    if (magic, version) != (MAGIC_NUMBER, PROTOCOL_VERSION) or machine.get("little_endian") is not True:
        raise ValueError("a storage in a form that no tensor's pickle has")
    if type(storage) is not tuple or len(storage) != 6 or storage[0] != "storage" or storage[5] is not None:
        raise ValueError("a storage in a form that no tensor's pickle has")
    _, dtype, key, location, count, _ = storage
    if not isinstance(dtype, torch.dtype) or type(location) is not str or keys != [key]:
        raise ValueError("a storage in a form that no tensor's pickle has")
    (written,) = struct.unpack("<q", stream.read(8))
    numbers = memoryview(content)[stream.tell() :]
    if written != count or numbers.nbytes != count * dtype.itemsize:
        raise ValueError(f"its storage has {numbers.nbytes:,} bytes for {count:,} numbers of {dtype.itemsize}")
    return _Storage(dtype, location, numbers)


class _TensorUnpickler(pickle.Unpickler):
    """Admits what the pickle of a tensor names, and no other global."""

    _ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _Admitted(_rebuild_tensor),
        ("torch.storage", "_load_from_bytes"): _Admitted(_load_storage),
        ("collections", "OrderedDict"): _Admitted(lambda: None),  # the backward hooks that a feature has not
        # How protocol 2 writes bytes.
        ("_codecs", "encode"): _Admitted(lambda text, _: text.encode("latin1")),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise UnsafePickleError(f"it names {module}.{name}, which no tensor's pickle does") from None


class _StorageUnpickler(pickle.Unpickler):
    """Admits the names of storages' types, which it turns into dtypes."""

    @classmethod
    def next(cls, stream: io.BytesIO) -> Any:
        """What the pickle that begins here holds; leaves `stream` behind it."""
        begin = stream.tell()
        _check(stream, _STORAGE_INSTRUCTIONS)
        return cls(io.BytesIO(stream.getvalue()[begin : stream.tell()])).load()

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in _DTYPES:
            return _DTYPES[name]
        raise UnsafePickleError(f"it names {module}.{name}, which no tensor's pickle does")

    def persistent_load(self, pid: Any) -> Any:
        return pid
