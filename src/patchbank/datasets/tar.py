"""WebDataset tars: images listed from the members' headers. Nothing is extracted, and no data is read."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patchbank.datasets.folder import has_image_name, is_hidden
from patchbank.datasets.several import Content, reason_of
from patchbank.datasets.sources import Tar
from patchbank.locations import filesystem, is_remote, remote_errors

_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members
_LONGEST = 16 << 20  # bytes of a header; it may contain a long name
_REMOTE_BLOCK = 1 << 20  # a request for each header takes longer than reading small images
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def read_tar(place: Path) -> Content:
    """A tar's images, by their members' names; of members with one name the last one, as when a tar is unpacked.

    Members with an image's extension count, but not hidden ones and WebDataset's own ``__...__``. A damaged tar gives
    the images before the damage.
    """
    source = Tar(place)
    members: dict[str, tuple[int, int]] = {}
    damage = None
    try:
        with _opened(place) as file:
            damage = _read_members(file, members)
    except OSError as error:
        damage = reason_of(error)
    return Content(source, [(key, number, where) for number, (key, where) in enumerate(members.items())], damage)


@contextmanager
def _opened(place: Path) -> Iterator[Any]:
    """A tar open for reading and seeking. Raises OSError."""
    if not is_remote(place):
        with open(place, "rb") as file:
            yield file
        return
    with remote_errors(place):
        files, path = filesystem(place)
        with files.open(path, "rb", block_size=_REMOTE_BLOCK) as file:
            yield file


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


def _read_members(file: Any, members: dict[str, tuple[int, int]]) -> str | None:
    """Add the images' (offset, size) to `members`. Returns what is wrong with the tar; None if nothing is."""
    length = file.seek(0, 2)
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if compression := next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None):
        return f"it is compressed ({compression}), so that its images cannot be read one by one: unpack it to a .tar"
    last = "its beginning (is it a tar?)"
    try:
        with tarfile.TarFile(fileobj=_Headers(file), mode="r") as tar:  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.size < 0:
                    return f"damaged after {last}: a member of {member.size} bytes"
                if member.isreg():
                    key = member.name
                    while key.startswith("./"):
                        key = key[2:]
                    counts = has_image_name(key) and not is_hidden(key) and not _META.match(key)
                    if member.offset_data + member.size > length and not member.issparse():
                        return f"cut short: the data of {key!r} is not all there"
                    if counts and member.issparse():
                        return f"{key!r} is a sparse member, which has no one place to read: pack without --sparse"
                    if counts:
                        members.pop(key, None)
                        members[key] = member.offset_data, member.size
                    last = repr(key)
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
