"""The layout ``ezhoi``: one pickle a sample, named as EZ-HOI's reader expects it; the index lies in ``index/``."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Column, Feature, Kept, Payload, Rows
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.features import GRID
from patchbank.files import (
    fsync_directory,
    is_plain,
    is_scratch,
    make_directory,
    sha256_of,
    sha256_of_chunks,
    write_and_sync,
)

SUFFIX = "_clip.pkl"
INDEX = "index"  # the directory of the parts
PART_SIZE = 1024  # samples a part lists: each batch writes one part again
_AGAIN = "Delete it and run the same extraction again, which extracts what is missing."


def bank_directory(root: Path, dataset: str, layout: str = "ezhoi") -> Path:
    """Where EZ-HOI keeps a dataset's banks, ``ROOT/hicodet_pkl_files``; shards lie in ``ROOT/hicodet_shards``."""
    return root / f"{dataset}_{'pkl_files' if layout == 'ezhoi' else layout}"


def bank_name(prefix: str, dataset: str, split: str) -> str:
    """A bank's name as the original scripts give it: ``clipbase_img_hicodet_train``."""
    return f"{prefix}_img_{dataset}_{split}"


def pickle_name(key: str) -> str:
    """The key's file, relative to the bank: ``a.b.jpg`` -> ``a_clip.pkl``.

    The reader cuts a file name at its *first* dot. Directories in a key stay as they are.
    """
    directory, slash, name = key.rpartition("/")
    return f"{directory}{slash}{name.partition('.')[0]}{SUFFIX}"


def check_names(keys: Iterable[str]) -> None:
    """Raise BankError, naming both, if two keys share one pickle."""
    unique = dict.fromkeys(keys)
    if len({pickle_name(key) for key in unique}) == len(unique):
        return
    owners: dict[str, str] = {}
    for key in unique:
        name = pickle_name(key)
        if (other := owners.setdefault(name, key)) != key:
            raise BankError(
                f"{other!r} and {key!r} would share one pickle, {name}: EZ-HOI cuts names at their first dot. "
                "Rename one of them (and its entry in the annotations, if it has one). Nothing was written."
            )


def key_of(name: str) -> str | None:
    """The shortest key whose pickle this is, its extension being unknown; None where no key has such a pickle."""
    key = name.removesuffix(SUFFIX)
    return key if is_plain(key) and pickle_name(key) == name else None


