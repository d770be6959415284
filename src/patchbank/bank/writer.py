"""Starting, continuing and replacing banks, in either layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from patchbank.bank import ezhoi, manifest
from patchbank.bank.base_writer import BankState, BankWriter, check_same
from patchbank.bank.ezhoi_writer import EzhoiWriter, file_bytes, present
from patchbank.bank.layouts import layout_in, read_manifest
from patchbank.bank.ledger import Snapshot, take_snapshot
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import image_bytes
from patchbank.bank.shard import Shard
from patchbank.bank.shards import joined, read_shards
from patchbank.bank.shards_writer import ShardWriter
from patchbank.bank.storage import storage_of
from patchbank.errors import BankError
from patchbank.files import nearest_existing
from patchbank.locations import is_remote

_WRITERS: dict[str, type[BankWriter]] = {"ezhoi": EzhoiWriter, "shards": ShardWriter}

_BLOCK = 4096  # bytes that a file's size is rounded up to on usual file systems
_ENTRY = 256  # bytes of what a bank says of an image, about


def open_writer(
    directory: Path,
    wanted: Manifest,
    keys: Sequence[str] | Mapping[str, int],
    *,
    overwrite: bool = False,
    known: BankState | None = None,
    helper: bool = False,
    about: str = "",
) -> BankWriter:
    """The writer of a bank, not entered yet.

    Args:
        wanted: what the bank is to be.
        keys: of all images that the bank is made for, in their order: the data set's, not only a part's. Or with
            their positions, where there are gaps.
        overwrite: delete what is there first.
        known: what the bank was found to hold a moment ago; what has not changed is not read again.
        helper: it writes some of the images for a process that does all else: what is there is not looked at (that
            process tells it, by `BankWriter.expect`), and nothing is tidied up at the end.
        about: what `files.live_scratches` tells other runs of this one.

    Raises:
        BankError: the directory holds another bank or strangers' pickles; see `existing_manifest`.
    """
    if not helper and (existing := existing_manifest(directory, overwrite=overwrite)):
        check_same(directory, existing, wanted)
    check_location(directory, wanted.layout)
    positions = keys if isinstance(keys, Mapping) else {key: position for position, key in enumerate(keys)}
    writer = _WRITERS[wanted.layout]
    return writer(directory, wanted, positions, overwrite=overwrite, known=known, helper=helper, about=about)


def check_location(directory: Path, layout: str) -> None:
    """Raise BankError where a layout cannot lie in a place."""
    if layout == "ezhoi" and is_remote(directory):
        raise BankError(
            f"{directory}: a bank in an object store has the layout shards. Add --layout shards, or extract to a path."
        )


def existing_manifest(directory: Path, *, overwrite: bool) -> Manifest | None:
    """The manifest of the bank that a run would complete; None where it would start one.

    Raises BankError where no bank can be there: it is a file, or holds pickles of unknown making. Writes nothing.
    """
    if is_remote(directory):
        return None if overwrite else read_manifest(directory, layout_in(directory))
    if not (place := nearest_existing(directory)).is_dir():
        raise BankError(f"{place} is a file; a bank is a directory. Choose another --out.")
    if overwrite:
        return None
    if (layout := layout_in(directory)) is None and directory.is_dir() and next(ezhoi.pickles_in(directory), None):
        raise BankError(
            f"{directory} holds pickles but no {manifest.FILE_NAME}: patchbank did not make them and cannot "
            f"tell whether they are right. `patchbank verify {directory}` looks at them, and `patchbank repair` "
            "adopts them. Else choose another --out, or start anew with --overwrite, which deletes them."
        )
    return read_manifest(directory, layout)


def disk_bytes(image_count: int, like: Manifest) -> int:
    """What so many images take on the disk, with what is said of them."""
    if like.layout == "ezhoi":
        return image_count * (-(-file_bytes(like) // _BLOCK) * _BLOCK + _ENTRY)
    return image_count * (image_bytes(like) + _ENTRY)


def bank_state(directory: Path, like: Manifest) -> BankState:
    """What a bank holds. Writes nothing."""
    read: Snapshot | list[Shard]
    if like.layout == "ezhoi":
        read = take_snapshot(directory, "skip")
        entries = read.entries
        done = present(directory, entries, like)
    else:
        read = read_shards(storage_of(directory), "skip")
        entries = joined(read)
        done = {key for key, entry in entries.items() if entry.failure is None}
    failed = {key: entry.failure for key, entry in entries.items() if entry.failure is not None}
    return BankState(done, failed, read)
