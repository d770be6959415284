"""Putting a bank in the place of another one, and deleting one; nothing else in the directory is touched."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from patchbank.bank.index import failures_of, joined
from patchbank.bank.parts import find_payload, own_names, part_names, payload_of, read_parts
from patchbank.bank.payload import Payload
from patchbank.bank.pickles import INDEX, SUFFIX, pickle_name
from patchbank.bank.runs import copy_runs, remove_runs
from patchbank.bank.storage import storage_of
from patchbank.files import NEXT, fsync_directory, live_scratches, make_directory
from patchbank.locations import is_remote


def place_of(bank: Path, overwrite: bool) -> Path:
    """Where a run writes: the bank's directory; or one in it, whose bank replaces the old one when it is complete."""
    return bank / NEXT if overwrite else bank


def replace_bank(bank: Path, keys: Collection[str]) -> str:
    """Delete a bank, and move the complete one in `NEXT` into its place.

    If this is killed, some of the new files lie in each place, and none is lost but the old ones. The same run, again,
    makes in `NEXT` what was moved already, with the same bytes, and then does this again.

    Args:
        keys: of the samples that the new bank is for.

    Returns:
        Why the old bank was kept; empty if it was replaced.
    """
    with alone(bank):
        if not is_remote(bank) and live_scratches(bank / NEXT):
            return "another run writes the new bank, and will put it in the old one's place when it ends"
        new = find_payload(bank / NEXT)
        made, old = (_features(each) if each else set() for each in (new, find_payload(bank)))
        lost = sorted((old & set(keys)) - made)
        if new is not None and lost:
            return (
                f"{len(lost):,} images have features in the old bank and none in the new one, {lost[0]!r} for one. "
                f"The old bank was kept, and what was made is in {bank / NEXT}: the same command continues it. To do "
                "without these features, choose another directory"
            )
        if new is not None:
            _swap(bank, new)
    return ""


@contextlib.contextmanager
def alone(bank: Path) -> Iterator[None]:
    """Wait until no other run begins or ends a bank in `NEXT`. Stores and some disks have no locks."""
    if is_remote(bank):
        yield
        return
    make_directory(bank)
    directory = os.open(bank, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _features(bank: Payload) -> set[str]:
    entries = joined(read_parts(bank, "skip"))
    return entries.keys() - failures_of(entries).keys()


def _swap(bank: Path, new: Payload) -> None:
    own = payload_of(bank, new.layout)
    beside = _beside(new)
    remove_bank(bank)
    if new.layout == "ezhoi":
        own.parts.sync()  # the old index must not come back beside new pickles
        names = _pickles(new.bank)
        for name in names:
            make_directory((bank / name).parent)
            with contextlib.suppress(FileNotFoundError):  # the next extraction makes it
                (new.bank / name).rename(bank / name)
        for directory in {(bank / name).parent for name in names}:
            fsync_directory(directory)
    for together in (beside, part_names(new)):  # components before the parts that need them
        new.parts.map(lambda name: new.parts.move(name, own.parts), together)
    if new.layout == "shards" and not is_remote(bank):
        with contextlib.suppress(OSError):
            (bank / INDEX).rmdir()
    copy_runs(new.bank, bank)
    storage_of(new.bank).clear()
    storage_of(bank).sweep()


def removable(bank: Path) -> list[Path]:
    """The features' files that starting from scratch deletes: those that the bank lists.

    Where there is no index, they are the directory's pickles; in subdirectories they may belong to other banks. Raises
    BankError where other code wrote a file of a bank's name.
    """
    shards = {bank / name for name in own_names(payload_of(bank, "shards"))}
    if is_remote(bank):
        return list(shards)
    paths = shards | {bank / name for name in _pickles(bank)}
    if not paths and not (bank / INDEX).is_dir():
        paths = set(bank.glob(f"*{SUFFIX}"))
    return [path for path in paths if os.path.isfile(path)]  # noqa: PTH113 (no error of a long name)


def _beside(bank: Payload) -> list[str]:
    """The names of the files of principal components that a bank's parts name, of those that exist."""
    named = {part.manifest.reduction.name for part in read_parts(bank, "skip") if part.manifest.reduction}
    return sorted(named.intersection(bank.parts.names())) if named else []


def _pickles(bank: Path) -> set[str]:
    """The names of the listed pickles."""
    return {pickle_name(key) for key in joined(read_parts(payload_of(bank, "ezhoi"), "skip"))}


def remove_bank(bank: Path) -> None:
    """Delete a bank: its features, the parts of its index, and its run log.

    An empty index stays: after a kill here, all pickles would be taken for third-party ones without it, and deleted.
    """
    features = removable(bank)
    shards = payload_of(bank, "shards")
    beside = _beside(shards)
    if not is_remote(bank):
        make_directory(bank / INDEX)
    remove_runs(bank)
    if is_remote(bank):
        for name in (*(path.name for path in features), *beside):
            shards.parts.delete(name)
        return
    for path in features:
        path.unlink(missing_ok=True)
    for name in beside:
        shards.parts.delete(name)
    index = payload_of(bank, "ezhoi")
    for name in part_names(index):  # last: until then the rest is a bank
        index.parts.delete(name)
