"""WebDataset tars: their images listed from the members' headers. Nothing is extracted, and no data is read."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from patchbank.config import WHOLE, Partition
from patchbank.datasets.archives import Tar
from patchbank.datasets.folder import has_image_name, is_hidden
from patchbank.datasets.samples import Dataset
from patchbank.datasets.several import Content, expand, gather, reason_of
from patchbank.locations import filesystem, is_remote, remote_errors

_META = re.compile(r"__[^/]*__($|/)")  # what WebDataset keeps for itself
_LONGEST = 16 << 20  # bytes of a header, which may hold names of any length
_REMOTE_BLOCK = 1 << 20  # a request for each header would take longer than reading what lies between small images
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def load(
    patterns: str | PurePath | Iterable[str | PurePath], *, part: Partition = WHOLE, prefix: bool = False
) -> Dataset:
    """The images in a part of the tars, in the tars' order, by their members' names.

    A member counts if its name has an image's extension; hidden ones and WebDataset's own ``__...__`` do not. A tar
    that is damaged gives the images before the damage. Raises as `several.expand` and `several.gather`.
    """
    return gather("tar", expand(patterns), read_tar, part=part, prefix=prefix)


def read_tar(place: Path) -> Content:
    """A tar's images; of members of one name the last, as a tar means it."""
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
    """A tar's file to tarfile, which believes what a header says of its own length."""

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
    """Note the images' (offset, size) in `members`. Returns what is wrong with the tar, if anything."""
    length = file.seek(0, 2)
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if compression := next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None):
        return f"it is compressed ({compression}), so that images cannot be read by their place: unpack it to a .tar"
    last = "its beginning (is it a tar?)"
    try:
        with tarfile.TarFile(fileobj=_Headers(file), mode="r") as tar:  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would remember them all
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
                        return f"{key!r} is a sparse member, which cannot be read by its place: pack it plainly"
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
