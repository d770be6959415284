"""Putting a bank in the place of another one, and deleting one; nothing else in the directory is touched."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from patchbank.bank.index import joined
from patchbank.bank.parts import find_payload, own_names, part_names, payload_of, read_parts
from patchbank.bank.pickles import INDEX, SUFFIX, pickle_name
from patchbank.bank.runs import copy_runs, remove_runs
from patchbank.bank.storage import storage_of
from patchbank.files import NEXT, fsync_directory, live_scratches, make_directory
from patchbank.locations import is_remote


def place_of(bank: Path, overwrite: bool) -> Path:
    """Where a run writes: the bank's directory; or one in it, whose bank replaces the old one when it is complete."""
    return bank / NEXT if overwrite else bank


def replace_bank(bank: Path) -> None:
    """Delete a bank, and move the complete one in `NEXT` into its place; the last of several runs that write it does.

    If this is killed, some of the new files lie in each place, and none is lost but the old ones. The same run, again,
    makes in `NEXT` what was moved already, with the same bytes, and then does this again.
    """
    new = find_payload(bank / NEXT)
    if new is None or (not is_remote(bank) and live_scratches(new.bank)):
        return
    own = payload_of(bank, new.layout)
    remove_bank(bank)
    if new.layout == "ezhoi":
        make_directory(own.parts.directory)  # pickles without it are third-party ones
        own.parts.sync()  # the old index must not come back beside new pickles
        names = _pickles(new.bank)
        for name in names:
            make_directory((bank / name).parent)
            with contextlib.suppress(FileNotFoundError):  # the next extraction makes it
                (new.bank / name).rename(bank / name)
        for directory in {(bank / name).parent for name in names}:
            fsync_directory(directory)
    new.parts.map(lambda name: new.parts.move(name, own.parts), part_names(new))
    copy_runs(new.bank, bank)
    storage_of(new.bank).clear()


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


def _pickles(bank: Path) -> set[str]:
    """The names of the listed pickles."""
    return {pickle_name(key) for key in joined(read_parts(payload_of(bank, "ezhoi"), "skip"))}


def remove_bank(bank: Path) -> None:
    """Delete a bank: its features, index and run log."""
    features = removable(bank)
    remove_runs(bank)
    if is_remote(bank):
        for path in features:
            storage_of(bank).delete(path.name)
        return
    for path in features:
        path.unlink(missing_ok=True)
    index = payload_of(bank, "ezhoi")
    for name in part_names(index):  # last: until then the rest is a bank
        index.parts.delete(name)
    with contextlib.suppress(OSError):
        (bank / INDEX).rmdir()
