"""The ``shards`` layout, reading: memory-mapped safetensors files, random access by key."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.entries import Entry, join
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import checksum, dequantise, fields
from patchbank.bank.remote import remote_columns
from patchbank.bank.shard import Shard, ShardDamagedError, read_shard, shard_names
from patchbank.bank.storage import Storage, storage_of
from patchbank.budget import without_collection
from patchbank.errors import BankError
from patchbank.locations import is_remote

if TYPE_CHECKING:
    from torch import Tensor


_ATTEMPTS = 100  # at reading what others are writing

Numbers = NDArray[np.uint8]


class Column(Protocol):
    """A field of a shard's images: the numbers of each as (bytes,) uint8, not to be written to."""

    def __getitem__(self, row: int) -> Numbers: ...


Mapped = Mapping[str, Column]  # a shard's numbers, by field


class Row(NamedTuple):
    """Where a feature lies: in which shard of a list, and in which row of its tensors."""

    shard: int
    row: int


@without_collection()
def read_shards(
    storage: Storage, damaged: Literal["raise", "skip", "set aside"] = "raise", known: Iterable[Shard] = ()
) -> list[Shard]:
    """The headers of all shards of a bank, in the order of their names.

    Args:
        damaged: what to do about a shard whose content is not what its name says: raise BankError; or leave it out,
            so that what it held counts as not done; or rename it too, out of the bank's way.
        known: shards that were read before: a shard never changes, so they are not read again.

    Raises BankError where two shards are of different banks.
    """
    read = {shard.path.name: shard for shard in known}

    def one(name: str) -> Shard | None:
        try:
            return read.get(name) or read_shard(storage, name)
        except ShardDamagedError as error:
            if damaged == "raise":
                raise BankError(f"{error} `patchbank repair {storage.directory}` says what to do.") from error
            if damaged == "set aside":
                storage.set_aside(name)
            return None

    for _ in range(_ATTEMPTS):
        try:
            shards: list[Shard] = [each for each in storage.map(one, shard_names(storage)) if each is not None]
        except FileNotFoundError:
            continue  # somebody completed it meanwhile: what it held is in another shard now
        for shard in shards[1:]:
            if differences := shards[0].manifest.differences(shard.manifest):
                name, has, other = differences[0]
                raise BankError(
                    f"{storage.directory} holds shards of two banks: {shards[0].path.name} has {name} {has}, "
                    f"{shard.path.name} has {other}. Move the ones that do not belong here to another directory."
                )
        return shards
    raise BankError(f"{storage.directory} changes too fast to be read.")


def first_manifest(storage: Storage) -> Manifest | None:
    """What the first sound shard says of its bank, without reading the others; None where there is none."""
    for _ in range(_ATTEMPTS):
        try:
            for name in shard_names(storage):
                with contextlib.suppress(ShardDamagedError):
                    return read_shard(storage, name).manifest
            return None
        except FileNotFoundError:
            continue  # somebody completed it meanwhile
    raise BankError(f"{storage.directory} changes too fast to be read.")


@without_collection()
def joined(shards: Iterable[Shard]) -> dict[str, Entry]:
    """The entry of every key."""
    entries: dict[str, Entry] = {}
    for shard in shards:
        join(entries, shard.features)
        join(entries, shard.failures)
    return entries


@without_collection()
def rows_of(shards: Iterable[Shard], entries: dict[str, Entry]) -> dict[str, Row]:
    """Where the features lie that count among the `joined` entries."""
    return {
        entry.key: Row(number, row)
        for number, shard in enumerate(shards)
        for row, entry in enumerate(shard.features)
        if entries[entry.key] is entry
    }


class _State(NamedTuple):
    """What a reader knows of a bank at one time. Replaced as a whole, so that threads never see half of it."""

    shards: list[Shard]
    entries: dict[str, Entry]
    rows: dict[str, Row]
    mapped: list[Mapped | None]


