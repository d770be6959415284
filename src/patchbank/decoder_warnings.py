"""What Pillow and libtiff say of an image that they read all the same: collected, instead of printed.

Pillow warns by Python's `warnings`. libtiff, below it, writes to standard error, by a handler that is replaced by one
of ours; where the library cannot be found, its lines are printed as ever.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from patchbank.errors import printable

_MOST = 100  # texts of an image
_KINDS, _EXAMPLES = 20, 3  # listed
_MOST_KINDS = 1000  # counted one by one
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_here = threading.local()


@dataclass
class Warned:
    """The warnings about a run's images.

    Attributes:
        images: how many they are.
        counts: kind of warning -> how many images; numbers in it are written N.
        examples: kind -> keys of some of these.
    """

    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, key: str, texts: Iterable[str]) -> None:
        """Count an image's."""
        kinds = {re.sub(r"\b\d+\b", "N", text) for text in texts}
        self.images += bool(kinds)
        self._count(dict.fromkeys(kinds, 1), {kind: [key] for kind in kinds})

    def merge(self, other: Warned) -> None:
        """Count those of another part of the run."""
        self.images += other.images
        self._count(other.counts, other.examples)

    def _count(self, counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> None:
        for kind, count in counts.items():
            name = kind if kind in self.counts or len(self.counts) < _MOST_KINDS else "other warnings"
            self.counts[name] += count
            self.examples[name] = [*self.examples[name], *examples[kind]][:_EXAMPLES]

    def lines(self) -> list[str]:
        """Each kind in a line, the most frequent first."""
        return [
            printable(f"{kind}: {count:,} image{'' if count == 1 else 's'}, such as {', '.join(self.examples[kind])}")
            for kind, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:_KINDS]
        ]


@contextmanager
def collected() -> Iterator[list[str]]:
    """The texts about what this thread reads within the block; a block around it gets them too."""
    _install()
    outer, _here.texts = getattr(_here, "texts", None), []
    try:
        yield _here.texts
    finally:
        inner, _here.texts = _here.texts, outer
        for text in inner:
            _take(text)


def _take(text: str) -> bool:
    texts = getattr(_here, "texts", None)
    if texts is not None and len(texts) < _MOST:
        texts.append(" ".join(text.split()))
    return texts is not None


@cache
def _install() -> None:
    """Once in a process: Pillow's warnings and libtiff's lines go to `collected`, and outside of it where they went."""
    warnings.filterwarnings("always", module=r"PIL\.", append=True)  # last: the program's own filters come first
    usual, before = warnings.showwarning, set[tuple[str, int]]()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *others: Any) -> None:
        if "PIL" in Path(filename).parts:
            if (place := (str(message), lineno)) in before or _take(place[0]):
                return
            if len(before) < _MOST_KINDS:
                before.add(place)  # shown once, as without this filter
        usual(message, category, filename, lineno, *others)

    warnings.showwarning = show  # type: ignore[assignment]
    with suppress(OSError, AttributeError, StopIteration):
        library = _libtiff()
        library.TIFFSetWarningHandler(None)
        library.TIFFSetErrorHandler(_said_by_libtiff)


@_HANDLER  # type: ignore[untyped-decorator]
def _said_by_libtiff(module: bytes | None, format: bytes, arguments: int | None) -> None:
    text = ctypes.create_string_buffer(1024)
    ctypes.CDLL(None).vsnprintf(text, len(text), format, ctypes.c_void_p(arguments))
    said = b": ".join(filter(None, (module, text.value))).decode(errors="replace")
    if not _take(said):
        print(said, file=sys.stderr)


def _libtiff() -> ctypes.CDLL:
    """The library that Pillow has loaded: in its wheels, or the system's. Raises StopIteration, OSError."""
    from PIL import _imaging

    package = Path(_imaging.__file__).parent
    beside = (*package.parent.glob("[Pp]illow.libs/libtiff*"), *package.glob(".dylibs/libtiff*"))
    if beside:
        return ctypes.CDLL(str(beside[0]))
    return ctypes.CDLL(_imaging.__file__)  # whose symbols are found in what it is linked with
