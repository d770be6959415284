"""Writing a bank: features and failures go in, and what is committed is durable.

Sample i of a dataset belongs to part ``i // part_size`` of the index. Pickles are written with every batch, and their
part with them; a shard waits in memory until its samples are there. A run that is stopped commits what it has, and a
later one puts a more complete part in its place. The names of the two differ, and the first is deleted only when the
second is durable.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part, Row, failures_of, join, joined, rows_of
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import NotFiniteError, sample_bytes
from patchbank.bank.parts import manifest_in, name_part, payload_of, read_parts, third_party
from patchbank.bank.payload import Feature, Kept, Payload, Rows
from patchbank.bank.pickles import file_bytes
from patchbank.bank.removal import remove_bank
from patchbank.bank.storage import storage_of
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.files import DAMAGED, bytes_text, free_bytes, make_directory, nearest_existing, write_and_sync
from patchbank.locations import is_remote

# Checksums and flushes wait for the processor and the disk without Python's lock.
_THREADS = max(1, min(8, os.cpu_count() or 1))
_ATTEMPTS = 8  # at a part, while other processes go on writing
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 4096  # bytes that a file's size is rounded up to on usual file systems
_ENTRY = 256  # bytes of the index for each sample, about


class BankState(NamedTuple):
    """What a bank holds, or what of it concerns some samples.

    Attributes:
        done: keys whose features it has.
        failed: key -> reason.
        parts: of its index.
    """

    done: set[str]
    failed: dict[str, str]
    parts: Sequence[Part]


def check_same(bank: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise BankError, naming what differs, where a bank is not what a run would make."""
    if differences := found.differences(wanted):
        listed = "\n".join(f"  {name}: the bank has {has}, this run {would}" for name, has, would in differences)
        raise BankError(
            f"{bank} was created with a different configuration:\n{listed}\n"
            "Choose another directory, or start from scratch with --overwrite, which deletes its features."
        )


def existing_manifest(bank: Path, *, overwrite: bool) -> Manifest | None:
    """The manifest of the bank that a run would complete; None where it would start one.

    Raises BankError where no bank can be there: it is a file, or holds third-party pickles. Writes nothing.
    """
    if is_remote(bank):
        return None if overwrite else manifest_in(bank)
    if not (place := nearest_existing(bank)).is_dir():
        raise BankError(f"{place} is a file; a bank is a directory. Choose another --out.")
    if overwrite:
        return None
    if third_party(bank):
        raise BankError(
            f"{bank} holds pickles without an index: other code made them, and nothing says whether they are right. "
            f"`patchbank verify {bank}` looks into them, and `patchbank import` makes a bank of them. Else choose "
            "another --out, or start from scratch with --overwrite, which deletes them."
        )
    return manifest_in(bank)


def check_location(bank: Path, layout: str) -> None:
    """Raise BankError where a layout cannot lie in a place."""
    if layout == "ezhoi" and is_remote(bank):
        raise BankError(
            f"{bank}: a bank in an object store has the layout shards. Add --layout shards, or extract to a path."
        )


