"""Where records' images lie, and how one is opened."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from patchbank.errors import DatasetError
from patchbank.locations import is_remote, remotely

if TYPE_CHECKING:
    from patchbank.datasets.records import Record


class Source(Protocol):
    """Something that images lie in. Small, and sent to other processes with every run of records.

    Attributes:
        location: the directory, or the file, that they lie in.
        remote: whether reading waits for a network.
    """

    @property
    def location(self) -> Path: ...
    @property
    def remote(self) -> bool: ...

    def content(self, record: Record) -> Path | BinaryIO:
        """An image's file, or its bytes. Raises OSError where they cannot be had."""

    def exists(self, record: Record) -> bool:
        """Whether the image is there."""

    def require(self) -> None:
        """Raise DatasetError where nothing of it is there (any more)."""


@dataclass(frozen=True)
class Directory:
    """A directory of image files; a key is a path in it."""

    location: Path

    @property
    def remote(self) -> bool:
        """As `Source` says."""
        return is_remote(self.location)

    def content(self, record: Record) -> Path | BinaryIO:
        """As `Source` says."""
        path = record.path
        if self.remote:
            content: bytes = remotely(path, lambda files, name: files.cat_file(name))
            if not content:
                raise OSError("the file is empty")
            return BytesIO(content)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size == 0:
            raise OSError("the file is empty")
        return path

    def exists(self, record: Record) -> bool:
        """As `Source` says."""
        return record.path.exists()

    def require(self) -> None:
        """As `Source` says."""
        if not self.remote and not _holds_something(self.location):
            raise DatasetError(
                f"{self.location}, the directory of the images, is gone. What was committed is safe: when it is there "
                "again, the same command goes on from here."
            )


def _holds_something(directory: Path) -> bool:
    """Whether a directory is there, with anything in it: of a disk that is not mounted an empty one is left."""
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is not None
    except OSError:
        return os.path.isdir(directory)  # noqa: PTH112  # it may not be listed, or not just now
