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
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from patchbank.errors import BankError

_LONGEST = 100  # instructions; a tensor's pickle has about fifty

_MOST_DIMENSIONS = 8

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
    """The tensor in a pickle, on the CPU, as `parse_pickle` finds it. Raises what that does, and BankError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return parse_pickle(content).tensor
    except BankError as error:
        raise type(error)(f"{path} is not the pickle of a tensor: {error}.") from None


def parse_pickle(content: bytes) -> PickledTensor:
    """The tensor in a pickle, whoever made it.

    Raises:
        UnsafePickleError: it names something that neither a tensor's pickle does nor other data that is known.
        BankError: it is cut short, or holds anything else.
    """
    if content.startswith(b"PK"):
        raise BankError("it is an archive of torch.save")
    try:
        _check(io.BytesIO(content), _INSTRUCTIONS)
        value = _TensorUnpickler(content).load()
        if type(value) is not _Rebuilt:
            raise BankError(f"it holds a {type(value).__name__}")
        storage = value.storage
        numbers = torch.frombuffer(bytearray(storage.numbers), dtype=storage.dtype)
        tensor = numbers.as_strided(value.size, value.stride, value.offset)
        return PickledTensor(tensor, storage.location, storage.numbers.nbytes, value.requires_grad)
    except (BankError, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile pickle can raise nearly anything
        raise BankError(str(error).strip().split("\n")[0].removesuffix(".") or type(error).__name__) from error


def _check(stream: io.BytesIO, admitted: frozenset[str]) -> None:
    """Look at one pickle's instructions without following them; leaves `stream` behind it."""
    foreign = None
    names = _Names()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        names.see(opcode.name, argument)
        if number >= _LONGEST:
            raise BankError(f"it is longer than any tensor's pickle{f', and uses {foreign}' if foreign else ''}")
        # The unpickler sets aside room for as many values as the greatest of these says.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and (argument or 0) > _LONGEST:
            raise BankError("it keeps values where no tensor's pickle does")
        if opcode.name not in admitted:
            foreign = foreign or opcode.name
    if foreign:
        raise BankError(f"it uses {foreign}, which no tensor's pickle does")


class _Names:
    """The functions that a pickle names, as far as its instructions tell without being followed.

    Raises UnsafePickleError on one that is not known to be harmless. It decides on words alone: a pickle that holds
    other data than a tensor is not opened either.
    """

    _KNOWN = re.compile(
        r"torch\.\w*Storage|torch\.cuda\.\w*Storage|torch\.storage\.\w+|torch\._utils\._rebuild_\w+|torch\.(Tensor|Size)"
        r"|torch\.nn\.parameter\.Parameter|collections\.OrderedDict|_codecs\.encode"
        r"|numpy(\._?core)?(\.multiarray)?\.(_reconstruct|scalar|ndarray|dtype)"
    )

    def __init__(self) -> None:
        self._strings: list[str] = []
        self._kept: dict[int, str] = {}

    def see(self, opcode: str, argument: Any) -> None:
        """Told of each instruction in turn."""
        if opcode.endswith("UNICODE"):
            self._strings.append(str(argument))
        elif opcode == "MEMOIZE":
            self._kept[len(self._kept)] = self._strings[-1] if self._strings else ""
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._kept[argument] = self._strings[-1] if self._strings else ""
        elif opcode in ("BINGET", "LONG_BINGET"):
            self._strings.append(self._kept.get(argument, ""))
        elif opcode in ("GLOBAL", "INST"):
            self._judge(str(argument).replace(" ", "."))
        elif opcode == "STACK_GLOBAL":
            self._judge(".".join(self._strings[-2:]))

    def _judge(self, name: str) -> None:
        if self._KNOWN.fullmatch(name) is None:
            raise UnsafePickleError(f"it names {name}, which no tensor's pickle does; nothing was run")


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
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= _MOST_DIMENSIONS:
        raise ValueError("a tensor of impossible shape")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *size, *stride)):
        raise ValueError("a tensor of impossible shape")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    count = storage.numbers.nbytes // storage.dtype.itemsize
    if 0 in size:
        raise ValueError("a tensor without numbers")
    if last >= count or math.prod(size) > count:
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


def _rebuild_parameter(data: Any, requires_grad: Any, *_: Any) -> _Rebuilt:
    """``torch._utils._rebuild_parameter``: a tensor again."""
    if not isinstance(data, _Rebuilt):
        raise ValueError("a parameter that is not made of a tensor")
    return data._replace(requires_grad=requires_grad is True)


class _TensorUnpickler(pickle.Unpickler):
    """Admits what the pickle of a tensor names, and no other global."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._left = len(content)  # bytes that may be made of texts: no more than there are
        self._admitted: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _Admitted(_rebuild_tensor),
            ("torch._utils", "_rebuild_parameter"): _Admitted(_rebuild_parameter),
            ("torch.storage", "_load_from_bytes"): _Admitted(_load_storage),
            ("collections", "OrderedDict"): _Admitted(lambda: None),  # the backward hooks that a feature has not
            ("_codecs", "encode"): _Admitted(self._encode),
        }

    def _encode(self, text: str, _: str) -> bytes:
        """How protocol 2 writes bytes."""
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("it makes more of its texts than there is")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise BankError(f"it holds a {module}.{name}, which is no tensor's") from None


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
        raise BankError(f"it holds a {module}.{name}, which is no tensor's")

    def persistent_load(self, pid: Any) -> Any:
        return pid
