"""Reads pickles as data: nothing that a pickle names is imported or run.

A pickle is a program for a small machine. `interpret` follows its instructions on values of its own. The caller says
what a name stands for; an unknown one ends the reading. Dicts keep only keys that are texts, so that no value chosen by
a file is hashed, compared or called.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from patchbank.errors import PatchbankError, printable

# Limits for a pickle that describes tensors. A large training checkpoint's has a twentieth of this.
MOST_BYTES = 8 << 20
MOST_INSTRUCTIONS = 1 << 20

# Names of common data that is not read here. They make a value `Opaque`, and the file not unsafe.
_HARMLESS = re.compile(
    r"torch\.\w*Storage|torch\.cuda\.\w*Storage|torch\.storage\.\w+|torch\._utils\._rebuild_\w+|torch\.(Tensor|Size)"
    r"|torch\.serialization\._get_layout|torch\.(device|bool|b?float\d+|u?int\d+)|torch\.jit\._pickle\.\w+|torch\.nn\.parameter\.Parameter"
    r"|collections\.OrderedDict|_codecs\.encode|numpy(\._?core)?(\.multiarray|\.numeric)?\.(_reconstruct|_frombuffer|scalar|ndarray|dtype)"
)

_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "SHORT_BINSTRING", "BINSTRING"),
    }
)
_BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(PatchbankError):
    """A pickle that is cut short, or holds something that its reader does not take."""


class UnsafePickleError(PickleError):
    """A pickle that names what no pickle of tensors names. Nothing was run."""


class Opaque(NamedTuple):
    """A value of a harmless kind that is not read: a numpy array, a sparse tensor, a device."""

    name: str


class Built(ABC):
    """An object that a pickle makes first, and then gives a state."""

    __slots__ = ()

    @abstractmethod
    def build(self, state: Any) -> None:
        """Take the state. Raises ValueError or PickleError."""


class Module(Built):
    """An object of a TorchScript class: the class's name and the object's attributes, which nothing acts on."""

    __slots__ = ("attributes", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.attributes: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes."""
        if type(state) is not dict:
            raise PickleError(f"{short(self.name)} restores itself by code of its own, which is not run")
        self.attributes = state


class Function(NamedTuple):
    """What a name stands for where a pickle calls it."""

    call: Callable[..., Any]


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes."""

    def readline(self) -> bytes:
        """A line, with its end."""

    def tell(self) -> int:
        """The position."""


class Budget:
    """Bytes that a pickle may make of its values: as many as its file has, though it uses one value many times."""

    def __init__(self, size: int) -> None:
        self._left = size

    def spend(self, count: int) -> None:
        """Raises ValueError if it makes too many."""
        self._left -= count
        if self._left < 0:
            raise ValueError("it makes more bytes of its texts than it has")

    def encode(self, text: Any, coding: Any) -> bytes:
        """``_codecs.encode``: how protocols 0 to 2 write bytes."""
        if type(text) is not str or coding != "latin1":
            raise ValueError("it makes bytes of a value that is not a text")
        self.spend(len(text))
        return text.encode("latin1")


Names = Callable[[str], Any]  # a name -> what it stands for: a Function or a dtype; None if it is unknown


def short(text: str, most: int = 100) -> str:
    """A text that a file chose, for a message: in one line, of at most so many characters."""
    text = printable(text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shortlist(names: Sequence[str]) -> str:
    """Six names, and how many more there are."""
    return ", ".join(map(short, names[:6])) + (f" and {len(names) - 6:,} more" if len(names) > 6 else "")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn any error that damaged or hostile bytes cause into a PickleError with the first line of the cause."""
    try:
        yield
    except (PatchbankError, MemoryError, OSError):
        raise
    except IndexError as error:
        raise PickleError("it takes a value that is not there") from error
    except Exception as error:
        raise PickleError(
            short(str(error).strip().split("\n")[0].removesuffix("."), 300) or type(error).__name__
        ) from error


def instructions(stream: Stream) -> Iterator[tuple[Any, Any, Any]]:
    """`pickletools.genops`, with reasons in plain words."""
    try:
        yield from pickletools.genops(stream)  # type: ignore[arg-type]
    except ValueError as error:
        early = re.search("remain|not enough data|exhausted|no newline", str(error))
        raise PickleError("it ends early" if early else "its bytes are not a pickle's") from error


