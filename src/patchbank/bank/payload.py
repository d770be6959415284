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

if TYPE_CHECKING:
    from torch import Tensor


class Column(Protocol):
    """One field of a part's features."""

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """A row's numbers, (bytes,) uint8, in memory of their own. Raises BankError, and FileNotFoundError."""


# (key, field) -> the numbers that an older part holds.
Rows = Callable[[str, str], NDArray[np.uint8]]


class Feature(NamedTuple):
    """One sample's features, to be written.

    Attributes:
        key: the sample's.
        outputs: name -> tensor on the CPU, of any float dtype; the writer stores the bank's.
        size: (width, height) of the original image in pixels; None where it is not known.
    """

    key: str
    outputs: Mapping[str, Tensor]
    size: tuple[int, int] | None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in memory."""
        return sum(value.nbytes for value in self.outputs.values())


class Kept(NamedTuple):
    """A feature that a writer has taken.

    Attributes:
        sha256: of what is stored.
        numbers: by field, where they wait for their part; empty where a file holds them.
        bytes: of what is stored.
        file: (temporary name, final name) of a file that holds them.
    """

    sha256: str
    numbers: Mapping[str, memoryview]
    bytes: int
    file: tuple[Path, Path] | None = None


class Payload(ABC):
    """A layout, of one bank.

    Attributes:
        layout: its name.
        pattern, name: of a part's file: (number, hash).
        durable_at_once: whether a part is written with every batch, or when all its samples are there.
        bank: the bank's directory or URL.
        parts: where its parts lie.
    """

    layout: ClassVar[Layout]
    pattern: ClassVar[re.Pattern[str]]
    name: ClassVar[str]
    durable_at_once: ClassVar[bool]

    def __init__(self, bank: Path, parts: Storage) -> None:
        self.bank = bank
        self.parts = parts

    @abstractmethod
    def frame(self, document: str, manifest: Manifest, count: int) -> tuple[bytes, bytes]:
        """What a part's file begins with, and the bytes that its name's hash is of."""

    @abstractmethod
    def unframe(self, start: bytes, size: int, name: str) -> tuple[bytes, int]:
        """The bytes that the name's hash is of, and where the numbers begin; from a file's first bytes and its size."""

    @abstractmethod
    def document_in(self, text: bytes) -> tuple[str | bytes, Any]:
        """The header document in those bytes, and what else they say. Raises ValueError, KeyError, TypeError."""

    @abstractmethod
    def check(self, part: Part, rest: Any) -> None:
        """Raise ValueError where a part does not fit to what else its file says."""

    @abstractmethod
    def keep(self, manifest: Manifest, feature: Feature, scratch: Path) -> Kept:
        """Take a feature; called from several threads. Raises NotFiniteError as `packing.pack` does."""

    @abstractmethod
    def sha256(self, manifest: Manifest, feature: Feature) -> str:
        """The checksum that `keep` would give. Raises NotFiniteError likewise."""

    @abstractmethod
    def place(self, kept: Mapping[str, Kept]) -> None:
        """Give features that lie beside their part their final names, durably."""

    @abstractmethod
    def body(self, manifest: Manifest, features: Sequence[Entry], kept: Mapping[str, Kept], old: Rows) -> Iterator[Any]:
        """What follows a part's document in its file."""

    @abstractmethod
    def columns(self, part: Part, cache: Path | None = None) -> Mapping[str, Column]:
        """A part's features, by field; nothing is read before it is used.

        Args:
            cache: a directory that keeps what comes from an object store.

        Raises FileNotFoundError where the part is gone, BankError where it cannot be read.
        """

    @abstractmethod
    def present(self, entries: Mapping[str, Entry], manifest: Manifest) -> set[str]:
        """Keys of the listed features that are there."""

    @abstractmethod
    def file(self, part: Part, key: str) -> Path:
        """The file that holds a feature."""

    @abstractmethod
    def checksum(self, part: Part, row: int, columns: Mapping[str, Column]) -> str:
        """The SHA-256 of a feature as it is stored now. Raises BankError where it cannot be read."""

    @abstractmethod
    def bytes_on_disk(self, parts: Sequence[Part], entries: Mapping[str, Entry]) -> int:
        """The size of all features, with what is known of them."""
