"""A record is one image to encode; a dataset is a named list of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from patchbank.errors import DatasetError
from patchbank.files import is_plain


class Record(NamedTuple):
    """One image to encode.

    Attributes:
        key: its ``file_name`` as the annotations give it: a relative POSIX path with its extension.
        images: the directory that the key is relative to.
    """

    key: str
    images: Path

    @property
    def path(self) -> Path:
        """Where it lies. Made when it is asked for: a million of them take seconds."""
        return self.images / self.key


@dataclass(frozen=True)
class Dataset:
    """The images of one split.

    Attributes:
        name: ``hicodet``, ``vcoco`` or ``folder``.
        split: the split's name; None where there are no splits.
        images: the directory the keys are relative to.
        records: every listed image once, with or without annotated pairs.
        annotations: the file the list was read from; None for a folder.
        root: the EZ-HOI checkout, whose ``checkpoints/`` are looked in; None for a folder.
    """

    name: str
    split: str | None
    images: Path
    records: tuple[Record, ...] = field(repr=False)
    annotations: Path | None = None
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def title(self) -> str:
        """``hicodet train``, ``folder``: for people."""
        return f"{self.name} {self.split}" if self.split else self.name


def make_records(names: Iterable[str], images: Path, source: Path) -> tuple[Record, ...]:
    """Records for file names under `images`, repeated names once, in order of first appearance.

    Raises DatasetError on a name that is no plain relative path: it could lead out of the image directory.
    """
    return tuple(Record(_checked(name, source), images) for name in dict.fromkeys(names))


def _checked(name: str, source: Path) -> str:
    if not is_plain(name):
        raise DatasetError(
            f"{source} lists the file_name {name!r}, which is not a plain path inside the image directory. "
            f"Nothing was read or written; correct that entry."
        )
    return name


def require_directory(path: Path, what: str, mend: str) -> Path:
    """`path`, or DatasetError saying what it should be and how to mend it."""
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise DatasetError(f"{path} {state}; it should be {what}. {mend}")
    return path
