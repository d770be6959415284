"""What a layout decides: where the index's parts lie, and whether the features lie inside them or beside them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.storage import Storage
from patchbank.config import Layout
from patchbank.files import sha256_of_chunks
from patchbank.regions import Region

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_HEADER = 100_000_000  # bytes; the safetensors package's limit


class Column(Protocol):
    """One field of a part's features."""

    def __call__(self, row: int, count: int = 1, into: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """That of `count` features from a row on, (bytes,); of pickles, of one alone.

        It is read into `into`, or else is not to be changed: others share what is mapped.

        Raises BankError, and FileNotFoundError where the part is gone.
        """


# (key, field) -> the numbers that an older part holds.
Rows = Callable[[str, str], NDArray[np.uint8]]

Pieces = Sequence[bytes | memoryview]  # of a stored feature, one after the other


class Feature(NamedTuple):
    """One sample's features, to be written.

    Attributes:
        key: the sample's.
        outputs: name -> tensor on the CPU, of any float dtype; the writer stores the bank's.
        size: (width, height) of the original image in pixels; None if it is unknown.
        region: the part of the image that it is; None for an image.
    """

    key: str
    outputs: Mapping[str, Tensor]
    size: tuple[int, int] | None
    region: Region | None = None

    @property
    def nbytes(self) -> int:
        """Its size in memory, in bytes."""
        return sum(value.nbytes for value in self.outputs.values())


class Kept(NamedTuple):
    """A feature that waits for its part to be written.

    Attributes:
        bytes: of what is stored.
        pieces: what is stored; empty if a file holds it.
        file: (temporary name, final name) of that file.
    """

    bytes: int
    pieces: Pieces = ()
    file: tuple[Path, Path] | None = None


class Payload(ABC):
    """A layout, of one bank.

    What a layout does not override: a part's file is its header document and nothing else, features wait in memory for
    their part, and what a part lists exists.

    Attributes:
        layout: its name.
        pattern, name: of a part's file: (number, hash).
        prefix: bytes in a part's file before those that its name's hash is of.
        durable_at_once: whether a part is written with every batch, or only when it is complete.
        bank: the bank's directory or URL.
        parts: where its parts lie.
    """

    layout: ClassVar[Layout]
    pattern: ClassVar[re.Pattern[str]]
    name: ClassVar[str]
    prefix: ClassVar[int] = 0
    durable_at_once: ClassVar[bool]

    def __init__(self, bank: Path, parts: Storage) -> None:
        self.bank = bank
        self.parts = parts

    def frame(self, document: str, manifest: Manifest, count: int) -> bytes:
        """What a part of `count` features begins with: the prefix, and the bytes that its name's hash is of."""
        return f"{document}\n".encode()

    def end(self, start: bytes, size: int) -> int:
        """Where that ends, in bytes; from a file's first bytes and its size. Nothing longer is read: 0 is no part."""
        return size if size <= LARGEST_HEADER else 0

    def document_in(self, text: bytes) -> tuple[str | bytes, Mapping[str, Any]]:
        """The header document in the hashed bytes, and the `tensors` there. Raises ValueError, KeyError, TypeError."""
        return text, {}

    def tensors(self, manifest: Manifest, count: int) -> dict[str, Any]:
        """What a part's file says of the tensors behind the document, as a safetensors header."""
        return {}

    @abstractmethod
    def pieces(self, manifest: Manifest, feature: Feature) -> Pieces:
        """A feature as it is stored; called from several threads. Raises NotFiniteError as `packing.pack` does."""

    def keep(self, key: str, pieces: Pieces, scratch: Path) -> Kept:
        """Take a feature; called from several threads."""
        return Kept(sum(memoryview(each).nbytes for each in pieces), pieces)

    def body(self, manifest: Manifest, features: Sequence[Entry], kept: Mapping[str, Kept], old: Rows) -> Iterator[Any]:
        """What follows in a part's file; features that are not in `kept` come from older parts."""
        return iter(())

    @abstractmethod
    def columns(self, part: Part, cache: Path | None = None, *, mmap: bool = True) -> Mapping[str, Column]:
        """A part's features, by field; nothing is read before a row is.

        Args:
            cache: a directory that keeps what comes from an object store.
            mmap: whether to map shards of a directory into memory, or to read each row.

        Raises FileNotFoundError where the part is gone, BankError where it cannot be read.
        """

    def present(self, entries: Mapping[str, Entry], manifest: Manifest) -> set[str]:
        """The keys of the listed features that exist."""
        return {key for key, entry in entries.items() if entry.failure is None}

    def file(self, part: Part, key: str) -> Path:
        """The file that holds a feature."""
        return part.path

    def checksum(self, part: Part, row: int, columns: Mapping[str, Column]) -> str:
        """The SHA-256 of a feature as it is stored now. Raises BankError where it cannot be read."""
        return sha256_of_chunks(column(row).data for column in columns.values())

    def bytes_on_disk(self, parts: Sequence[Part], entries: Mapping[str, Entry]) -> int:
        """The size of all features, with their index."""
        return sum(part.bytes for part in parts)