def disk_bytes(count: int, like: Manifest) -> int:
    """Bytes that so many samples take on the disk, with their share of the index."""
    if like.layout == "ezhoi":
        return count * (-(-file_bytes(like) // _BLOCK) * _BLOCK + _ENTRY)
    return count * (sample_bytes(like.outputs) + _ENTRY)


def check_room(place: Path, needed: int, elsewhere: str) -> None:
    """Raise BankError where a disk has not so many bytes free. `elsewhere`: what a user chooses another of."""
    if needed > (free := free_bytes(place)):
        raise BankError(
            f"Not enough disk: the features need {bytes_text(needed)} and {place} has {bytes_text(free)} free. "
            f"Free some space, choose another {elsewhere}, or store them in half the space with --dtype float16."
        )


def bank_state(bank: Path, like: Manifest) -> BankState:
    """What a bank holds. Writes nothing."""
    payload = payload_of(bank, like.layout)
    parts = read_parts(payload, "skip")
    entries = joined(parts)
    return BankState(payload.present(entries, like), failures_of(entries), parts)


class BankWriter:
    """A bank open for writing; a context manager. Any number of them, in any processes, may write one bank.

    Attributes:
        bank: its directory or URL.
        manifest: of the bank, once it is entered: of the one that exists, or the one wanted.
        done: keys whose features the bank had when it was entered.
        settled, failed: how many of the samples have a feature or a failure, and how many a failure, once the block has
            ended.
        notes: what a user should know, a sentence each.
        features_committed: made durable through this writer.
        bytes_written: of features.
    """

    manifest: Manifest
    done: set[str]

    def __init__(
        self,
        bank: Path,
        wanted: Manifest,
        positions: Mapping[str, int] | Sequence[str],
        *,
        overwrite: bool = False,
        known: BankState | None = None,
        helper: bool = False,
        about: str = "",
    ) -> None:
        """
        Args:
            wanted: what the bank is to be.
            positions: key -> position of all samples that the bank is made for, not only a part's; or the keys in
                order.
            overwrite: delete the bank first.
            known: what the bank held a moment ago; its parts are not read again.
            helper: it writes some of the samples for a process that does all else: it does not look at the bank (that
                process says what is there, by `expect`), and tidies up nothing.
            about: what `files.live_scratches` gives other runs.

        Raises:
            BankError: the directory holds another bank or third-party pickles; see `existing_manifest`.
        """
        if not helper and (existing := existing_manifest(bank, overwrite=overwrite)):
            check_same(bank, existing, wanted)
        check_location(bank, wanted.layout)
        if not isinstance(positions, Mapping):
            positions = {key: position for position, key in enumerate(positions)}
        self.bank = bank
        self.notes: list[str] = []
        self.features_committed = 0
        self.bytes_written = 0
        self.settled = self.failed = 0
        self._wanted = wanted
        self._positions = positions
        self._overwrite = overwrite
        self._known = None if overwrite else known
        self._helper = helper
        self._about = about
        self._current: int | None = None  # the number of the part that samples go to
        self._payload = payload_of(bank, wanted.layout)

    def __enter__(self) -> Self:
        with self._storage_errors(), ExitStack() as stack:
            if self._overwrite:
                remove_bank(self.bank)
            self._scratch = stack.enter_context(storage_of(self.bank).scratch(self._about))
            if not is_remote(self.bank):
                make_directory(self._payload.parts.directory)  # it says that the pickles are ours
            self._threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="write"))
            self._begin()
            check_same(self.bank, self.manifest, self._wanted)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._helper:  # what a helper did not commit is done again
                with self._storage_errors():
                    self._end()
        finally:
            self._stack.close()

    def add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]:
        """Take outcomes; they are durable once enough have come, and at the latest when the block ends.

        They come in the order of the positions, as far as parts are concerned; else parts are written more than once.

        Returns:
            Failures of features that cannot be stored, since they are no finite numbers in the bank's dtype.

        Raises:
            BankError: the disk does not take them.
        """
        with self._storage_errors():
            kept = list(self._threads.map(self._keep, features))
            outcomes = [*kept, *((Entry(failure.key, failure=failure.reason), None) for failure in failures)]
            for entry, what in sorted(outcomes, key=lambda each: self._positions[each[0].key]):
                if (number := self._number(entry.key)) != self._current:
                    self._commit()
                    self._current = number
                entry = entry.after(self._entries.get(entry.key))
                self._new[entry.key] = entry
                if what is not None:
                    self._kept[entry.key] = what
            if self._payload.durable_at_once:
                self._commit()
            return [Failure(entry.key, entry.failure) for entry, _ in kept if entry.failure is not None]

    def expect(self, positions: Mapping[str, int], known: BankState) -> None:
        """Be ready for other samples, all that came before being committed.

        For a helper, which does not look itself.
        """
        self._positions = positions
        self._new: dict[str, Entry] = {}
        self._kept: dict[str, Kept] = {}
        self._parts = list(known.parts)
        self._entries = joined(self._parts)
        self.done = known.done
        self._numbers: dict[str, int | None] = {}
        self._current = None
        self._commits = 0

    def sweep(self) -> None:
        """Remove what helpers left behind that died."""
        with self._storage_errors():
            storage_of(self.bank).sweep()

    def commit(self) -> None:
        """Make durable what has come. Raises BankError where the disk does not take it."""
        with self._storage_errors():
            self._commit()

    @property
    def state(self) -> BankState:
        """What the bank holds, as far as this writer knows."""
        return BankState(self.done, failures_of(self._entries), self._parts)

    def has(self, feature: Feature) -> bool:
        """Whether the bank lists exactly this feature. Raises NotFiniteError as `packing.pack` does."""
        entry = self._entries.get(feature.key)
        return entry is not None and entry.sha256 == self._payload.sha256(self.manifest, feature)

    def _begin(self) -> None:
        """Find out what is there."""
        parts: list[Part] = []
        if not self._helper:
            before = self._quarantined()
            parts = read_parts(self._payload, "quarantine", self._known.parts if self._known else ())
            if damaged := sorted(self._quarantined() - before):
                self.notes.append(
                    f"Damaged parts are in quarantine; their samples are done again: {', '.join(damaged)}."
                )
        self.manifest = parts[0].manifest if parts else self._wanted
        self.expect(self._positions, BankState(set(), {}, parts))
        # Looked at again, though no part has changed: a pickle may have vanished since the plan.
        self.done = self._payload.present(self._entries, self.manifest)

    def _quarantined(self) -> set[str]:
        return {name for name in self._payload.parts.names() if name.endswith(DAMAGED)}

    def _end(self) -> None:
        """Commit what has not been, and merge parts of which several processes wrote one each."""
        self._commit()
        self._read()
        counts = Counter(number for part in self._parts if (number := self._only_number(part)) is not None)
        for number, count in counts.items():
            if count > 1:
                self._write(number)
        entries = joined(self._parts)
        settled = entries.keys() & self._positions.keys()
        self.settled, self.failed = len(settled), sum(entries[key].failure is not None for key in settled)

    def _keep(self, feature: Feature) -> tuple[Entry, Kept | None]:
        """Called from several threads."""
        try:
            kept = self._payload.keep(self.manifest, feature, self._scratch)
        except NotFiniteError as error:
            return Entry(feature.key, failure=str(error)), None
        return Entry(feature.key, feature.size, kept.sha256), kept

    def _commit(self) -> None:
        if self._current is None or not self._new:
            return
        self._payload.place(self._kept)
        self._write(self._current)
        join(self._entries, self._new.values())
        self.features_committed += len(self._kept)
        self.bytes_written += sum(kept.bytes for kept in self._kept.values())
        self._new, self._kept = {}, {}

    def _read(self) -> None:
        """Read the parts of now. Raises BankError where another run has made some of other features."""
        self._parts = read_parts(self._payload, "skip", self._parts)
        if self._parts:
            check_same(self.bank, self._parts[0].manifest, self.manifest)

    def _write(self, number: int) -> None:
        """Put one part in the place of all that hold samples of this number alone, with what has come beside.

        Parts that hold samples of several numbers, as a dataset that has grown leaves them, stay as they are.
        """
        # What other processes have written meanwhile is looked for now and then, to notice a run of other features;
        # what they wrote of this very part is joined with it at the end. Each time would be a listing a part.
        self._commits += 1
        if not self._helper and self._commits & (self._commits - 1) == 0:
            self._read()
        for attempt in range(_ATTEMPTS):
            try:
                return self._write_once(number)
            except FileNotFoundError:  # another process has put a more complete part in the place of one read here
                if attempt == _ATTEMPTS - 1:
                    raise
                self._read()
        return None

    def _write_once(self, number: int) -> None:
        payload = self._payload
        replaced = [part for part in self._parts if self._only_number(part) == number]
        entries = joined(replaced)
        rows = rows_of(replaced, entries)
        join(entries, self._new.values())
        ordered = sorted(entries.values(), key=lambda entry: self._positions[entry.key])
        features = tuple(entry for entry in ordered if entry.failure is None)
        failures = tuple(entry for entry in ordered if entry.failure is not None)
        part = Part(payload.parts.directory, self.manifest, number, features, failures, 0, 0)
        start, name = name_part(payload, part)
        path = payload.parts.directory / name
        known = next((each for each in replaced if each.path == path), None)
        if known is None:
            kept = {key: each for key, each in self._kept.items() if entries[key] == self._new[key]}
            old = _numbers_of(payload, replaced, rows)
            temporary = self._scratch / name
            write_and_sync(temporary, chain([start], payload.body(self.manifest, features, kept, old)))
            known = Part(path, self.manifest, number, features, failures, temporary.stat().st_size, len(start))
            payload.parts.commit(temporary, name)
        else:
            payload.parts.sync()
        for each in replaced:
            if each.path != path:
                payload.parts.delete(each.path.name)
        gone = set(replaced)
        self._parts = [*(each for each in self._parts if each not in gone), known]

    def _number(self, key: str) -> int | None:
        """The number of the part that a sample belongs to; None where it is not in the dataset."""
        position = self._positions.get(key)
        return None if position is None else position // self.manifest.part_size

    def _only_number(self, part: Part) -> int | None:
        """The number that all of a part's samples belong to; None where there is no such."""
        name = part.path.name
        if name not in self._numbers:  # every commit asks it of every part
            numbers = {self._number(entry.key) for entry in part.entries}
            self._numbers[name] = numbers.pop() if len(numbers) == 1 else None
        return self._numbers[name]

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            safe = f"What was committed is safe ({self.features_committed:,} features of this run)."
            if error.errno in _FULL:
                place = Path(tempfile.gettempdir()) if is_remote(self.bank) else self.bank
                raise BankError(
                    f"The disk is full: {place} takes no more ({error.strerror}; {bytes_text(free_bytes(place))} "
                    f"free). {safe} Free some space and run the same command again: it continues from here."
                ) from error
            raise BankError(
                f"{error.filename or self.bank} cannot be written: {error.strerror or error}. {safe}"
            ) from error


