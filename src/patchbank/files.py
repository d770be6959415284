"""Durable files: written under a temporary name, flushed to the disk, then renamed. Scratch space that cleans up."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

LFS_POINTER = b"version https://git-lfs.github.com/spec"  # how a file begins that Git LFS has not fetched
DAMAGED = ".damaged"  # added to the name of a file in quarantine
_SCRATCH, _LOCK, _ABOUT = ".patchbank-tmp-", "lock", "about"
NEXT = ".patchbank-next"  # in a bank: the bank that is to replace it
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def parse_json(content: bytes | str, kind: Any = Any) -> Any:
    """One JSON document, of any size, as a type. Raises ValueError; of a deeply nested one, perhaps RecursionError.

    msgspec decodes and checks in one pass. What it refuses, such as names that are not UTF-8, json.loads reads.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.convert(json.loads(content), kind)


def is_plain(name: str) -> bool:
    """Whether a name is a plain relative POSIX path: it cannot lead out of the directory it is joined to."""
    return "\0" not in name and {"", ".", ".."}.isdisjoint(name.split("/"))


def all_plain(names: Iterable[str]) -> bool:
    """Whether `is_plain` holds for each of several names; a million at a glance. Not of none."""
    text = f"/{'/'.join(names)}/"
    return not any(each in text for each in ("\0", "//", "/./", "/../"))


def is_scratch(name: str) -> bool:
    """Whether a directory of this name is a `scratch_directory`, or holds a bank that is not yet in its place."""
    return name.startswith(_SCRATCH) or name == NEXT


def fsync_directory(directory: Path) -> None:
    """Make the renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and its missing parents, durably."""
    if directory.is_dir():
        return
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in missing:
        fsync_directory(place.parent)


def write_and_sync(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file and flush it to the disk. This is not atomic: use it on temporary names."""
    with open(path, "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while view:  # an unbuffered write may be short
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def sync_file(path: Path) -> int:
    """Flush a written file to the disk; returns its size in bytes."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, but do not flush it to the disk. Raises OSError."""
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def damaged_name(name: str, taken: Callable[[str], bool]) -> str:
    """The name of a file in quarantine; where it is taken, another one."""
    return name + DAMAGED if not taken(name + DAMAGED) else f"{name}.{uuid.uuid4().hex}{DAMAGED}"


def quarantine(path: Path) -> Path:
    """Rename an unusable file to NAME.damaged, so that no reader takes it for a feature; returns the new path."""
    damaged = path.with_name(damaged_name(path.name, lambda name: os.path.lexists(path.with_name(name))))
    path.rename(damaged)
    fsync_directory(path.parent)
    return damaged


def sha256_of_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of bytes in pieces, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file to read its bytes. Raises OSError; of a pipe too, which would wait for a writer for ever."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """A regular file's content. Raises OSError, as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_text(size: float) -> str:
    """Bytes for people: ``402 kB``, ``14.4 GB``. Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def parse_bytes(text: str) -> int:
    """The inverse of `bytes_text`: ``256MB``, ``1.5 GB``, ``64MiB``, ``4096``. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size in bytes, such as 256MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2].replace("K", "k") or " "))


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system of `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


def room_text(path: Path) -> str:
    """What a full file system lacks: ``0 B free``, or ``no inodes free``, which are files' entries."""
    status = os.statvfs(nearest_existing(path))
    return "no inodes free" if status.f_files and not status.f_favail else f"{bytes_text(free_bytes(path))} free"


def nearest_existing(path: Path) -> Path:
    """`path`, or its nearest ancestor that exists."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.exists()), path)


@contextlib.contextmanager
def scratch_directory(parent: Path, about: str = "") -> Iterator[Path]:
    """A temporary directory inside `parent`, on the same file system; it is deleted at the end.

    `about` is what `live_scratches` returns in other processes.

    The next process of this host that makes one here removes those of killed processes. A live one stays: its owner
    holds a file lock in it, which the kernel releases when the process dies.
    """
    remove_abandoned(parent)
    directory, lock = _locked_directory(parent)
    try:
        (directory / _ABOUT).write_text(about)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        lock.release()


def live_scratches(parent: Path) -> list[str]:
    """Descriptions of scratch directories held by running processes."""
    found = []
    for directory in _scratches(parent):
        try:
            with FileLock(directory / _LOCK, timeout=0):
                continue  # no process holds it
        except Timeout:
            try:
                found.append((directory / _ABOUT).read_text())
            except (OSError, ValueError):  # it has just begun
                found.append("")
        except (NotImplementedError, OSError):
            continue
    return found


def _locked_directory(parent: Path) -> tuple[Path, FileLock]:
    while True:
        directory = parent / f"{_SCRATCH}{_host()}-{uuid.uuid4().hex}"
        directory.mkdir(mode=0o700)
        lock = FileLock(directory / _LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError, FileExistsError):
            continue  # another process took it for an abandoned one before it was locked
        except (NotImplementedError, OSError) as error:
            # Some cluster file systems have no locks. There, abandoned and live directories look alike.
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        if directory.exists():
            return directory, lock
        lock.release()


def _host() -> str:
    return re.sub(r"[^\w.]", "_", platform.node())[:64]


def _scratches(parent: Path, host: str = r"[\w.]*") -> list[Path]:
    """Scratch directories by their full names: a link, or another directory of such a name, is somebody else's."""
    name = re.compile(f"{re.escape(_SCRATCH)}{host}-[0-9a-f]{{32}}")
    found = parent.glob(f"{_SCRATCH}*")
    return [each for each in found if name.fullmatch(each.name) and each.is_dir() and not each.is_symlink()]


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch directories of this host's processes that have died.

    Of another host's, a lock that looks free proves nothing: some cluster file systems lock within a host only.
    """
    for directory in _scratches(parent, re.escape(_host())):
        with contextlib.suppress(Timeout, NotImplementedError, OSError), FileLock(directory / _LOCK, timeout=0):
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary file to write to; at the end it takes the target's name.

    Raises OSError; without `replace`, also if there is a target by then.
    """
    target = target.resolve()  # a link stays a link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_directory(target.parent) as scratch:
            place = scratch / f"written{target.suffix}"
            yield place
            if not replace:
                target.touch(exist_ok=False)  # the name is ours, or another's
            place.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


@contextlib.contextmanager
def whole_directory(target: Path, replace: bool) -> Iterator[Path]:
    """A temporary directory to write to; at the end it takes the place of the target.

    Raises OSError; without `replace`, also if the target is anything but an empty directory by then.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_directory(target.parent) as scratch:
            (place := scratch / "written").mkdir()
            yield place
            fsync_directory(place)
            old = scratch / "replaced"
            try:
                if replace and target.exists():  # a kill between these two leaves neither under the name
                    target.rename(old)
                place.rename(target)  # over nothing, or over an empty directory
            except BaseException:
                if place.exists() and old.exists():
                    old.rename(target)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
