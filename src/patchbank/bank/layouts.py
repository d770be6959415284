"""Which layout a directory's bank has, and what it is. No torch: reading what a bank says needs none."""

from __future__ import annotations

from pathlib import Path

from patchbank.bank.manifest import FILE_NAME, Manifest
from patchbank.bank.shard import shard_names
from patchbank.bank.shards import first_manifest
from patchbank.bank.storage import storage_of
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.locations import is_remote


def layout_in(directory: Path) -> Layout | None:
    """The layout of the bank in a directory; None where there is none. Raises BankError where there are two."""
    has_shards = bool(shard_names(storage_of(directory)))
    has_pickles = not is_remote(directory) and (directory / FILE_NAME).exists()
    if has_pickles and has_shards:
        raise BankError(f"{directory} holds two banks, of pickles and of shards. Move one to another directory.")
    return "ezhoi" if has_pickles else "shards" if has_shards else None


def manifest_in(directory: Path) -> Manifest | None:
    """The manifest of the bank in a directory; None where there is none. Raises BankError where it is damaged."""
    return read_manifest(directory, layout_in(directory))


def read_manifest(directory: Path, layout: Layout | None) -> Manifest | None:
    """As `manifest_in`, of a bank whose layout is known."""
    if layout == "ezhoi":
        return Manifest.read(directory)
    return first_manifest(storage_of(directory)) if layout else None