class ShardStore:
    """The features in a bank of shards.

    A shard's file is mapped into memory when it is first read from. Threads may share one store; a process that gets
    it pickled maps for itself.
    """

    def __init__(self, directory: Path, damaged: Literal["raise", "skip"] = "raise", cache: Path | None = None) -> None:
        self._directory = directory
        self._storage = storage_of(directory)
        self._cache = cache
        self._damaged = damaged
        self._state = self._load()
        if not self._state.shards:
            raise BankError(f"{directory} is not a bank: there is no sound shard in it.")
        self.manifest: Manifest = self._state.shards[0].manifest
        self._fields = {field.name: field for field in fields(self.manifest)}

    @property
    def entries(self) -> dict[str, Entry]:
        """What is known of each image."""
        return self._state.entries

    def _load(self) -> _State:
        shards = read_shards(self._storage, self._damaged)
        entries = joined(shards)
        return _State(shards, entries, rows_of(shards, entries), [None] * len(shards))

    def __getstate__(self) -> dict[str, Any]:
        state = self._state
        return {**self.__dict__, "_state": state._replace(mapped=[None] * len(state.shards))}

    def tokens(self, key: str) -> Tensor:
        """(N, D) newly made; of int8 it is float32. Raises BankError where the file cannot be read."""
        if "scale" not in self._fields:
            return self._tensors(key, "patch_tokens")[0]
        return dequantise(*self._tensors(key, "patch_tokens", "scale"))

    def cls(self, key: str) -> Tensor:
        """(D,) newly made. Raises BankError where the bank has none."""
        if "cls" not in self._fields:
            raise BankError(f"{self._directory} has no [CLS] features: it was made of pickles, which have none.")
        return self._tensors(key, "cls")[0]

    def checksum(self, key: str) -> str:
        """The SHA-256 of the key's feature as it is stored now."""
        return checksum(
            {name: numbers.data for name, numbers in zip(self._fields, self._read(key, *self._fields), strict=True)}
        )

    def _tensors(self, key: str, *names: str) -> list[Tensor]:
        import torch  # here, so that what asks for no tensor needs no torch

        # Copied by numpy: torch would wake its threads for so small a copy, which takes longer wherever cores are busy.
        return [
            torch.from_numpy(numbers.copy())
            .view(getattr(torch, self._fields[name].dtype))
            .view(self._fields[name].shape)
            for name, numbers in zip(names, self._read(key, *names), strict=True)
        ]

    def file(self, key: str) -> Path:
        """The shard that holds the key's feature."""
        state = self._state
        return state.shards[state.rows[key].shard].path

    def bytes_on_disk(self) -> int:
        """Of all shards together."""
        return sum(shard.bytes for shard in self._state.shards)

    def _read(self, key: str, *names: str) -> list[Numbers]:
        """A feature's numbers, by field. Raises BankError where it is there no longer."""
        state = self._state
        for _ in range(_ATTEMPTS):
            try:
                number, row = state.rows[key]
            except KeyError:
                raise BankError(
                    f"{self._directory} had a feature of {key!r} when it was opened, and has none."
                ) from None
            try:
                if (mapped := state.mapped[number]) is None:
                    mapped = state.mapped[number] = map_shard(self._storage, state.shards[number], self._cache)
                return [mapped[name][row] for name in names]
            except FileNotFoundError:
                # A run has put a more complete shard in its place since the bank was opened.
                state = self._load()
                if not state.shards:
                    raise BankError(f"{self._directory} is gone: there is no shard in it any more.") from None
                if state.shards[0].manifest.differences(self.manifest):
                    raise BankError(f"{self._directory} was replaced since it was opened. Open it again.") from None
                self._state = state
        raise BankError(f"{self._directory} changes too fast to be read.")


def map_shard(storage: Storage, shard: Shard, cache: Path | None = None) -> Mapped:
    """A shard's numbers: nothing is read until it is used. Of a local one they are mapped into memory.

    Args:
        cache: where what is fetched from an object store is kept.

    Raises FileNotFoundError where it is gone, BankError where it cannot be mapped.
    """
    if is_remote(shard.path):
        return remote_columns(storage, shard, cache)
    import torch
    from safetensors import SafetensorError, safe_open

    rows = len(shard.features)
    try:
        with safe_open(shard.path, framework="pt") as file:
            return {
                field.name: file.get_tensor(field.name).reshape(rows, math.prod(field.shape)).view(torch.uint8).numpy()
                for field in fields(shard.manifest)
            }
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise BankError(f"{shard.path} cannot be read: {error}.") from error
