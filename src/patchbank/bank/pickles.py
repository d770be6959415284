"""The layout ``ezhoi``: one pickle a sample, with the name that EZ-HOI's reader expects; ``index/`` is the index."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Column, Feature, Kept, Payload, Pieces
from patchbank.bank.pickling import pickle_bytes, read_own, to_pickle
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.features import GRID
from patchbank.files import is_plain, is_scratch, nearest_existing, sha256_of, write_and_sync

SUFFIX = "_clip.pkl"
INDEX = "index"  # the directory of the parts
PART_SIZE = 1024  # samples in a part, which each of its batches writes again
_AGAIN = "Delete it and run the same extraction again, which extracts what is missing."


def bank_directory(root: Path, dataset: str, layout: str = "ezhoi") -> Path:
    """Where EZ-HOI keeps a dataset's banks, ``ROOT/hicodet_pkl_files``; for shards, ``ROOT/hicodet_shards``."""
    return root / f"{dataset}_{'pkl_files' if layout == 'ezhoi' else layout}"


def bank_name(prefix: str, dataset: str, split: str, variant: str = "") -> str:
    """A bank's name as the original scripts give it: ``clipbase_img_hicodet_train``; `variant` tells others apart."""
    return f"{prefix}_img_{dataset}_{split}{variant}"


def pickle_name(key: str) -> str:
    """The key's file, relative to the bank: ``a.b.jpg`` -> ``a_clip.pkl``.

    The reader cuts a file name at its *first* dot. Directories in a key stay as they are.
    """
    dot = key.find(".", key.rfind("/") + 1)
    return f"{key if dot < 0 else key[:dot]}{SUFFIX}"


def check_names(keys: Iterable[str], bank: Path | None = None) -> None:
    """Raise BankError, naming them, if two keys share one pickle, or the bank's disk takes no file of a key's name."""
    unique = dict.fromkeys(keys)
    folds = bank is not None and _folds_case(bank)
    names = [pickle_name(key) for key in unique]
    if len({name.lower() for name in names} if folds else {*names}) < len(unique):
        owners: dict[str, str] = {}
        for key, name in zip(unique, names, strict=True):
            if (other := owners.setdefault(name.lower() if folds else name, key)) != key:
                shared = pickle_name(other) == name
                why = "EZ-HOI cuts names at their first dot" if shared else f"{bank}'s disk takes A and a for the same"
                raise BankError(
                    f"{other!r} and {key!r} would share one pickle, {name}: {why}. "
                    "Rename one of them (and its entry in the annotations, if it has one). Nothing was written."
                )
    longest = 0 if bank is None else os.pathconf(nearest_existing(bank), "PC_NAME_MAX")
    for key, name in zip(unique, names, strict=True):
        if longest and 4 * len(name) > longest and max(map(len, os.fsencode(name).split(b"/"))) > longest:
            raise BankError(
                f"{key!r} would have a pickle whose name is longer than the {longest} bytes that the disk takes: "
                f"{name}. Rename it (and its entry in the annotations, if it has one), or use --layout shards. "
                "Nothing was written."
            )


def _folds_case(bank: Path) -> bool:
    """Whether a directory's file system takes names that differ by case alone for the same."""
    place = nearest_existing(bank)
    other = place.with_name(place.name.swapcase())
    return other.name != place.name and other.exists() and other.samefile(place)


def key_of(name: str) -> str | None:
    """The shortest key with this pickle, without the unknown extension; None if no key has such a pickle."""
    key = name.removesuffix(SUFFIX)
    return key if is_plain(key) and pickle_name(key) == name else None