@refusals()
def interpret(
    stream: Stream,
    names: Names,
    persistent: Callable[[Any], Any],
    most: int = MOST_INSTRUCTIONS,
    *,
    placed: Callable[[bytes, int], Any] = lambda content, _: content,
    kept: Container[int] | None = None,
    take: Callable[[list[Any]], None] | None = None,
) -> Any:
    """The value of the pickle that begins at the stream's position, which then is the pickle's end.

    Args:
        stream: the bytes; at most `MOST_BYTES` of them, unless the rest bounds what is kept.
        names: what the pickle may name.
        persistent: a persistent identifier -> its value.
        most: greatest number of instructions.
        placed: (bytes, where they begin in the stream) -> what stands for them.
        kept: the places of the pickle's memo that it takes values from; None keeps every value.
        take: called with the items of the outermost dict, ``[key, value, ...]``, instead of keeping them there.

    Raises:
        UnsafePickleError: it names what no pickle of tensors names.
        PickleError: it is damaged, too long, or uses another instruction.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    memoized = 0

    def above_mark() -> list[Any]:
        first = marks.pop()
        values = stack[first:]
        del stack[first:]
        return values

    argument: Any
    for number, (opcode, argument, _) in enumerate(instructions(stream)):
        if number >= most:
            raise PickleError("it is longer than any tensor's pickle")
        if marks and len(stack) < marks[-1]:
            raise PickleError("it takes values from below a mark")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in _BYTES:
                stack.append(placed(argument, stream.tell() - len(argument)))
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "BINGET" | "LONG_BINGET" | "GET":
                if argument not in memo:
                    raise PickleError("it takes a value that it has not kept")
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT" | "PUT" | "MEMOIZE" as name:
                place = memoized if name == "MEMOIZE" else argument
                if not 0 <= place <= number:
                    raise PickleError("it keeps values where no tensor's pickle does")
                memoized += 1
                if kept is None or place in kept:
                    memo[place] = stack[-1]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case name if name in _SHORT_TUPLES:
                first = len(stack) - _SHORT_TUPLES[name]
                if first < 0:
                    raise PickleError("it makes a tuple of more values than there are")
                stack[first:] = [tuple(stack[first:])]
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(above_mark())
            case "APPEND" | "APPENDS" as name:
                items = above_mark() if name == "APPENDS" else [stack.pop()]
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = above_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM" | "SETITEMS" as name:
                items = above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if take is not None and len(stack) == 1 and type(stack[0]) is dict:
                    take(items)
                else:
                    _set_items(stack[-1], items)
            case "POP":
                stack.pop()
            case "EMPTY_SET":
                stack.append(Opaque("set"))
            case "ADDITEMS":
                above_mark()
            case "FROZENSET":
                above_mark()
                stack.append(Opaque("frozenset"))
            case "GLOBAL":
                stack.append(_meaning(names, argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                words = [stack.pop(-2), stack.pop()]
                if not all(type(word) is str for word in words):
                    raise ValueError("it names a value that is not a text")
                stack.append(_meaning(names, ".".join(words)))
            case "INST":
                stack.append(_call(_meaning(names, argument.replace(" ", ".")), tuple(above_mark())))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "STOP":
                return stack.pop()
            case name:
                raise PickleError(f"it uses {name}, which no tensor's pickle does")
    raise PickleError("it has no end")


def _meaning(names: Names, name: str) -> Any:
    found = names(name)
    if found is not None:
        return found
    if _HARMLESS.fullmatch(name):
        return Opaque(name)
    raise UnsafePickleError(f"it names {short(name)}, which no tensor's pickle does; nothing was run")


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, Opaque):
        return function
    if not isinstance(function, Function) or type(arguments) is not tuple:
        raise ValueError("it calls a value that is not a function")
    return function.call(*arguments)


def _build(value: Any, state: Any) -> None:
    """Give an object its attributes. Those of a dict (a state dict's ``_metadata``) are dropped."""
    if isinstance(value, Built):
        value.build(state)
    elif type(value) is not dict and not isinstance(value, Opaque):
        raise ValueError("it gives attributes to a value without any")


def _set_items(value: Any, items: list[Any]) -> None:
    if isinstance(value, Opaque):
        return
    if type(value) is not dict or len(items) % 2:
        raise ValueError("it sets items of a value without any")
    value.update((key, item) for key, item in zip(items[::2], items[1::2], strict=True) if type(key) is str)


def _extend(value: Any, items: list[Any]) -> None:
    if isinstance(value, Opaque):
        return
    if type(value) is not list:
        raise ValueError("it appends to a value that is not a list")
    value.extend(items)
