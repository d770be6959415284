"""Pickles of a dict of numpy arrays: written by their instructions, and read without importing what they name.

An array is ``_reconstruct(ndarray, (0,), b"b")`` and then its state, ``(1, shape, dtype, False, bytes)``, as numpy
pickles one. Its names are those of numpy 1, which numpy 2 takes too.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from patchbank.files import open_regular
from patchbank.unpickling import (
    MOST_INSTRUCTIONS,
    Budget,
    Built,
    Function,
    Names,
    Opaque,
    PickleError,
    instructions,
    interpret,
    refusals,
    short,
)

DTYPES = {
    name: np.dtype(f"<{name}") for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
}
_LARGEST = 64 << 20  # bytes of one text or array that is read: features of 1,000 pairs have two million
_MOST_DIMENSIONS = 8

# Writing. The pickle keeps what every array needs in the first places of its memo, and then the dicts' keys.

_PROTOCOL = 3  # the first with bytes; each Python 3 reads it
_RECONSTRUCT, _EMPTY, _FLOAT16, _INT64, _NAMES = range(5)
_WRITTEN = {"float16": _FLOAT16, "int64": _INT64}


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _number(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _tuple(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _get(place: int) -> bytes:
    return pickle.BINGET + bytes([place])


def _dtype(name: str) -> bytes:
    made = _global("numpy", "dtype") + _tuple(_text(name), pickle.NEWFALSE, pickle.NEWTRUE) + pickle.REDUCE
    state = _number(3), _text("<"), *[pickle.NONE] * 3, _number(-1), _number(-1), _number(0)
    return made + _tuple(*state) + pickle.BUILD


def _array(values: NDArray[Any]) -> bytes:
    """float16 or int64 of any layout."""
    dtype, content = _WRITTEN[values.dtype.name], values.tobytes()
    shape = _tuple(*map(_number, values.shape))
    numbers = pickle.BINBYTES + struct.pack("<I", len(content)) + content
    state = _tuple(_number(1), shape, _get(dtype), pickle.NEWFALSE, numbers)
    return _get(_RECONSTRUCT) + _get(_EMPTY) + pickle.REDUCE + state + pickle.BUILD


def pickle_pieces(entries: Iterator[tuple[str, Mapping[str, NDArray[Any]]]], names: Sequence[str]) -> Iterator[bytes]:
    """The pickle of a dict of dicts of arrays, an entry at a time: the same bytes for the same entries.

    Args:
        entries: (key, arrays by name), float16 or int64; each of less than 2 GiB.
        names: of the arrays, at most 200.
    """
    empty = _global("numpy", "ndarray") + _tuple(_number(0)) + pickle.SHORT_BINBYTES + b"\1b"
    first = [_global("numpy.core.multiarray", "_reconstruct"), _tuple(empty), _dtype("f2"), _dtype("i8")]
    places = {name: _NAMES + number for number, name in enumerate(names)}
    kept = [*first, *map(_text, names)]
    yield pickle.PROTO + bytes([_PROTOCOL])
    yield b"".join(each + pickle.BINPUT + bytes([place]) + pickle.POP for place, each in enumerate(kept))
    yield pickle.EMPTY_DICT
    for key, arrays in entries:
        items = b"".join(_get(places[name]) + _array(values) for name, values in arrays.items())
        yield _text(key) + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.SETITEM
    yield pickle.STOP


# Reading. Arrays stay where they lie in the file.


class Array(Built):
    """An array of a pickle.

    Attributes:
        dtype: of its numbers, little-endian; None of one that got no state.
        shape: of any number of dimensions.
        order: of its numbers: "C", row by row; or "F", column by column.
        content: where its bytes begin in the file; or the bytes, of a pickle of protocol 0 to 2.
    """

    __slots__ = ("content", "dtype", "order", "shape")

    def __init__(self) -> None:
        self.dtype: np.dtype[Any] | None = None
        self.shape: tuple[int, ...] = ()
        self.order: Literal["C", "F"] = "C"
        self.content: int | bytes = b""

    def build(self, state: Any) -> None:
        """``ndarray.__setstate__``: (1, shape, dtype, in column-major order, bytes)."""
        if type(state) is not tuple or len(state) != 5:
            raise ValueError("an array of another form than numpy's")
        _, shape, dtype, columns, content = state
        self.fill(content, dtype, shape, "F" if columns else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> Array:
        """Take the state, if it is an array's. Raises ValueError."""
        if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS:
            raise ValueError("an array of impossible shape")
        if not all(type(each) is int and 0 <= each < 1 << 48 for each in shape):
            raise ValueError("an array of impossible shape")
        if not isinstance(dtype, _Dtype) or not isinstance(content, _Stretch | bytes):
            raise ValueError("an array of objects, or of another form than numpy's")
        if order not in ("C", "F"):
            raise ValueError("an array in an unknown order")
        count = content.count if isinstance(content, _Stretch) else len(content)
        if prod(shape) * dtype.dtype.itemsize != count:
            raise ValueError(f"an array of shape {shape} and dtype {dtype.dtype.name} in {count:,} bytes")
        self.dtype, self.shape, self.order = dtype.dtype, shape, order
        self.content = content.begin if isinstance(content, _Stretch) else content
        return self

    def __repr__(self) -> str:
        return f"an array {self.shape} of {self.dtype}"


