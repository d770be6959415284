"""Writing a bank: features and failures go in, and what is committed is durable.

Sample i belongs to part ``i // part_size`` of the index: of a dataset, or of the sorted keys of a converted bank.
Pickles are written with every batch, and their part with them; a shard waits in memory until its samples are complete.
A stopped run commits what it has, and a later one replaces it by a more complete part. The names of the two differ, and
the first is deleted only when the second is durable.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part, Row, failures_of, join, joined, rows_of
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import NotFiniteError, sample_bytes
from patchbank.bank.parts import manifest_in, name_part, payload_of, read_parts, refuse_link, third_party
from patchbank.bank.payload import Feature, Kept, Payload, Rows
from patchbank.bank.pickles import file_bytes
from patchbank.bank.reduction import Reducer
from patchbank.bank.removal import alone, place_of, replace_bank
from patchbank.bank.storage import storage_of
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.features import UNKNOWN
from patchbank.files import (
    bytes_text,
    free_bytes,
    fsync_directory,
    live_scratches,
    make_directory,
    nearest_existing,
    room_text,
    sha256_of_chunks,
    write_and_sync,
)
from patchbank.locations import is_remote

# Checksums and flushes wait for the processor and the disk without Python's lock.
_THREADS = max(1, min(8, os.cpu_count() or 1))
_ATTEMPTS = 8  # to write a part, while other processes write too
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 4096  # bytes that usual file systems round a file's size up to
_ENTRY = 256  # approximate bytes of the index for each sample


class BankState(NamedTuple):
    """What a bank holds, of all samples or of some.

    Attributes:
        done: keys with features.
        failed: key -> reason.
        parts: of its index.
    """

    done: set[str]
    failed: dict[str, str]
    parts: Sequence[Part]


def check_same(bank: Path, found: Manifest, wanted: Manifest, options: str = "") -> None:
    """Raise BankError, naming the differences, if a bank is not what a run would make. The last line is the fix.

    Args:
        options: those that would make it, for the message.
    """
    if not (differences := found.differences(wanted)):
        return
    listed = "\n".join(f"  {name}: the bank has {has}, this run {would}" for name, has, would in differences)
    fix = "Choose another directory, or start from scratch with --overwrite, which replaces it when it is complete."
    if found.reduction != wanted.reduction:
        fix = (
            "Reduced features are made of another bank's: complete that one, and `patchbank convert` it with the same "
            "--pca into this one; or choose another directory."
        )
    elif found.imported and UNKNOWN in (has for _, has, _ in differences):
        images = "--dataset or --images, and " if found.dataset == UNKNOWN else ""
        fix = (
            "Nothing has shown what made its features: import the pickles again with the same command and "
            f"{images}--sample 20 --overwrite. Then the bank can be completed."
        )
    elif found.imported and UNKNOWN in (would for *_, would in differences):
        fix = "It was imported with --sample: give that again, or choose another directory."
    elif found.regions and wanted.regions and found.regions != wanted.regions:
        fix = f"It has other boxes: give the annotations, --boxes and thresholds it was made with. Or c{fix[1:]}"
    elif options:
        fix = f"Give the options it was made with ({options}). Or c{fix[1:]}"
    raise BankError(f"{bank} was created with a different configuration:\n{listed}\n{fix}")


def existing_manifest(bank: Path, *, overwrite: bool) -> Manifest | None:
    """The manifest of the bank that a run would complete; None if it would start one.

    Args:
        overwrite: of the bank that would replace this one.

    Raises BankError for a file, for a link as index, and for a directory of third-party pickles. Writes nothing.
    """
    if not is_remote(bank) and not (place := nearest_existing(bank)).is_dir():
        raise BankError(f"{place} is a file; a bank is a directory. Choose another --out.")
    refuse_link(bank)
    if not overwrite and third_party(bank):
        raise BankError(
            f"{bank} holds pickles without an index: other code made them, and nothing says whether they are right. "
            f"`patchbank verify {bank}` checks them, and `patchbank import` makes a bank of them. Else choose "
            "another --out, or start from scratch with --overwrite, which deletes them."
        )
    return manifest_in(place_of(bank, overwrite))


def gone_on_with(existing: Manifest | None, wanted: Manifest, overwrite: bool) -> Manifest | None:
    """The bank of `existing_manifest`, if a run goes on with it: with overwrite, only if the same command began it."""
    return None if overwrite and existing and not existing.begun_as(wanted) else existing


def check_location(bank: Path, layout: str) -> None:
    """Raise BankError if a place cannot hold a layout."""
    if layout == "ezhoi" and is_remote(bank):
        raise BankError(
            f"{bank}: a bank in an object store has the layout shards. Add --layout shards, or extract to a path."
        )


def disk_bytes(count: int, like: Manifest) -> int:
    """Bytes that `count` samples take on the disk, with their share of the index."""
    if like.layout == "ezhoi":
        return count * (-(-file_bytes(like) // _BLOCK) * _BLOCK + _ENTRY)
    return count * (sample_bytes(like.outputs) + _ENTRY)


def check_room(place: Path, needed: int, elsewhere: str, *, overwrite: bool = False) -> None:
    """Raise BankError if a disk has fewer bytes free. `elsewhere`: what the message suggests to choose another of."""
    if needed > (free := free_bytes(place)):
        old, first = (" beside the old bank", " (the old bank's, if you can do without it)") if overwrite else ("", "")
        raise BankError(
            f"Not enough disk: the features need {bytes_text(needed)}{old} and {place} has {bytes_text(free)} free. "
            f"Free some space{first}, choose another {elsewhere}, or store them in half the space with --dtype float16."
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
        bank: the directory or URL that it writes.
        manifest: of the existing bank, or the one wanted; set on entering.
        done: keys whose features the bank had on entering.
        settled, failed: numbers of samples with a feature or a failure, and with a failure; set on leaving.
        notes: what a user should know, a sentence each.
        features_committed: how many features this writer made durable.
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
        reducer: Reducer | None = None,
    ) -> None:
        """
        Args:
            wanted: the manifest of a new bank.
            positions: key -> position of all samples that the bank is made for, not only a part's; or the keys in
                order.
            overwrite: make a bank that can `replace` the existing one. What a run of the same configuration began
                is continued.
            known: what the bank held a moment ago; its parts are not read again.
            helper: write samples for another process, which passes what the bank holds to `expect` and tidies up; this
                writer does not look at the bank.
            about: what `files.live_scratches` reports to other runs.
            reducer: the one that the manifest names; its file is written before the first feature.

        Raises:
            BankError: the directory holds another bank or third-party pickles; see `existing_manifest`.
        """
        existing = None if helper else existing_manifest(bank, overwrite=overwrite)
        if existing and not overwrite:
            check_same(bank, existing, wanted)
        bank = place_of(bank, overwrite)
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
        self._afresh = existing is not None and gone_on_with(existing, wanted, overwrite) is None
        self._known = known
        self._helper = helper
        self._about = about
        self._reducer = reducer
        self._current: int | None = None  # the number of the part that samples go to
        self._payload = payload_of(bank, wanted.layout)

    def __enter__(self) -> Self:
        with self._storage_errors(), ExitStack() as stack:
            self._scratch = self._enter(stack)
            if not is_remote(self.bank):
                make_directory(self._payload.parts.directory)  # index/ distinguishes own from third-party pickles
            self._threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="write"))
            self._begin()
            check_same(self.bank, self.manifest, self._wanted)
            if self._reducer is not None:
                name = self._reducer.made.name
                write_and_sync(self._scratch / name, [self._reducer.content])
                self._payload.parts.commit(self._scratch / name, name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._helper:  # what a helper did not commit is extracted again
                with self._storage_errors():
                    self._end()
        finally:
            self._stack.close()

    def add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]:
        """Take outcomes. They are durable when their part is complete, and at the latest when the block ends.

        Outcomes of one part should come together; else the part is written more than once.

        Returns:
            Failures of features that cannot be stored, since they are not finite in the bank's dtype.

        Raises:
            BankError: the disk is full or fails.
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
        """Prepare a helper for other samples, and pass it what the bank holds of them. Commit first."""
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
        """Remove the scratch directories of helpers that died."""
        with self._storage_errors():
            storage_of(self.bank).sweep()

    def commit(self) -> None:
        """Make everything added so far durable. Raises BankError if the disk is full or fails."""
        with self._storage_errors():
            self._commit()

    def _enter(self, stack: ExitStack) -> Path:
        """The scratch directory; of a bank that will replace another one, while no run ends one."""
        place = storage_of(self.bank)
        with alone(self.bank.parent) if self._overwrite else nullcontext():
            if self._afresh:
                if not is_remote(self.bank) and live_scratches(self.bank):
                    raise BankError(
                        f"Another run with --overwrite and other options is writing {self.bank.parent}. Wait until it "
                        "ends, or stop it."
                    )
                place.clear()
            return stack.enter_context(place.scratch(self._about))

    def replace(self, keys: Collection[str]) -> str:
        """Put what was written with `overwrite` in the old bank's place. Call it after the block, if it is complete.

        Args and result as those of `replace_bank`.
        """
        with self._storage_errors():
            return replace_bank(self.bank.parent, keys)

    @property
    def state(self) -> BankState:
        """What the bank held when this writer last looked, with what it has committed since."""
        return BankState(self.done, failures_of(self._entries), self._parts)

    def has(self, feature: Feature) -> bool:
        """Whether the bank had exactly this feature on entering."""
        if feature.key not in self.done:
            return False
        try:
            pieces = self._payload.pieces(self.manifest, feature)
        except NotFiniteError:
            return False  # adding it reports the reason
        return self._entries[feature.key].sha256 == sha256_of_chunks(pieces)

    def _begin(self) -> None:
        """Find out what the bank holds."""
        parts: list[Part] = []
        damaged: dict[str, str] = {}
        if not self._helper:
            parts = read_parts(self._payload, "quarantine", self._known.parts if self._known else (), damaged)
        if damaged:
            names = ", ".join(sorted(damaged))
            self.notes.append(f"Damaged parts are in quarantine; their samples are extracted again: {names}.")
        self.manifest = parts[0].manifest if parts else self._wanted
        self.expect(self._positions, BankState(set(), {}, parts))
        # Checked again, though no part has changed: a pickle may have vanished since the plan.
        self.done = self._payload.present(self._entries, self.manifest)

    def _end(self) -> None:
        """Commit the rest, and merge parts of one number that several processes wrote."""
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
            pieces = self._payload.pieces(self.manifest, feature)
        except NotFiniteError as error:
            return Entry(feature.key, failure=str(error)), None
        kept = self._payload.keep(feature.key, pieces, self._scratch)
        return Entry(feature.key, feature.size, sha256_of_chunks(pieces), region=feature.region), kept

    def _commit(self) -> None:
        if self._current is None or not self._new:
            return
        files = [kept.file for kept in self._kept.values() if kept.file]
        for temporary, final in files:
            make_directory(final.parent)
            temporary.rename(final)
        for directory in {final.parent for _, final in files}:
            fsync_directory(directory)
        self._write(self._current)
        join(self._entries, self._new.values())
        self.features_committed += len(self._kept)
        self.bytes_written += sum(kept.bytes for kept in self._kept.values())
        self._new, self._kept = {}, {}

    def _read(self) -> None:
        """Read the current parts. Raises BankError where another run has written other features."""
        self._parts = read_parts(self._payload, "skip", self._parts)
        if self._parts:
            check_same(self.bank, self._parts[0].manifest, self.manifest)

    def _write(self, number: int) -> None:
        """Replace all parts that hold only samples of this number by one, together with what is new.

        Parts with samples of several numbers, which a growing dataset leaves behind, stay as they are.
        """
        # At the 1st, 2nd, 4th, ... commit, look for what other processes have written, to notice a run of other
        # features; what they wrote of this part is joined with it at the end. Every commit would be too many listings.
        self._commits += 1
        if not self._helper and self._commits & (self._commits - 1) == 0:
            self._read()
        for _ in range(1, _ATTEMPTS):
            with suppress(FileNotFoundError):  # another process has replaced a part that was read here
                return self._write_once(number)
            self._read()
        return self._write_once(number)

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
        self._numbers[name] = number
        gone = set(replaced)
        self._parts = [*(each for each in self._parts if each not in gone), known]

    def _number(self, key: str) -> int | None:
        """The number of the part that a sample belongs to; None if it is not in the dataset."""
        position = self._positions.get(key)
        return None if position is None else position // self.manifest.part_size

    def _only_number(self, part: Part) -> int | None:
        """The number that all of a part's samples belong to; None if they belong to several, or to none."""
        name = part.path.name
        if name not in self._numbers:  # every commit looks at every part
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
                    f"The disk is full: {place} takes no more ({error.strerror}; {room_text(place)}). "
                    f"{safe} Free some space and run the same command again: it continues from here."
                ) from error
            raise BankError(
                f"{error.filename or self.bank} cannot be written: {error.strerror or error}. {safe}"
            ) from error


def _numbers_of(payload: Payload, parts: Sequence[Part], rows: Mapping[str, Row]) -> Rows:
    """A function that reads features from these parts."""
    columns = [payload.columns(each) for each in parts]

    def old(key: str, field: str) -> NDArray[np.uint8]:
        part, row = rows[key]
        return columns[part][field](row)

    return old


def revoke(payload: Payload, parts: Sequence[Part], reasons: Mapping[str, str], scratch: Path) -> None:
    """Replace unusable features by failures: write the parts that list them again.

    Args:
        parts: all sound parts of the bank.
        reasons: key -> why its feature is unusable.
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
