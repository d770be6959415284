"""A tar as a source of images: each is a range of bytes of it, found once by `datasets.tar` and read on its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.errors import DatasetError
from patchbank.locations import is_remote, remotely

if TYPE_CHECKING:
    from patchbank.datasets.samples import Sample

_LARGEST = 2 << 30  # bytes of an image's file: a picture that Pillow opens has less even uncompressed


@dataclass(frozen=True)
class SingleFile:
    """A file that holds many images. The base of tars and tables.

    Attributes:
        location: the file's.
    """

    location: Path

    @property
    def remote(self) -> bool:
        """As `Source` says."""
        return is_remote(self.location)

    def exists(self, sample: Sample) -> bool:
        """Whether the file is there: that it holds the image was seen when it was listed."""
        return self._there()

    def _there(self) -> bool:
        if not self.remote:
            return os.path.isfile(self.location)  # noqa: PTH113
        try:
            return bool(remotely(self.location, lambda files, path: files.exists(path)))
        except OSError:
            return True  # it is not known to be gone, and reading will tell

    def require(self) -> None:
        """Raise DatasetError where the file is gone."""
        if not self._there():
            raise DatasetError(
                f"{self.location}, which holds the images, is gone. What was committed is safe: when it is there "
                "again, the same command goes on from here."
            )


@dataclass(frozen=True)
class Tar(SingleFile):
    """An uncompressed tar; a sample's place is (offset, size) of its bytes."""

    def content(self, sample: Sample) -> BytesIO:
        """Exactly an image's bytes. Safe to call from several threads. Raises OSError where they cannot be had."""
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
            with open(self.location, "rb") as file:
                file.seek(offset)
                found = file.read(size)
        if len(found) != size:
            raise OSError("the tar ends before the image does")
        return BytesIO(found)
