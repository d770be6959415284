"""Files of `torch.save`: a zip of ``NAME/data.pkl`` and ``NAME/data/N``, each storage's numbers."""

from __future__ import annotations

import io
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from patchbank.files import is_plain
from patchbank.torch_pickles import Storage, storage_of
from patchbank.unpickling import MOST_BYTES, MOST_INSTRUCTIONS, Names, PickleError, interpret, short

_CHUNK = 1 << 20
_LOCAL_HEADER = 30  # bytes before an entry's content, at least


class Bounded(io.FileIO):
    """A file that reads at most `most` bytes at a time: `zipfile` reads a directory of any size at once."""

    most = MOST_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise PickleError("its zip directory is larger than any checkpoint's")
        return super().read(size) or b""


class Entries:
    """The entries of a zip, by their names without ``NAME/``."""

    def __init__(self, file: BinaryIO, most: int = MOST_BYTES) -> None:
        """
        Args:
            most: bytes of pickles and code to unpack, at most.

        Raises PickleError if entries overlap, are encrypted, or lie in several directories.
        """
        self._zip = zipfile.ZipFile(file)
        self._left = most
        infos = sorted(self._zip.infolist(), key=lambda info: info.header_offset)
        top = infos[0].filename.partition("/")[0] if infos else ""
        self._infos = {info.filename.removeprefix(f"{top}/"): info for info in infos}
        if len(self._infos) < len(infos):
            raise PickleError("its zip has two entries of one name")
        for info in infos:
            if not is_plain(info.filename) or not info.filename.startswith(f"{top}/"):
                raise PickleError(f"its zip has an entry {short(info.filename)!r}, which no archive of torch has")
            if info.flag_bits & 1:
                raise PickleError("its zip is encrypted")
        ends = [info.header_offset + _LOCAL_HEADER + info.compress_size for info in infos]
        starts = [info.header_offset for info in infos[1:]] + [self._zip.start_dir]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise PickleError("its zip has entries that overlap")

    def value(self, names: Names, most: int = MOST_INSTRUCTIONS) -> Any:
        """What was saved, its tensors as `View`s. Raises PickleError as `interpret` does."""
        if self.has("byteorder") and self.text("byteorder") != b"little":
            raise PickleError("its numbers are not in little-endian order")
        return interpret(io.BytesIO(self.text("data.pkl")), names, storage_of, most)

    def has(self, name: str) -> bool:
        return name in self._infos

    def text(self, name: str) -> bytes:
        """A pickle or a piece of code, whole."""
        info = self._info(name)
        self._left -= info.file_size
        if self._left < 0:
            raise PickleError(f"its {short(name)} is larger than any checkpoint's")
        with self._zip.open(info) as member:
            content = member.read(info.file_size)
        if len(content) != info.file_size:
            raise PickleError(f"its {short(name)} is cut short")
        return content

    def numbers(self, storage: Storage) -> Tensor:
        """A storage's bytes, (nbytes,) uint8. `zipfile` checks their CRC."""
        info = self._info(f"data/{storage.key}")
        if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size == storage.nbytes:
            raise PickleError(f"its storage {short(storage.key)!r} does not have the {storage.nbytes:,} bytes it says")
        with self._zip.open(info) as member:
            return numbers_of(member, storage)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise PickleError(f"it lacks {short(name)}")
        return self._infos[name]


def numbers_of(file: Any, storage: Storage) -> Tensor:
    """A storage's bytes, (nbytes,) uint8, read from a file's position. Raises PickleError if there are fewer."""
    numbers = torch.empty(storage.nbytes, dtype=torch.uint8)
    left = memoryview(numbers.numpy().data)
    while left:
        count = file.readinto(left[:_CHUNK])
        if not count:
            raise PickleError(f"its storage {short(storage.key)!r} is cut short")
        left = left[count:]
    return numbers
