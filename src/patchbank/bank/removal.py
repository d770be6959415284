"""Deleting a bank, and nothing else in its directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from patchbank.bank.index import joined
from patchbank.bank.parts import part_names, payload_of, read_parts
from patchbank.bank.pickles import INDEX, SUFFIX, pickle_name
from patchbank.bank.runs import remove_runs
from patchbank.bank.storage import storage_of
from patchbank.locations import is_remote


def removable(bank: Path) -> list[Path]:
    """The features' files that starting from scratch deletes: those that the bank lists.

    Where no index lists any, they are the directory's pickles; in subdirectories they may belong to other banks.
    """
    shards = {bank / name for name in part_names(payload_of(bank, "shards"))}
    if is_remote(bank):
        return list(shards)
    names = {pickle_name(key) for key in joined(read_parts(payload_of(bank, "ezhoi"), "skip"))}
    paths = shards | {bank / name for name in names} or set(bank.glob(f"*{SUFFIX}"))
    return [path for path in paths if os.path.isfile(path)]  # noqa: PTH113 (no error of a long name)


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