def pickles_in(directory: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(name relative to `directory`, size in bytes) of every pickle in it, at any depth, except in scratch."""
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
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):  # deleted a moment ago, or a link to itself
                    continue
                raise
            if stat.S_ISREG(status.st_mode):
                yield below + entry.name, status.st_size


def file_bytes(manifest: Manifest) -> int:
    """The size of each feature's file."""
    return pickle_bytes(manifest.shape, manifest.dtype)


class Pickles(Payload):
    """The layout ``ezhoi``: features beside the index, a file each."""

    layout: ClassVar[Layout] = "ezhoi"
    pattern = re.compile(r"index-(\d{5,})-([0-9a-f]{16})\.json")
    name = "index-{:05}-{}.json"
    durable_at_once = True
    _numbers = itertools.count()

    def pieces(self, manifest: Manifest, feature: Feature) -> Pieces:
        """A pickle of the patch tokens."""
        from patchbank.bank.packing import pack

        return to_pickle(pack(manifest, feature.outputs)[GRID])

    def keep(self, key: str, pieces: Pieces, scratch: Path) -> Kept:
        """In a file of its own, under a temporary name."""
        # Never the same name twice: when one write fails, others of the same call may still be under way.
        temporary = scratch / f"{next(self._numbers)}.part"
        write_and_sync(temporary, pieces)
        return super().keep(key, pieces, scratch)._replace(pieces=(), file=(temporary, self.bank / pickle_name(key)))

    def columns(self, part: Part, cache: Path | None = None, *, mmap: bool = True) -> Mapping[str, Column]:
        """The one field, patch tokens."""
        return {GRID: partial(self._tokens, part)}

    def _tokens(self, part: Part, row: int, count: int = 1, into: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        import torch

        from patchbank.bank.unpickling import read_pickle

        shape, dtype = part.manifest.shape, getattr(torch, part.manifest.dtype)
        path = f"{self.bank}/{pickle_name(part.features[row].key)}"  # no Path: making it takes longer than opening it
        try:
            if (numbers := read_own(path, shape, dtype, into)) is not None:
                return numbers
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise _unreadable(Path(path), error) from error
        tokens = read_pickle(Path(path))  # other code has written it, or this raises
        if tuple(tokens.shape) != shape or tokens.dtype != dtype:
            raise BankError(
                f"{path} holds {tuple(tokens.shape)} {tokens.dtype}, not the bank's {shape} {dtype}: other code "
                f"wrote it. {_AGAIN}"
            )
        found: NDArray[np.uint8] = tokens.contiguous().view(torch.uint8).numpy().reshape(-1)
        if into is None:
            return found
        into[:] = found
        return into

    def present(self, entries: Mapping[str, Entry], manifest: Manifest) -> set[str]:
        """Keys whose files exist in full size."""
        usual, keys, stat = file_bytes(manifest), set[str](), os.stat
        stored = [key for key, entry in entries.items() if entry.failure is None]
        place = os.open(self.bank, os.O_RDONLY)
        try:
            # In the index's order: files of one directory lie side by side.
            for key, name in zip(stored, map(pickle_name, stored), strict=True):
                try:  # no Path: making it takes as long as the system call
                    if stat(name, dir_fd=place).st_size == usual:
                        keys.add(key)
                except (OSError, ValueError):  # ValueError: a name that no file can have
                    continue
        finally:
            os.close(place)
        return keys

    def file(self, part: Part, key: str) -> Path:
        """The key's pickle."""
        return self.bank / pickle_name(key)

    def checksum(self, part: Part, row: int, columns: Mapping[str, Column]) -> str:
        """The SHA-256 of the key's file."""
        path = self.file(part, part.features[row].key)
        try:
            return sha256_of(path)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error

    def bytes_on_disk(self, parts: Sequence[Part], entries: Mapping[str, Entry]) -> int:
        """The size of all features' files."""
        total = 0
        for key, entry in entries.items():
            if entry.failure is None:
                with contextlib.suppress(OSError, ValueError):
                    total += (self.bank / pickle_name(key)).stat().st_size
        return total


def _unreadable(path: Path, error: OSError | ValueError) -> BankError:
    return BankError(f"{path} cannot be read: {getattr(error, 'strerror', error)}. {_AGAIN}")
