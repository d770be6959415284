"""A bank's layout, and the current parts of its index. They are read without torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Literal

from patchbank.bank.index import Part, read_document, write_document
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import samples_a_shard
from patchbank.bank.payload import Payload
from patchbank.bank.pickles import INDEX, PART_SIZE, SUFFIX, Pickles
from patchbank.bank.runs import DIRECTORY as RUNS
from patchbank.bank.shard import Shards
from patchbank.bank.storage import storage_of
from patchbank.budget import without_collection
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.features import Output
from patchbank.files import NEXT
from patchbank.locations import is_remote

_ATTEMPTS = 100  # to read what other processes are writing
_MARKS = (b"patchbank", b"part_size")  # every part's beginning has both: one survives damage to the other
_NAMES = 100_000  # among which shards beside pickles are looked for: a directory may hold millions


class PartDamagedError(BankError):
    """A part whose content does not match its name, or that is cut short."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.reason = reason


def payload_of(bank: Path, layout: Layout) -> Payload:
    """A bank's files in a layout."""
    if layout == "shards":
        return Shards(bank, storage_of(bank))
    return Pickles(bank, storage_of(bank / INDEX))


def part_size(layout: Layout, outputs: Mapping[str, Output], shard_size: int) -> int:
    """The number of samples in a full part of the index.

    Args:
        shard_size: approximate bytes of a shard.
    """
    return samples_a_shard(outputs, shard_size) if layout == "shards" else PART_SIZE


def find_payload(bank: Path) -> Payload | None:
    """The files of the bank in a directory; None if there is no bank.

    Raises BankError where there are two banks; beside a bank of pickles, it looks at the first `_NAMES` names only.
    """
    shards, pickles = payload_of(bank, "shards"), payload_of(bank, "ezhoi")
    if is_remote(bank) or not part_names(pickles):
        return shards if part_names(shards) else None
    with os.scandir(bank) as entries:
        if any(shards.pattern.fullmatch(each.name) and Path(each.path).is_file() for each in islice(entries, _NAMES)):
            raise BankError(f"{bank} holds two banks, of pickles and of shards. Move one to another directory.")
    return pickles


def refuse_link(bank: Path) -> None:
    """Raise BankError where a directory of a bank's own is a link: files would be written and deleted elsewhere."""
    for place in () if is_remote(bank) else (bank / INDEX, bank / RUNS, bank / NEXT):
        if place.is_symlink():
            raise BankError(f"{place} is a link; in a bank it is a directory. Move that directory here.")


def third_party(bank: Path) -> bool:
    """Whether a directory holds pickles that other code wrote.

    A bank has an index beside them, which is empty until the first are listed, and after all its parts were damaged.
    """
    if is_remote(bank) or not bank.is_dir() or (bank / INDEX).is_dir() or find_payload(bank) is not None:
        return False
    with os.scandir(bank) as entries:  # pickles in its subdirectories may belong to banks there
        return any(each.name.endswith(SUFFIX) and each.is_file() for each in entries)


def manifest_in(bank: Path) -> Manifest | None:
    """The manifest of the bank in a directory; None if there is no bank, or no part of it is sound."""
    if (payload := find_payload(bank)) is None:
        return None
    for _ in range(_ATTEMPTS):
        try:
            for name in part_names(payload):
                with contextlib.suppress(PartDamagedError):
                    return read_part(payload, name).manifest
            return None
        except FileNotFoundError:
            continue  # another run has replaced it
    raise BankError(f"{bank} changes too fast to be read.")


def part_names(payload: Payload) -> list[str]:
    """The names of the parts' files, in order."""
    return sorted(name for name in payload.parts.names() if payload.pattern.fullmatch(name))


def own_names(payload: Payload) -> list[str]:
    """The same, after a look at what they hold. Raises BankError where other code wrote one, or it cannot be read."""

    def one(name: str) -> None:
        path = payload.parts.directory / name
        with contextlib.suppress(FileNotFoundError), _reading(path):
            _refuse_foreign(path, payload.parts.head(name)[0])

    payload.parts.map(one, names := part_names(payload))
    return names


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror or error}.") from error


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Raise BankError if a file with a part's name has nothing of ours in it, and is not empty as after a crash."""
    if start.strip(b"\0") and not any(mark in start for mark in _MARKS):
        raise BankError(
            f"{path} has the name of a bank's file, and its content is not. If it is yours, move it elsewhere; "
            "if the disk damaged it, delete it: its images are extracted again."
        )


def read_part(payload: Payload, name: str) -> Part:
    """Read and check a part, but not its features.

    Raises:
        FileNotFoundError: it is gone.
        PartDamagedError: its content does not match its name, or it is cut short.
        BankError: it cannot be read, has another format version, or other code wrote it.
    """
    path = payload.parts.directory / name
    match = payload.pattern.fullmatch(name)
    assert match is not None
    with _reading(path):
        start, size = payload.parts.head(name)
        if len(start) < (begin := payload.end(start, size)):
            start += payload.parts.read(name, len(start), begin)
    _refuse_foreign(path, start)
    text = start[payload.prefix : begin]
    if not text or hashlib.sha256(text).hexdigest()[:16] != match[2]:
        raise PartDamagedError(path, "its content does not match its name.")
    try:
        document, tensors = payload.document_in(text)
        manifest, number, features, failures = read_document(document, path)
        if number != int(match[1]):
            raise ValueError(f"it says that its number is {number}")
        if manifest.layout != payload.layout:
            raise ValueError(f"it is of the layout {manifest.layout}")
        if tensors != (expected := payload.tensors(manifest, len(features))):
            raise ValueError("its tensors are not those that its index describes")
        if size != (end := begin + max((each["data_offsets"][1] for each in expected.values()), default=0)):
            raise ValueError(f"it has {size:,} bytes, and its header says {end:,}")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise PartDamagedError(path, f"{reason}.") from error
    return Part(path, manifest, number, features, failures, size, begin)


def name_part(payload: Payload, part: Part) -> tuple[bytes, str]:
    """What a part's file begins with, and its name."""
    document = write_document(part.manifest, part.number, part.features, part.failures)
    start = payload.frame(document, part.manifest, len(part.features))
    return start, payload.name.format(part.number, hashlib.sha256(start[payload.prefix :]).hexdigest()[:16])


@without_collection()
def read_parts(
    payload: Payload,
    damaged: Literal["raise", "skip", "quarantine"] = "raise",
    known: Iterable[Part] = (),
    reasons: dict[str, str] | None = None,
) -> list[Part]:
    """All parts of a bank's index, in the order of their names.

    Args:
        damaged: what to do about a damaged part: raise BankError; leave it out, so that its samples count as not done;
            or leave it out and quarantine it.
        known: parts that were read before. A part never changes, so they are not read again.
        reasons: gets name -> reason of each part that is left out; of one in quarantine, its new name.

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
                name = payload.parts.quarantine(name)
            if reasons is not None:
                reasons[name] = error.reason
            return None

    for _ in range(_ATTEMPTS):
        try:
            parts = [each for each in payload.parts.map(one, part_names(payload)) if each is not None]
        except FileNotFoundError:
            continue  # another run has replaced it: another part has its samples now
        for part in parts[1:]:
            if part.manifest != parts[0].manifest and (differences := parts[0].manifest.differences(part.manifest)):
                name, has, other = differences[0]
                raise BankError(
                    f"{payload.bank} holds parts of two banks: {parts[0].path.name} has {name} {has}, {part.path.name} "
                    f"has {other}. Move the ones that do not belong here to another directory."
                )
        return parts
    raise BankError(f"{payload.bank} changes too fast to be read.")
