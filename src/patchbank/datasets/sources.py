"""What images lie in: a directory of image files, or one file that holds many of them."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from patchbank.errors import DatasetError
from patchbank.files import open_regular
from patchbank.locations import is_remote, remotely

if TYPE_CHECKING:
    from patchbank.datasets.samples import Sample

_LARGEST = 2 << 30  # bytes of an image's file: a picture that Pillow opens has less even uncompressed


@dataclass(frozen=True)
class Source:
    """The base of all sources, and what those of one file share. Small: it is sent to other processes with the samples.

    Attributes:
        location: the directory or the file.
    """

    location: Path

    @property
    def remote(self) -> bool:
        """Whether reading waits for a network."""
        return is_remote(self.location)

    def content(self, sample: Sample) -> Path | BinaryIO:
        """An image's file, or exactly its bytes. Several threads may call it. Raises OSError if it cannot be read."""
        raise NotImplementedError

    def exists(self, sample: Sample) -> bool:
        """Whether the image exists. Listing a file showed that it holds the image."""
        return self.is_there()

    def is_there(self) -> bool:
        """Whether the source exists, with anything in it."""
        if not self.remote:
            return os.path.isfile(self.location)  # noqa: PTH113
        try:
            return bool(remotely(self.location, lambda files, path: files.exists(path)))
        except OSError:
            return True  # it may exist; reading gives the reason

    def require(self) -> None:
        """Raise DatasetError if the source is gone."""
        if not self.is_there():
            raise DatasetError(
                f"{self.location}, which holds the images, is gone. What was committed is safe: once it is back, the "
                "same command continues from here."
            )


@dataclass(frozen=True)
class Directory(Source):
    """A directory of image files, or an object store's prefix; a key is a path in it."""

    def content(self, sample: Sample) -> Path | BinaryIO:
        path = sample.path
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

    def exists(self, sample: Sample) -> bool:
        try:
            return sample.path.exists()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file has such a name
                return False
            raise

    def is_there(self) -> bool:
        if self.remote:
            return True
        try:
            with os.scandir(self.location) as entries:
                return next(entries, None) is not None  # an unmounted disk leaves an empty directory
        except OSError:
            return os.path.isdir(self.location)  # noqa: PTH112  # it may not be readable, now or ever


@dataclass(frozen=True)
class Tar(Source):
    """An uncompressed tar; a sample's place is (offset, size) of its bytes."""

    def content(self, sample: Sample) -> BytesIO:
        assert sample.place is not None
        offset, size = sample.place
        if size == 0:
            raise OSError("the file is empty")
        if size > _LARGEST:
            raise OSError(f"too large: {size:,} bytes")
        if self.remote:
            found: bytes = remotely(
                self.location, lambda files, path: files.cat_file(path, start=offset, end=offset + size)
            )
        else:
            with open_regular(self.location) as file:
                file.seek(offset)
                found = file.read(size)
        if len(found) != size:
            raise OSError("the tar ends before the image does")
        return BytesIO(found)
