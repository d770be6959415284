"""What a bank asks of the place that its parts lie in: a directory, or an object store.

Parts never change, and their names contain a hash of their content. So a place lists files, puts a whole file under its
name or not at all, deletes, and reads a range.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from patchbank.files import (
    damaged_name,
    fsync_directory,
    make_directory,
    nearest_existing,
    open_regular,
    quarantine,
    remove_abandoned,
    scratch_directory,
)
from patchbank.locations import filesystem, is_remote, of_hub, remotely

_HEADER = 1 << 18  # bytes, in which most headers lie: a second request costs more than reading too much
_REQUESTS = 16  # at once


class Storage:
    """A directory of this machine, or one that is mounted here. Small, and safe to send to other processes.

    All methods raise FileNotFoundError where a file does not exist, and OSError where it cannot be read or written.

    Attributes:
        directory: its path or URL.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextlib.contextmanager
    def scratch(self, about: str = "") -> Iterator[Path]:
        """A local directory for new files; makes the place itself if it does not exist.

        Args:
            about: what `files.live_scratches` reports to other runs.

        Raises OSError where nothing can be written, before anything is computed.
        """
        make_directory(self.directory)
        with scratch_directory(self.directory, about) as scratch:
            yield scratch

    def check(self) -> None:
        """Raise OSError where nothing can be written, as far as that shows without writing."""
        place = nearest_existing(self.directory)
        if not os.access(place, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code), str(place))

    def sweep(self) -> None:
        """Remove the scratch directories of processes that died."""
        remove_abandoned(self.directory)

    def names(self) -> list[str]:
        """The names of the files, in no order."""
        if not self.directory.is_dir():
            return []
        with os.scandir(self.directory) as entries:  # no pipes, and no links to nowhere or to themselves
            return [each.name for each in entries if each.is_file(follow_symlinks=False) or Path(each.path).is_file()]

    def head(self, name: str) -> tuple[bytes, int]:
        """The beginning of a file, at least 8 bytes if it has as many, and the file's size."""
        with open_regular(self.directory / name) as file:
            return file.read(1 << 13), os.fstat(file.fileno()).st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        """A part of a file; shorter where the file ends before `stop`."""
        with open_regular(self.directory / name) as file:
            file.seek(start)
            return file.read(stop - start)

    def commit(self, temporary: Path, name: str) -> None:
        """Move a file out of the scratch directory, where it has been flushed: durably and whole, or not at all."""
        make_directory(self.directory)
        temporary.rename(self.directory / name)
        fsync_directory(self.directory)

    def move(self, name: str, to: Storage) -> None:
        """Move a file to another place on the same file system, or in the same store: durably and whole."""
        to.commit(self.directory / name, name)

    def sync(self) -> None:
        """Make durable what others have committed."""
        fsync_directory(self.directory)

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        (self.directory / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the place with everything in it, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)

    def quarantine(self, name: str) -> str:
        """Rename an unusable file to ``*.damaged``; returns its new name."""
        return quarantine(self.directory / name).name

    def map(self, function: Any, names: Sequence[str]) -> list[Any]:
        """A function's values for several files."""
        return [function(name) for name in names]


class ObjectStorage(Storage):
    """A prefix in an object store. An object appears when it is whole; nothing is flushed or renamed.

    Scratch directories lie on the machine that writes, and other runs do not see them.
    """

    reading: ClassVar[dict[str, Any]] = {}  # options of `cat_file`

    @staticmethod
    def refresh(files: Any) -> None:
        """Forget what was there: others write here too."""
        files.invalidate_cache()

    @contextlib.contextmanager
    def scratch(self, about: str = "") -> Iterator[Path]:
        probe = f".patchbank-{uuid.uuid4().hex}"
        self._ask(lambda files, path: files.pipe_file(path, b""), probe)
        self.delete(probe)
        with tempfile.TemporaryDirectory(prefix="patchbank-") as directory:
            yield Path(directory)

    def check(self) -> None:
        def found(files: Any, path: str) -> None:
            bucket = path.partition("/")[0]
            if not files.exists(bucket):  # or it may not be asked for
                files.ls(bucket, detail=False)

        with contextlib.suppress(PermissionError):  # a bucket may forbid listings, and take files
            self._ask(found)

    def sweep(self) -> None:
        pass

    def _ask(self, action: Any, name: str = "") -> Any:
        return remotely(self.directory / name if name else self.directory, action)

    def names(self) -> list[str]:

        def listed(files: Any, path: str) -> list[str]:
            self.refresh(files)
            return [entry.rstrip("/").rpartition("/")[2] for entry in files.ls(path, detail=False)]

        try:
            names: list[str] = self._ask(listed)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return names

    def head(self, name: str) -> tuple[bytes, int]:

        def start(files: Any, path: str) -> tuple[bytes, int]:
            self.refresh(files)
            size = int(files.size(path))
            return files.cat_file(path, start=0, end=min(size, _HEADER), **self.reading), size

        found: tuple[bytes, int] = self._ask(start, name)
        return found

    def read(self, name: str, start: int, stop: int) -> bytes:
        found: bytes = self._ask(lambda files, path: files.cat_file(path, start=start, end=stop, **self.reading), name)
        return found

    def commit(self, temporary: Path, name: str) -> None:
        size = temporary.stat().st_size

        def put(files: Any, path: str) -> None:
            files.put_file(str(temporary), path)
            self.refresh(files)
            if (arrived := int(files.size(path))) != size:
                files.rm_file(path)
                raise OSError(f"{arrived:,} of {size:,} bytes arrived")

        self._ask(put, name)
        temporary.unlink()

    def move(self, name: str, to: Storage) -> None:
        path_there = filesystem(to.directory / name)[1]
        self._ask(lambda files, path: files.cp_file(path, path_there), name)
        self.delete(name)

    def sync(self) -> None:
        pass

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda files, path: files.rm_file(path), name)

    def clear(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda files, path: files.rm(path, recursive=True))

    def quarantine(self, name: str) -> str:
        damaged = damaged_name(name, {*self.names()}.__contains__)
        self._ask(lambda files, path: files.mv(path, path.removesuffix(name) + damaged), name)
        return damaged

    def map(self, function: Any, names: Sequence[str]) -> list[Any]:
        """Likewise; several requests at once, since each waits long."""
        with ThreadPoolExecutor(_REQUESTS) as threads:
            return list(threads.map(function, names))


class HubStorage(ObjectStorage):
    """A directory of a repository of the Hugging Face hub, at a commit: it never changes, and is read-only."""

    reading: ClassVar[dict[str, Any]] = {"cache_type": "none"}  # else the hub's file system reads megabytes ahead

    @staticmethod
    def refresh(files: Any) -> None:
        pass


def storage_of(directory: Path) -> Storage:
    """The place at a path or URL."""
    if not is_remote(directory):
        return Storage(directory)
    return HubStorage(directory) if of_hub(directory) else ObjectStorage(directory)
