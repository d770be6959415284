"""The ``ezhoi`` layout: one pickle an image, named as EZ-HOI's reader expects it. Names, and reading."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.bank.ledger import read_ledger
from patchbank.bank.manifest import Manifest
from patchbank.errors import BankError
from patchbank.files import is_plain, is_scratch, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = "_clip.pkl"
_AGAIN = "Delete it and run the same extraction again: it makes anew what is missing."


def bank_directory(root: Path, dataset: str, layout: str = "ezhoi") -> Path:
    """Where EZ-HOI keeps a data set's banks, ``ROOT/hicodet_pkl_files``; shards lie in ``ROOT/hicodet_shards``."""
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
    """(name relative to `directory`, size in bytes) of every pickle in it, at any depth; scratch is passed over."""
    try:
        with os.scandir(directory / below) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        if not below:
            raise
        return  # it was there a moment ago
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


class PickleStore:
    """The features in a bank of pickles. It holds no open file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.manifest = Manifest.read(directory)
        self.entries = read_ledger(directory)

    def tokens(self, key: str) -> Tensor:
        """(N, D) newly made. Raises BankError where the file is missing, damaged, or holds something else."""
        import torch  # here, so that what asks for no tensor needs no torch

        from patchbank.bank.pickles import read_own
        from patchbank.bank.unpickling import read_pickle

        path = self.file(key)
        dtype: torch.dtype = getattr(torch, self.manifest.dtype)
        try:
            tokens = read_own(path, self.manifest.shape, dtype)
        except OSError as error:
            raise BankError(f"{path} cannot be read: {error.strerror}. {_AGAIN}") from error
        if tokens is not None:
            return tokens
        found = read_pickle(path)  # an adopted one; or it says what it is instead
        if tuple(found.shape) != self.manifest.shape or found.dtype != dtype:
            raise BankError(
                f"{path} holds {tuple(found.shape)} {found.dtype}, not the bank's {self.manifest.shape} {dtype}: "
                f"something else wrote it. {_AGAIN}"
            )
        return found.contiguous()

    def cls(self, key: str) -> Tensor:
        """Raises BankError: pickles hold patch tokens alone."""
        raise BankError(f"{self._directory} has no [CLS] feature of {key!r}: pickles hold patch tokens alone.")

    def checksum(self, key: str) -> str:
        """The SHA-256 of the key's file as it is now. Raises BankError where it cannot be read."""
        try:
            return sha256_of(self.file(key))
        except OSError as error:
            raise BankError(f"{self.file(key)} cannot be read: {error.strerror}. {_AGAIN}") from error

    def file(self, key: str) -> Path:
        """The key's pickle."""
        return self._directory / pickle_name(key)

    def bytes_on_disk(self) -> int:
        """Of all features' files together."""
        paths = [self.file(key) for key, entry in self.entries.items() if entry.failure is None]
        return sum(path.stat().st_size for path in paths if path.exists())
