"""Writing a bank: which keys are left to do, and durable commits of what is done."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from patchbank.bank import ezhoi, manifest
from patchbank.bank.ledger import Entry, Ledger, read_ledger, remove_ledger
from patchbank.bank.manifest import Manifest
from patchbank.bank.pickles import pickle_bytes, to_pickle
from patchbank.errors import BankError
from patchbank.files import bytes_text, fsync_directory, make_directory, scratch_directory, write_and_sync
from patchbank.preprocess import Failure

_BLOCK = 4096  # bytes that a file's size is rounded up to on usual file systems
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Feature(NamedTuple):
    """One image's patch tokens, to be written.

    Attributes:
        key: the image's.
        tokens: (N, D) on the CPU, in any float dtype; the writer stores the bank's.
        size: (width, height) of the original image in pixels.
    """

    key: str
    tokens: Tensor
    size: tuple[int, int]


def existing_manifest(directory: Path, wanted: Manifest, *, overwrite: bool) -> Manifest | None:
    """The manifest of the bank that a run would complete; None where it would start one.

    Raises BankError where the directory may not be written to as `wanted`: it holds another bank, or pickles of
    unknown making. Writes nothing.
    """
    if directory.exists() and not directory.is_dir():
        raise BankError(f"{directory} is a file; a bank is a directory. Choose another --out.")
    if overwrite:
        return None
    if not (directory / manifest.FILE_NAME).exists():
        if directory.is_dir() and next(ezhoi.pickles_in(directory), None):
            raise BankError(
                f"{directory} holds pickles but no {manifest.FILE_NAME}: patchbank did not make them and cannot "
                "tell whether they are right. Choose another --out, or start it anew with --overwrite, which "
                "deletes them."
            )
        return None
    found = Manifest.read(directory)
    _refuse_another(directory, found, wanted)
    return found


def _refuse_another(directory: Path, found: Manifest, wanted: Manifest) -> None:
    differences = [
        (name, getattr(found, name), getattr(wanted, name))
        for name in ("layout", "dataset", "split")
        if getattr(found, name) != getattr(wanted, name)
    ] + found.fingerprint.differences(wanted.fingerprint)
    if differences:
        listed = "\n".join(f"  {name}: the bank has {has}, this run {would}" for name, has, would in differences)
        raise BankError(
            f"{directory} is a bank of other features:\n{listed}\n"
            "Choose another --out, or start it anew with --overwrite, which deletes them."
        )


def disk_bytes(entry_count: int, like: Manifest) -> int:
    """What so many images take on the disk, ledger included."""
    return entry_count * (-(-_file_size(like) // _BLOCK) * _BLOCK + 256)


def _file_size(like: Manifest) -> int:
    dtype: torch.dtype = getattr(torch, like.dtype)
    return pickle_bytes(like.shape, dtype)


def bank_state(directory: Path, like: Manifest) -> tuple[set[str], dict[str, str]]:
    """(keys whose features a bank has, key -> reason of those that failed). Writes nothing."""
    if not directory.is_dir():
        return set(), {}
    entries = read_ledger(directory, damaged="skip")
    failed = {key: entry.failure for key, entry in entries.items() if entry.failure}
    return _present(directory, entries, like), failed


def _present(directory: Path, entries: Mapping[str, Entry], like: Manifest) -> set[str]:
    """Keys that the ledger lists and whose files are there in full size."""
    size = _file_size(like)
    names = {name for name, found in ezhoi.pickles_in(directory) if found == size}
    return {key for key, entry in entries.items() if not entry.failure and ezhoi.pickle_name(key) in names}


class BankWriter:
    """A bank open for writing; a context manager. Any number of them, in any processes, may write one bank."""

    def __init__(self, directory: Path, wanted: Manifest, *, overwrite: bool = False) -> None:
        """Raises BankError where the directory holds another bank or strangers' pickles; see `existing_manifest`."""
        existing_manifest(directory, wanted, overwrite=overwrite)
        self.directory = directory
        self.bytes_written = 0
        self._wanted = wanted
        self._overwrite = overwrite

    def __enter__(self) -> Self:
        with _storage_errors(self.directory), ExitStack() as stack:
            make_directory(self.directory)
            if self._overwrite:
                _remove_bank(self.directory)
            self._scratch = stack.enter_context(scratch_directory(self.directory))
            self.manifest = self._wanted.create(self.directory, self._scratch)
            _refuse_another(self.directory, self.manifest, self._wanted)
            self._ledger = Ledger(self.directory, self._scratch)
            self._dtype: torch.dtype = getattr(torch, self.manifest.dtype)
            self.done = _present(self.directory, self._ledger.entries, self.manifest)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _storage_errors(self.directory):
                    self._ledger.compact()
        finally:
            self._stack.close()

    def commit(self, features: Sequence[Feature], failures: Sequence[Failure]) -> None:
        """Make features durable, and then say so in the ledger. Raises BankError where the disk does not take them."""
        with _storage_errors(self.directory):
            entries = [Entry(failure.key, failure=failure.reason) for failure in failures]
            moves: list[tuple[Path, Path]] = []
            for number, feature in enumerate(features):
                temporary = self._scratch / f"{number}.part"
                sha256 = self._write(temporary, feature.tokens)
                moves.append((temporary, self.directory / ezhoi.pickle_name(feature.key)))
                entries.append(Entry(feature.key, feature.size, sha256))
            for temporary, path in moves:
                make_directory(path.parent)
                temporary.rename(path)
            for directory in {path.parent for _, path in moves}:
                fsync_directory(directory)
            if entries:
                self._ledger.append(entries)

    def _write(self, path: Path, tokens: Tensor) -> str:
        """Write one tensor as the bank stores it; returns the file's SHA-256."""
        parts = to_pickle(tokens.to(self._dtype))
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
            self.bytes_written += len(part)
        write_and_sync(path, parts)
        return digest.hexdigest()


def removable(directory: Path) -> list[Path]:
    """The features that starting a bank anew deletes: those it lists, and what pickles lie in its directory.

    Pickles in subdirectories that the bank does not list are left alone: they may be other banks.
    """
    names = {ezhoi.pickle_name(key) for key in read_ledger(directory, damaged="skip")}
    paths = {directory / name for name in names} | set(directory.glob(f"*{ezhoi.SUFFIX}"))
    return [path for path in paths if path.is_file()]


def _remove_bank(directory: Path) -> None:
    features = removable(directory)
    remove_ledger(directory)
    for path in features:
        path.unlink(missing_ok=True)
    (directory / manifest.FILE_NAME).unlink(missing_ok=True)  # last: until then it is a bank, if an emptier one


@contextmanager
def _storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(directory).free
            raise BankError(
                f"The disk is full: {directory} takes no more ({error.strerror}; {bytes_text(free)} free). "
                "What is committed is safe. Free some space and run the same command again: it goes on from here."
            ) from error
        raise BankError(
            f"{error.filename or directory} cannot be written: {error.strerror or error}. What is committed is safe."
        ) from error
