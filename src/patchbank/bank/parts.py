"""A bank's layout, and the parts of its index as they are now. No torch: what a bank says is read without it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from patchbank.bank.index import Part, read_document, write_document
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import samples_a_shard
from patchbank.bank.payload import Payload
from patchbank.bank.pickles import INDEX, PART_SIZE, Pickles, pickles_in
from patchbank.bank.shard import Shards
from patchbank.bank.storage import storage_of
from patchbank.budget import without_collection
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.features import Output
from patchbank.locations import is_remote

_ATTEMPTS = 100  # at reading what others are writing


class PartDamagedError(BankError):
    """A part whose content is not what its name says, or that is cut short."""


def payload_of(bank: Path, layout: Layout) -> Payload:
    """A bank's layout at work."""
    if layout == "shards":
        return Shards(bank, storage_of(bank))
    return Pickles(bank, storage_of(bank / INDEX))


def part_size(layout: Layout, outputs: Mapping[str, Output], shard_size: int) -> int:
    """The number of samples that a part of the index is made for.

    Args:
        shard_size: approximate bytes of a shard.
    """
    return samples_a_shard(outputs, shard_size) if layout == "shards" else PART_SIZE


def layout_in(bank: Path) -> Layout | None:
    """The layout of the bank in a directory; None where there is none. Raises BankError where there are two."""
    layouts: tuple[Layout, ...] = ("shards",) if is_remote(bank) else ("shards", "ezhoi")
    found = [layout for layout in layouts if part_names(payload_of(bank, layout))]
    if len(found) > 1:
        raise BankError(f"{bank} holds two banks, of pickles and of shards. Move one to another directory.")
    return found[0] if found else None


def third_party(bank: Path) -> bool:
    """Whether a directory holds pickles that other code wrote.

    Ours have an index beside them, which is empty until the first are listed, and after all its parts were damaged.
    """
    ours = is_remote(bank) or not bank.is_dir() or (bank / INDEX).is_dir() or layout_in(bank) is not None
    return not ours and next(pickles_in(bank), None) is not None


def find_payload(bank: Path) -> Payload | None:
    """The layout of the bank in a directory, at work; None where there is no bank."""
    layout = layout_in(bank)
    return None if layout is None else payload_of(bank, layout)


def manifest_in(bank: Path) -> Manifest | None:
    """The manifest of the bank in a directory; None where there is none, or no part of it is sound."""
    if (payload := find_payload(bank)) is None:
        return None
    for _ in range(_ATTEMPTS):
        try:
            for name in part_names(payload):
                with contextlib.suppress(PartDamagedError):
                    return read_part(payload, name).manifest
            return None
        except FileNotFoundError:
            continue  # another run completed it meanwhile
    raise BankError(f"{bank} changes too fast to be read.")


def part_names(payload: Payload) -> list[str]:
    """The files that have a part's name, in order."""
    return sorted(name for name in payload.parts.names() if payload.pattern.fullmatch(name))


def read_part(payload: Payload, name: str) -> Part:
    """Read and check a part; the features are not looked at.

    Raises:
        FileNotFoundError: it is gone.
        PartDamagedError: its content is not what its name says, or it is cut short.
        BankError: it cannot be read, or has another format version.
    """
    path = payload.parts.directory / name
    match = payload.pattern.fullmatch(name)
    assert match is not None
    try:
        start, size = payload.parts.head(name)
        text, begin = payload.unframe(start, size, name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not text or hashlib.sha256(text).hexdigest()[:16] != match[2]:
        raise PartDamagedError(f"{path} is damaged: its content is not what its name says.")
    try:
        document, rest = payload.document_in(text)
        manifest, number, features, failures = read_document(document, path)
        if number != int(match[1]):
            raise ValueError(f"it says that its number is {number}")
        if manifest.layout != payload.layout:
            raise ValueError(f"it is of the layout {manifest.layout}")
        part = Part(path, manifest, number, features, failures, size, begin)
        payload.check(part, rest)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise PartDamagedError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    return part


def name_part(payload: Payload, part: Part) -> tuple[bytes, str]:
    """What a part's file begins with, and its name."""
    document = write_document(part.manifest, part.number, part.features, part.failures)
    start, hashed = payload.frame(document, part.manifest, len(part.features))
    return start, payload.name.format(part.number, hashlib.sha256(hashed).hexdigest()[:16])


@without_collection()
def read_parts(
    payload: Payload, damaged: Literal["raise", "skip", "quarantine"] = "raise", known: Iterable[Part] = ()
) -> list[Part]:
    """All parts of a bank's index, in the order of their names.

    Args:
        damaged: what to do about a part whose content is not what its name says: raise BankError; or leave it out, so
            that its samples count as not done; or rename it too.
        known: parts that were read before. A part never changes, so they are not read again.

    Raises BankError where two parts are of different banks.
    """
    read = {part.path.name: part for part in known}

    def one(name: str) -> Part | None:
        try:
            return read.get(name) or read_part(payload, name)
        except PartDamagedError as error:
            if damaged == "raise":
                raise BankError(f"{error} `patchbank repair {payload.bank}` says what to do.") from error
            if damaged == "quarantine":
                payload.parts.quarantine(name)
            return None

    for _ in range(_ATTEMPTS):
        try:
            parts = [each for each in payload.parts.map(one, part_names(payload)) if each is not None]
        except FileNotFoundError:
            continue  # another run completed it meanwhile: another part has its samples now
        for part in parts[1:]:
            if part.manifest == parts[0].manifest:
                continue
            if differences := parts[0].manifest.differences(part.manifest):
                name, has, other = differences[0]
                raise BankError(
                    f"{payload.bank} holds parts of two banks: {parts[0].path.name} has {name} {has}, {part.path.name} "
                    f"has {other}. Move the ones that do not belong here to another directory."
                )
        return parts
    raise BankError(f"{payload.bank} changes too fast to be read.")