def pickles_in(directory: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(name relative to `directory`, size in bytes) of every pickle in it, at any depth, scratch excepted."""
    try:
        with os.scandir(directory / below) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        if not below:
            raise
        return  # deleted a moment ago
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            if not is_scratch(entry.name):
                yield from pickles_in(directory, f"{below}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield below + entry.name, status.st_size


def file_bytes(manifest: Manifest) -> int:
    """The size of each feature's file."""
    import torch

    from patchbank.bank.pickling import pickle_bytes

    return pickle_bytes(manifest.shape, getattr(torch, manifest.dtype))


class Pickles(Payload):
    """The layout ``ezhoi``: features beside the index, a file each."""

    layout: ClassVar[Layout] = "ezhoi"
    pattern = re.compile(r"index-(\d{5,})-([0-9a-f]{16})\.json")
    name = "index-{:05}-{}.json"
    durable_at_once = True
    _numbers = itertools.count()

    def frame(self, document: str, manifest: Manifest, count: int) -> tuple[bytes, bytes]:
        """The document alone."""
        text = f"{document}\n".encode()
        return text, text

    def unframe(self, start: bytes, size: int, name: str) -> tuple[bytes, int]:
        """The whole file."""
        return start + (self.parts.read(name, len(start), size) if len(start) < size else b""), size

    def document_in(self, text: bytes) -> tuple[bytes, None]:
        """All of it."""
        return text, None

    def check(self, part: Part, rest: Any) -> None:
        """Pickles are looked at when they are read."""

    def keep(self, manifest: Manifest, feature: Feature, scratch: Path) -> Kept:
        """In a file of its own, under a temporary name."""
        parts = _pickle(manifest, feature)
        # Never the same name twice: where one write fails, others of the same call may still be under way.
        temporary = scratch / f"{next(self._numbers)}.part"
        write_and_sync(temporary, parts)
        final = self.bank / pickle_name(feature.key)
        return Kept(sha256_of_chunks(parts), {}, sum(memoryview(each).nbytes for each in parts), (temporary, final))

    def sha256(self, manifest: Manifest, feature: Feature) -> str:
        """Of the file."""
        return sha256_of_chunks(_pickle(manifest, feature))

    def place(self, kept: Mapping[str, Kept]) -> None:
        """Rename each file."""
        moves = [each.file for each in kept.values() if each.file]
        for temporary, final in moves:
            make_directory(final.parent)
            temporary.rename(final)
        for directory in {final.parent for _, final in moves}:
            fsync_directory(directory)

    def body(
        self,
        manifest: Manifest,
        features: Sequence[Entry],
        kept: Mapping[str, Kept],
        old: Rows,
    ) -> Iterator[Any]:
        """Nothing: the features lie beside it."""
        return iter(())

    def columns(self, part: Part, cache: Path | None = None) -> Mapping[str, Column]:
        """The one field, patch tokens."""
        return {GRID: _Files(self, part)}

    def present(self, entries: Mapping[str, Entry], manifest: Manifest) -> set[str]:
        """Keys whose files are there in full size."""
        usual, place = file_bytes(manifest), str(self.bank)
        keys: set[str] = set()
        for key, entry in entries.items():
            if entry.failure is None:
                try:  # no Path: making it takes as long as the system call
                    if os.stat(f"{place}/{pickle_name(key)}").st_size == usual:  # noqa: PTH116
                        keys.add(key)
                except (OSError, ValueError):  # ValueError: a name that no file can have
                    continue
        return keys

    def file(self, part: Part, key: str) -> Path:
        """The key's pickle."""
        return self.bank / pickle_name(key)

    def checksum(self, part: Part, row: int, columns: Mapping[str, Column]) -> str:
        """The SHA-256 of the key's file."""
        path = self.file(part, part.features[row].key)
        try:
            return sha256_of(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def bytes_on_disk(self, parts: Sequence[Part], entries: Mapping[str, Entry]) -> int:
        """The size of all features' files."""
        paths = [self.bank / pickle_name(key) for key, entry in entries.items() if entry.failure is None]
        return sum(path.stat().st_size for path in paths if path.exists())


class _Files:
    """The pickles of a part, as rows."""

    def __init__(self, payload: Pickles, part: Part) -> None:
        self._payload, self._part = payload, part

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        import torch

        from patchbank.bank.pickling import read_own
        from patchbank.bank.unpickling import read_pickle

        manifest, key = self._part.manifest, self._part.features[row].key
        path, dtype = self._payload.file(self._part, key), getattr(torch, manifest.dtype)
        try:
            tokens = read_own(path, manifest.shape, dtype)
        except OSError as error:
            raise _unreadable(path, error) from error
        if tokens is None:
            tokens = read_pickle(path)  # other code has written it again; or this says what it is
            if tuple(tokens.shape) != manifest.shape or tokens.dtype != dtype:
                raise BankError(
                    f"{path} holds {tuple(tokens.shape)} {tokens.dtype}, not the bank's {manifest.shape} {dtype}: "
                    f"other code wrote it. {_AGAIN}"
                )
        numbers: NDArray[np.uint8] = tokens.contiguous().view(torch.uint8).numpy().reshape(-1)
        return numbers


def _pickle(manifest: Manifest, feature: Feature) -> Sequence[bytes | memoryview]:
    """A feature's file, in pieces. Raises NotFiniteError."""
    from patchbank.bank.packing import pack
    from patchbank.bank.pickling import to_pickle

    return to_pickle(pack(manifest, feature.outputs)[GRID])


def _unreadable(path: Path, error: OSError) -> BankError:
    return BankError(f"{path} cannot be read: {error.strerror}. {_AGAIN}")