def _numbers_of(payload: Payload, parts: Sequence[Part], rows: Mapping[str, Row]) -> Rows:
    """A function that reads the features which lie in these parts."""
    columns = [payload.columns(each) for each in parts]

    def old(key: str, field: str) -> NDArray[np.uint8]:
        part, row = rows[key]
        return columns[part][field][row]

    return old


def revoke(payload: Payload, parts: Sequence[Part], reasons: Mapping[str, str], scratch: Path) -> None:
    """Write the parts that list features which cannot be used again without them; the reasons stand in their place.

    Args:
        parts: all of the bank's that are sound.
    """
    entries = joined(parts)
    for part in parts:
        if not any(entry.key in reasons for entry in part.features):
            continue
        features = tuple(entry for entry in part.features if entry.key not in reasons)
        lost = tuple(
            Entry(entry.key, failure=reasons[entry.key]).after(entries[entry.key])
            for entry in part.features
            if entry.key in reasons
        )
        fewer = Part(part.path, part.manifest, part.number, features, part.failures + lost, 0, 0)
        start, name = name_part(payload, fewer)
        old = _numbers_of(payload, [part], {entry.key: Row(0, row) for row, entry in enumerate(part.features)})
        write_and_sync(scratch / name, chain([start], payload.body(part.manifest, features, {}, old)))
        payload.parts.commit(scratch / name, name)
        payload.parts.delete(part.path.name)
