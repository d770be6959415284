"""Durable files: written under a temporary name, flushed to the disk, then renamed. Scratch space that cleans up."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

_NEW, _SCRATCH, _LOCK = ".patchbank-new-", ".patchbank-tmp-", "lock"


def is_plain(name: str) -> bool:
    """Whether a name is a plain relative POSIX path: it cannot lead out of the directory it is joined to."""
    path = PurePosixPath(name)
    return (
        bool(name) and "\0" not in name and path.as_posix() == name and not (path.is_absolute() or ".." in path.parts)
    )


def fsync_directory(directory: Path) -> None:
    """Make the renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_and_sync(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file and flush it to the disk. It is not atomic: use it on temporary names."""
    with open(path, "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while view:  # an unbuffered write may be short
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system that `path` lies on, or will lie on."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """`path`, or its nearest ancestor that is there."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), path)


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A temporary directory inside `parent`, on the same file system, gone at the end.

    One left behind by a killed process is removed the next time anybody asks for one here. A live one is not: its
    owner holds a file lock in it, which the kernel releases when the process dies.
    """
    _remove_abandoned(parent)
    directory = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
    lock = FileLock(directory / _LOCK)
    lock.acquire()
    # Only now under the name that others look for, so that nobody finds it unlocked while it lives.
    directory = directory.rename(parent / (_SCRATCH + directory.name.removeprefix(_NEW)))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def _remove_abandoned(parent: Path) -> None:
    for directory in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(Timeout, OSError), FileLock(directory / _LOCK, timeout=0):
            shutil.rmtree(directory, ignore_errors=True)
