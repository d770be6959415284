"""Tensors and storages as torch's pickles describe them, checked to lie within the file's bytes."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from patchbank.unpickling import (
    MOST_BYTES,
    MOST_INSTRUCTIONS,
    Budget,
    Function,
    Names,
    Opaque,
    interpret,
    refusals,
    short,
)

_MOST_DIMENSIONS = 8
_LONGEST = 100  # instructions of a storage's pickle

DTYPES = {  # by their storages' names
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


class Storage(NamedTuple):
    """The memory of one or several tensors.

    Attributes:
        dtype: of its numbers.
        key: its name in the file.
        location: the device it was saved from, and that ``pickle.load`` loads it to: ``cpu``, ``cuda:0``.
        numel: how many numbers it has.
        numbers: its bytes, if the pickle itself holds them.
    """

    dtype: torch.dtype
    key: str
    location: str
    numel: int
    numbers: memoryview | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


class View(NamedTuple):
    """A tensor as a pickle describes it. It lies within its storage, and has no more numbers than that."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool

    def of(self, numbers: Tensor) -> Tensor:
        """The tensor, in the memory of `numbers`: its storage's bytes, (nbytes,) uint8."""
        return numbers.view(self.storage.dtype).as_strided(self.size, self.stride, self.offset)


def storage_of(identifier: Any) -> Storage:
    """The storage of a persistent identifier: ``("storage", type, key, location, numel)``, and None in older files."""
    if type(identifier) is not tuple or len(identifier) not in (5, 6) or identifier[5:] not in ((), (None,)):
        raise ValueError("a storage of another form")
    kind, dtype, key, location, numel = identifier[:5]
    if isinstance(dtype, Opaque):
        raise ValueError(f"it holds a {short(dtype.name)}, not numbers in float32, bfloat16 or float16")
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or type(location) is not str:
        raise ValueError("a storage of another form or type")
    if type(numel) is not int or not 0 <= numel < 1 << 62 or location == "meta":
        raise ValueError("a storage of impossible size")
    return Storage(dtype, key, location, numel)


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> View:
    """``torch._utils._rebuild_tensor_v2``, for arguments that a file chose."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor that is not made of a storage")
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= _MOST_DIMENSIONS:
        raise ValueError("a tensor of impossible shape")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, *size, *stride)):
        raise ValueError("a tensor of impossible shape")
    if metadata:
        raise ValueError("a tensor that is a conjugate or negative view")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= storage.numel or math.prod(size) > storage.numel):
        raise ValueError("a tensor that is larger than its storage")
    return View(storage, offset, size, stride, requires_grad is True)


def _rebuild_parameter(data: Any, requires_grad: Any, *_: Any) -> View:
    """``torch._utils._rebuild_parameter``: a tensor again."""
    if not isinstance(data, View):
        raise ValueError("a parameter that is not made of a tensor")
    return data._replace(requires_grad=requires_grad is True)


TENSOR_NAMES: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor),
    "torch._utils._rebuild_parameter": Function(_rebuild_parameter),
    "collections.OrderedDict": Function(lambda: {}),
    **{f"{place}.{name}": dtype for place in ("torch", "torch.cuda") for name, dtype in DTYPES.items()},
}


def read_legacy(
    file: BinaryIO, names: Names, most: int = MOST_INSTRUCTIONS, most_bytes: int = MOST_BYTES
) -> tuple[Any, dict[str, int]]:
    """What `torch.save` wrote in its older form, and where each storage's numbers begin, by key.

    Five pickles (a magic number, a version, the machine's properties, the value, the storages' keys), then the count
    and the numbers of each storage (``torch.serialization._legacy_save``). Raises PickleError as `interpret` does.
    """
    storages: dict[str, Storage] = {}

    def keep(identifier: Any) -> Storage:
        storage = storage_of(identifier)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage of two types or sizes")
        return storage

    head = io.BytesIO(file.read(most_bytes))
    with refusals():
        magic, version, machine, value, keys = (interpret(head, names, keep, most) for _ in range(5))
        if (magic, version) != (MAGIC_NUMBER, PROTOCOL_VERSION) or machine.get("little_endian") is not True:
            raise ValueError("it is of another form or byte order than torch.save's")
        places: dict[str, int] = {}
        end = head.tell()
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise ValueError("a list of storages of another form")
        for key in keys:
            storage = storages.pop(key)
            file.seek(end)
            (written,) = struct.unpack("<q", file.read(8))
            if written != storage.numel:
                raise ValueError(f"a storage has {written:,} numbers, not {storage.numel:,}")
            places[key] = end + 8
            end += 8 + storage.nbytes
        if storages or file.seek(0, io.SEEK_END) != end:
            raise ValueError(f"its numbers should end at byte {end:,}, and it has {file.tell():,}")
    return value, places


def plain_names(size: int, bytes_of: Callable[[Any], Any] = lambda content: content) -> Names:
    """What a pickle of so many bytes may name that `pickle.dump` made: its tensors hold their own numbers.

    Args:
        bytes_of: gives the bytes of what stands for them.
    """
    made, loaded = Budget(size), Budget(size)

    def load(content: Any) -> Storage:
        storage = _load_storage(content := bytes_of(content))
        loaded.spend(len(content))
        return storage

    return {
        **TENSOR_NAMES,
        "torch.storage._load_from_bytes": Function(load),
        "_codecs.encode": Function(made.encode),
    }.get


def _load_storage(content: Any) -> Storage:
    """``torch.storage._load_from_bytes``: a storage by itself, in the older form of `torch.save`."""
    if type(content) is not bytes:
        raise ValueError("a storage that is not made of bytes")
    value, places = read_legacy(io.BytesIO(content), TENSOR_NAMES.get, _LONGEST)
    if not isinstance(value, Storage):
        raise ValueError("a storage of another form")
    first = places[value.key]
    return value._replace(numbers=memoryview(content)[first : first + value.nbytes])
