"""What a bank asks of the place that its parts lie in: a directory, or an object store.

Parts never change, and their names say their content. So it takes listing, putting a whole file there under its name or
not at all, deleting, and reading a range.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from patchbank.files import (
    DAMAGED,
    fsync_directory,
    is_dangling,
    make_directory,
    quarantine,
    remove_abandoned,
    scratch_directory,
)
from patchbank.locations import is_remote, remotely

_HEADER = 1 << 18  # bytes, in which most headers lie: a second request costs more than reading too much
_REQUESTS = 16  # at once


class Storage(ABC):
    """One bank's place. Small, and safe to send to other processes.

    Attributes:
        directory: its path or URL.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def scratch(self, about: str = "") -> contextlib.AbstractContextManager[Path]:
        """A local directory for what is being made; makes the place itself, if need be.

        Args:
            about: what `files.live_scratches` tells others.
        """

    @abstractmethod
    def sweep(self) -> None:
        """Remove what processes that died were making."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of the files in it, in no order."""

    @abstractmethod
    def head(self, name: str) -> tuple[bytes, int]:
        """The beginning of a file, at least 8 bytes where there are so many, and the file's size.

        All methods raise FileNotFoundError where a file is not there, and OSError where it cannot be had.
        """

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> bytes:
        """A part of a file; shorter where the file ends before."""

    @abstractmethod
    def commit(self, temporary: Path, name: str) -> None:
        """Put a file of the scratch directory there: durably and whole, or not at all."""

    @abstractmethod
    def sync(self) -> None:
        """Make durable what was committed by others."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    @abstractmethod
    def quarantine(self, name: str) -> None:
        """Rename a file that cannot be used, so that nobody takes it for what it was."""

    def map(self, function: Any, names: Sequence[str]) -> list[Any]:
        """A function's values for several files. Several requests are under way at once where each waits long."""
        return [function(name) for name in names]


class LocalStorage(Storage):
    """A directory of this machine, or one that is mounted here."""

    @contextlib.contextmanager
    def scratch(self, about: str = "") -> Iterator[Path]:
        make_directory(self.directory)
        with scratch_directory(self.directory, about) as scratch:
            yield scratch

    def sweep(self) -> None:
        remove_abandoned(self.directory)

    def names(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        with os.scandir(self.directory) as entries:  # of which there may be a million, in a bank of pickles
            return [entry.name for entry in entries if not (entry.is_symlink() and is_dangling(Path(entry.path)))]

    def head(self, name: str) -> tuple[bytes, int]:
        with open(self.directory / name, "rb", buffering=0) as file:
            return file.read(1 << 13), os.fstat(file.fileno()).st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        with open(self.directory / name, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def commit(self, temporary: Path, name: str) -> None:
        """As the base class says; `temporary` has been flushed."""
        make_directory(self.directory)
        temporary.rename(self.directory / name)
        fsync_directory(self.directory)

    def sync(self) -> None:
        fsync_directory(self.directory)

    def delete(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def quarantine(self, name: str) -> None:
        quarantine(self.directory / name)


class ObjectStorage(Storage):
    """A prefix in an object store. An object appears when it is whole; there is no flushing and no renaming."""

    @contextlib.contextmanager
    def scratch(self, about: str = "") -> Iterator[Path]:
        """As the base class says; nobody is told.

        Raises OSError where nothing can be written there: before anything is computed.
        """
        probe = f".patchbank-{uuid.uuid4().hex}"
        self._ask(lambda files, path: files.pipe_file(path, b""), probe)
        self.delete(probe)
        with tempfile.TemporaryDirectory(prefix="patchbank-") as directory:
            yield Path(directory)

    def sweep(self) -> None:
        """What they were making lies on the machines that they ran on."""

    def _ask(self, action: Any, name: str = "") -> Any:
        return remotely(self.directory / name if name else self.directory, action)

    def names(self) -> list[str]:

        def listed(files: Any, path: str) -> list[str]:
            files.invalidate_cache()  # others write here too
            return [entry.rstrip("/").rpartition("/")[2] for entry in files.ls(path, detail=False)]

        try:
            names: list[str] = self._ask(listed)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return names

    def head(self, name: str) -> tuple[bytes, int]:

        def start(files: Any, path: str) -> tuple[bytes, int]:
            files.invalidate_cache()
            size = int(files.size(path))
            return files.cat_file(path, start=0, end=min(size, _HEADER)), size

        found: tuple[bytes, int] = self._ask(start, name)
        return found

    def read(self, name: str, start: int, stop: int) -> bytes:
        found: bytes = self._ask(lambda files, path: files.cat_file(path, start=start, end=stop), name)
        return found

    def commit(self, temporary: Path, name: str) -> None:
        size = temporary.stat().st_size

        def put(files: Any, path: str) -> None:
            files.put_file(str(temporary), path)
            files.invalidate_cache()
            if (there := int(files.size(path))) != size:
                files.rm_file(path)
                raise OSError(f"{there:,} of {size:,} bytes arrived")

        self._ask(put, name)
        temporary.unlink()

    def sync(self) -> None:
        """An object that is there is durable."""

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda files, path: files.rm_file(path), name)

    def quarantine(self, name: str) -> None:
        """As the base class says; a store copies."""
        self._ask(lambda files, path: files.mv(path, path + DAMAGED), name)

    def map(self, function: Any, names: Sequence[str]) -> list[Any]:
        with ThreadPoolExecutor(_REQUESTS) as threads:
            return list(threads.map(function, names))


def storage_of(directory: Path) -> Storage:
    """What to ask where a bank's files lie."""
    return ObjectStorage(directory) if is_remote(directory) else LocalStorage(directory)
