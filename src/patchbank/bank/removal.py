"""Deleting a bank, and nothing else that lies beside it."""

from __future__ import annotations

from pathlib import Path

from patchbank.bank import ezhoi, manifest
from patchbank.bank.ledger import read_ledger, remove_ledger
from patchbank.bank.runs import remove_runs
from patchbank.bank.shard import shard_names
from patchbank.bank.storage import storage_of
from patchbank.locations import is_remote


def removable(directory: Path) -> list[Path]:
    """The features that starting a bank anew deletes: those it lists, and what pickles and shards lie there.

    Pickles in subdirectories that the bank does not list are left alone: they may be other banks.
    """
    shards = {directory / name for name in shard_names(storage_of(directory))}
    if is_remote(directory):
        return list(shards)
    names = {ezhoi.pickle_name(key) for key in read_ledger(directory, damaged="skip")}
    paths = {directory / name for name in names} | set(directory.glob(f"*{ezhoi.SUFFIX}")) | shards
    return [path for path in paths if path.is_file()]


def remove_bank(directory: Path) -> None:
    """Delete a bank: its features, and what is said of them."""
    features = removable(directory)
    remove_runs(directory)
    if is_remote(directory):
        for path in features:
            storage_of(directory).delete(path.name)
        return
    remove_ledger(directory)
    for path in features:
        path.unlink(missing_ok=True)
    (directory / manifest.FILE_NAME).unlink(missing_ok=True)  # last: until then it is a bank, if an emptier one
