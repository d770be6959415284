"""Which layout a directory's bank has, and what it is. No torch: reading what a bank says needs none."""

from __future__ import annotations

from pathlib import Path

from patchbank.bank.manifest import FILE_NAME, Manifest
from patchbank.bank.shard import shards_in
from patchbank.bank.shards import first_manifest
from patchbank.config import Layout
from patchbank.errors import BankError


def layout_in(directory: Path) -> Layout | None:
    """The layout of the bank in a directory; None where there is none. Raises BankError where there are two."""
    has_pickles, has_shards = (directory / FILE_NAME).exists(), bool(shards_in(directory))
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
    return first_manifest(directory) if layout else None