class _Stretch:
    """Bytes of the file."""

    __slots__ = ("begin", "count")

    def __init__(self, content: bytes, begin: int) -> None:
        self.begin, self.count = begin, len(content)


class _Dtype(Built):
    """``numpy.dtype`` of one of `DTYPES`."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        if type(name) is not str or name not in DTYPES:
            raise ValueError(f"an array of dtype {name[:20] if type(name) is str else shown(name)}")
        self.dtype = DTYPES[name]

    def build(self, state: Any) -> None:
        """(version, byte order, ...)."""
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("an array in big-endian order")


_TYPE = Opaque("numpy.ndarray")
_NUMPY = {
    "multiarray._reconstruct": Function(lambda *_: Array()),
    "numeric._frombuffer": Function(lambda content, dtype, shape, order: Array().fill(content, dtype, shape, order)),
}
ARRAY_NAMES: dict[str, Any] = {
    **{f"numpy.{core}.{name}": value for core in ("core", "_core") for name, value in _NUMPY.items()},
    "numpy.ndarray": _TYPE,
    "numpy.dtype": Function(_Dtype),
    "collections.OrderedDict": Function(lambda: {}),
    "collections.defaultdict": Function(lambda _=None: {}),
    **{f"{builtins}.{name}": Opaque(name) for builtins in ("builtins", "__builtin__") for name in ("dict", "list")},
    "__builtin__.bytes": Function(lambda: b""),  # how protocols 0 to 2 write no bytes
}


class ArrayPickle:
    """A file with the pickle of a dict of arrays, open for reading. A context manager; threads may share it.

    Pickles of protocol 3 to 5 are read in little memory, however large they are; of older ones, an array's bytes stay
    in memory as long as the array does.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file: BufferedReader = open_regular(path)
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def scan(
        self,
        take: Callable[[str, Any], None],
        progress: Callable[[int, int], None] | None = None,
        names: Names | None = None,
    ) -> None:
        """Call `take` with each key that is a text, and its value: arrays as `Array`, unread values as `Opaque`.

        Args:
            progress: called with the bytes that were read, and all.
            names: what the pickle may name; None is `ARRAY_NAMES`, and texts as bytes.

        Raises:
            UnsafePickleError: the pickle names what no pickle of arrays names. Nothing was run.
            PickleError: it is damaged, or holds anything else than a dict.
        """
        progress = progress or (lambda *_: None)
        most = MOST_INSTRUCTIONS + self.size // 4

        def taken(items: list[Any]) -> None:
            if len(items) % 2:
                raise ValueError("it sets items of a value without any")
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is str:
                    take(key, value)
            progress(self.size // 2 + self._file.tell() // 2, self.size)

        with refusals():
            # First, what it takes from its memo: of the values that a pickle keeps, nearly all are never taken.
            kept: set[int] = set()
            for number, (opcode, argument, place) in enumerate(instructions(self._begin())):
                if number > most:
                    raise PickleError("it is longer than any pickle of arrays")
                if opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                    kept.add(argument)
                if not number % 100_000:
                    progress(place // 2, self.size)
            names = names or {**ARRAY_NAMES, "_codecs.encode": Function(Budget(self.size).encode)}.get
            value = interpret(self._begin(), names, _no_storage, most, placed=_Stretch, kept=kept, take=taken)
            progress(self.size, self.size)
            if type(value) is not dict:
                raise PickleError(f"it holds {shown(value)}, and not a dict of images")

    def read(self, array: Array, row: int | None = None) -> NDArray[Any]:
        """An array's numbers, or those of one of its rows; the caller's own. Raises OSError, PickleError."""
        assert array.dtype is not None
        shape, size = array.shape if row is None else array.shape[1:], array.dtype.itemsize
        count = prod(shape)
        if row is None or array.order == "C":
            parts = [((row or 0) * count, count)]
        else:
            parts = [(row + array.shape[0] * place, 1) for place in range(count)]
        held = array.content
        content = b"".join(
            held[first * size : (first + some) * size]
            if isinstance(held, bytes)
            else self._read(held + first * size, some * size)
            for first, some in parts
        )
        return np.frombuffer(content, array.dtype).reshape(shape, order=array.order).copy()

    def bytes_of(self, content: Any) -> Any:
        """The bytes of what stands for them in a pickle's value; any other value as it is. Raises as `read`."""
        return self._read(content.begin, content.count) if isinstance(content, _Stretch) else content

    def _read(self, begin: int, count: int) -> bytes:
        content = os.pread(self._file.fileno(), count, begin)
        if len(content) != count:
            raise PickleError("it is shorter than it was")
        return content

    def _begin(self) -> _Bounded:
        self._file.seek(0)
        return _Bounded(self._file)


class _Bounded:
    """A file of which no long text or line is read, whatever the pickle says of their length."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self.tell = file, file.tell

    def read(self, size: int) -> bytes:
        if size > _LARGEST:
            raise PickleError(f"it ends early, or holds a value of {size:,} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._file.readline(_LARGEST)


def _no_storage(_: Any) -> Any:
    raise PickleError("it refers to values outside of itself, as torch.save does")


def shown(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Opaque):
        return f"a {short(value.name)}"
    return repr(value) if isinstance(value, Array) else f"a {type(value).__name__}"
