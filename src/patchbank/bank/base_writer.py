"""What writing a bank means, whatever its layout: features and failures go in, and what is committed is durable."""

from __future__ import annotations

import errno
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from patchbank.bank.entries import Entry
from patchbank.bank.ledger import Snapshot
from patchbank.bank.manifest import Manifest
from patchbank.bank.removal import remove_bank
from patchbank.bank.shard import Shard
from patchbank.bank.storage import storage_of
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.files import bytes_text, free_bytes
from patchbank.locations import is_remote

# Checksums and flushes wait for the processor and the disk without Python's lock.
_THREADS = max(1, min(8, os.cpu_count() or 1))

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Feature(NamedTuple):
    """One image's features, to be written.

    Attributes:
        key: the image's.
        tokens: (N, D) patch tokens on the CPU, in any float dtype; the writer stores the bank's.
        size: (width, height) of the original image in pixels; None where that is not known.
        cls: (D,) the [CLS] token's feature; needed where the bank stores it, else passed over.
    """

    key: str
    tokens: Tensor
    size: tuple[int, int] | None
    cls: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.tokens.nbytes + (0 if self.cls is None else self.cls.nbytes)


def check_same(directory: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise BankError, naming what differs, where a bank is not what a run would make."""
    if differences := found.differences(wanted):
        mend = "Choose another directory, or start it anew with --overwrite, which deletes them."
        if found.adopted:
            mend += (
                f" `patchbank repair {directory} --extract` adds to adopted features what is missing, if they agree."
            )
        if found.decode != wanted.decode:  # what of the preprocessing an option decides on
            differences = [each for each in differences if each[0] != "preprocessing"]
            differences.append(("decode", found.decode, wanted.decode))
        listed = "\n".join(f"  {name}: the bank has {has}, this run {would}" for name, has, would in differences)
        raise BankError(f"{directory} is a bank of other features:\n{listed}\n{mend}")


class BankState(NamedTuple):
    """What a bank was found to hold, or what of it concerns some images.

    Attributes:
        done: keys whose features it has.
        failed: key -> reason.
        read: the ledger, or the shards' headers.
    """

    done: set[str]
    failed: dict[str, str]
    read: Snapshot | list[Shard]


NOTHING = BankState(set(), {}, [])


class BankWriter(ABC):
    """A bank open for writing; a context manager. Any number of them, in any processes, may write one bank.

    Attributes:
        directory: the bank's.
        manifest: of the bank, once it is entered: of the one that is there, or the one wanted.
        done: keys whose features the bank had when it was entered.
        settled, failed: how many of the images have a feature or a failure, and how many of these a failure, once the
            block has ended.
        notes: what a user should know, a sentence each.
        features_committed: made durable through this writer.
        bytes_written: of features.
    """

    manifest: Manifest
    done: set[str]

    def __init__(
        self,
        directory: Path,
        wanted: Manifest,
        positions: Mapping[str, int],
        *,
        overwrite: bool = False,
        known: BankState | None = None,
        helper: bool = False,
        about: str = "",
    ) -> None:
        """Not to be called: `writer.open_writer` chooses the layout's, and says what these are."""
        self.directory = directory
        self.notes: list[str] = []
        self.features_committed = 0
        self.bytes_written = 0
        self._wanted = wanted
        self._positions = positions
        self._overwrite = overwrite
        self._helper = helper
        self._about = about
        self.settled = self.failed = 0
        self._known = None if overwrite else known

    def _settle(self, entries: Mapping[str, Entry]) -> None:
        """Count what is there of the images."""
        settled = entries.keys() & self._positions.keys()
        self.settled, self.failed = len(settled), sum(entries[key].failure is not None for key in settled)

    def __enter__(self) -> Self:
        with self._storage_errors(), ExitStack() as stack:
            storage = storage_of(self.directory)
            if self._overwrite:
                remove_bank(self.directory)
            self._scratch = stack.enter_context(storage.scratch(self._about))
            self._threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="write"))
            self._begin()
            check_same(self.directory, self.manifest, self._wanted)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._storage_errors():
                    self._end()
        finally:
            self._stack.close()

    def add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]:
        """Take outcomes; they are durable once enough have come, and at the latest when the block ends.

        Returns:
            Failures of features that cannot be stored, since they are no finite numbers in the bank's dtype.

        Raises:
            BankError: the disk does not take them.
        """
        with self._storage_errors():
            return self._add(features, failures)

    def expect(self, positions: Mapping[str, int], known: BankState) -> None:
        """Be ready for images of which this is known; of those before, everything must have been committed.

        For a helper, which does not look at the bank itself.
        """
        with self._storage_errors():
            self._expect(positions, known)

    def sweep(self) -> None:
        """Remove what helpers left behind that died."""
        with self._storage_errors():
            storage_of(self.directory).sweep()

    def commit(self) -> None:
        """Make durable what has come. Raises BankError where the disk does not take it."""
        with self._storage_errors():
            self._commit()

    @property
    @abstractmethod
    def state(self) -> BankState:
        """What the bank holds, as far as this writer knows."""

    @abstractmethod
    def has(self, feature: Feature) -> bool:
        """Whether the bank lists exactly this feature. Raises NotFiniteError as `packing.pack` does."""

    @abstractmethod
    def _begin(self) -> None:
        """Find out what is there: set `manifest` and `done`."""

    @abstractmethod
    def _add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]: ...

    @abstractmethod
    def _expect(self, positions: Mapping[str, int], known: BankState) -> None: ...

    @abstractmethod
    def _commit(self) -> None: ...

    @abstractmethod
    def _end(self) -> None:
        """Commit what has not been, and tidy up, unless it is a helper's: then others do."""

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            safe = f"What was committed is safe ({self.features_committed:,} features of this run)."
            if error.errno in _FULL:
                place = Path(tempfile.gettempdir()) if is_remote(self.directory) else self.directory
                free = bytes_text(free_bytes(place))
                raise BankError(
                    f"The disk is full: {place} takes no more ({error.strerror}; {free} free). "
                    f"{safe} Free some space and run the same command again: it goes on from here."
                ) from error
            raise BankError(
                f"{error.filename or self.directory} cannot be written: {error.strerror or error}. {safe}"
            ) from error
