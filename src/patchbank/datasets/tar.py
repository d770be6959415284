"""WebDataset tars: images listed from the members' headers. Nothing is extracted, and no data is read."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from typing import Any

from patchbank.datasets.folder import has_image_name, is_hidden
from patchbank.datasets.several import Content, reason_of
from patchbank.datasets.sources import Tar
from patchbank.locations import open_file, remote_errors

_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members
_LONGEST = 16 << 20  # bytes of a header; it may contain a long name
_REMOTE_BLOCK = 1 << 20  # a request for each header takes longer than reading small images
_ZEROS = 1 << 20  # bytes that are read at once after a tar's end
_Member = tuple[int, int] | str  # (offset, size), or why it cannot be read
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def read_tar(place: Path) -> Content:
    """A tar's images, by their members' names; of members with one name the last one, as when a tar is unpacked.

    Members with an image's extension count, but not hidden ones and WebDataset's own ``__...__``. A damaged tar gives
    the images before the damage.
    """
    source = Tar(place)
    members: dict[str, _Member] = {}
    damage = None
    try:
        with remote_errors(place), open_file(place, _REMOTE_BLOCK) as file:
            damage = _read_all(file, members)
    except OSError as error:
        damage = reason_of(error)
    refused = {key: where for key, where in members.items() if isinstance(where, str)}
    places = ((key, where) for key, where in members.items() if not isinstance(where, str))
    return Content(source, [(key, number, where) for number, (key, where) in enumerate(places)], damage, refused)


class _Headers:
    """A file for tarfile, which would read a header of any length that the header states."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.name = None
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        content: bytes = self._file.read(size)
        return content


def _read_all(file: Any, members: dict[str, _Member]) -> str | None:
    """Add the images of a tar, and of those that were appended to it as `cat` does. Returns as `_read_members`."""
    start = file.read(6)
    if compression := next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None):
        return f"it is compressed ({compression}), so that its images cannot be read one by one: unpack it to a .tar"
    length, offset = file.seek(0, 2), 0
    while True:
        file.seek(offset)
        if damage := _read_members(file, members, length):
            return damage
        while not any(block := file.read(_ZEROS)) and block:  # an end is padded with zeros
            pass
        if not block:
            return None
        first = next(index for index, byte in enumerate(block) if byte) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        offset = file.tell() - len(block) + first
        try:
            tarfile.TarInfo.frombuf(block[first : first + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        except tarfile.TarError:  # no further tar, and no part of this one
            return None


def _read_members(file: Any, members: dict[str, _Member], length: int) -> str | None:
    """Add the images of the tar that begins here. Returns what is wrong with it; None if nothing is.

    Then the file is behind the first block of the tar's end.
    """
    last = "its beginning (is it a tar?)"
    try:
        with tarfile.TarFile(fileobj=_Headers(file), mode="r") as tar:  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.size < 0:
                    return f"damaged after {last}: a member of {member.size} bytes"
                if not (member.isreg() or member.islnk()):
                    continue
                key = _key(member.name)
                last = repr(key)
                if member.isreg() and not member.issparse() and member.offset_data + member.size > length:
                    return f"cut short: the data of {key!r} is not all there"
                if has_image_name(key) and not is_hidden(key) and not _META.match(key):
                    where = _where(member, members)
                    members.pop(key, None)
                    members[key] = where
            file.seek(tar.offset)
            header = file.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        return f"damaged after {last}: {error}"
    except (ValueError, OverflowError, RecursionError, IndexError, KeyError) as error:
        return f"damaged after {last}: {type(error).__name__} in a header"
    if not header:
        return f"cut short after {last}: the mark of a tar's end is missing"
    if len(header) < tarfile.BLOCKSIZE:
        return f"cut short after {last}, within a header"
    return f"damaged after {last}: what follows is no header" if any(header) else None


def _key(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name


def _where(member: tarfile.TarInfo, members: dict[str, _Member]) -> _Member:
    if member.islnk():
        target = _key(member.linkname)
        return members.get(target, f"a hard link to {target!r}, which is no image before it in the tar")
    if member.issparse():
        return "a sparse member, which has no one place to read: pack without --sparse"
    return member.offset_data, member.size
