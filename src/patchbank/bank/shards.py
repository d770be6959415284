"""The ``shards`` layout, reading: memory-mapped safetensors files, random access by key."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from patchbank.bank.entries import Entry, wins
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import checksum, fields, unpack
from patchbank.bank.shard import DAMAGED, Shard, ShardDamagedError, read_shard, shards_in
from patchbank.errors import BankError
from patchbank.files import fsync_directory

if TYPE_CHECKING:
    from torch import Tensor


class Row(NamedTuple):
    """Where a feature lies: in which shard, and in which row of its tensors."""

    shard: Shard
    row: int


def read_shards(
    directory: Path, damaged: Literal["raise", "skip", "set aside"] = "raise", known: Iterable[Shard] = ()
) -> list[Shard]:
    """The headers of all shards of a bank, in the order of their names.

    Args:
        damaged: what to do about a shard whose content is not what its name says: raise BankError; or leave it out,
            so that what it held counts as not done; or rename it too, out of the bank's way.
        known: shards that were read before: a shard never changes, so they are not read again.

    Raises BankError where two shards are of different banks.
    """
    read = {shard.path: shard for shard in known}
    while True:
        shards: list[Shard] = []
        try:
            for path in shards_in(directory):
                try:
                    shards.append(read.get(path) or read_shard(path))
                except ShardDamagedError as error:
                    if damaged == "raise":
                        raise BankError(f"{error} `patchbank repair {directory}` says what to do.") from error
                    if damaged == "set aside":
                        path.rename(path.with_name(path.name + DAMAGED))
                        fsync_directory(directory)
        except FileNotFoundError:
            continue  # somebody completed it meanwhile: what it held is in another shard now
        for shard in shards[1:]:
            if differences := shards[0].manifest.differences(shard.manifest):
                name, has, other = differences[0]
                raise BankError(
                    f"{directory} holds shards of two banks: {shards[0].path.name} has {name} {has}, "
                    f"{shard.path.name} has {other}. Move the ones that do not belong here to another directory."
                )
        return shards


def index(shards: Iterable[Shard]) -> tuple[dict[str, Entry], dict[str, Row]]:
    """(entry of every key, where the features among them lie)."""
    entries: dict[str, Entry] = {}
    rows: dict[str, Row] = {}
    for shard in shards:
        for number, entry in enumerate((*shard.features, *shard.failures)):
            if wins(entry, entries.get(entry.key)):
                entries[entry.key] = entry
                if entry.failure is None:
                    rows[entry.key] = Row(shard, number)
                else:
                    rows.pop(entry.key, None)
    return entries, rows


class ShardStore:
    """The features in a bank of shards.

    A shard's file is mapped into memory when it is first read from. Threads may share one store; a process that gets
    it pickled maps for itself.
    """

    def __init__(self, directory: Path, damaged: Literal["raise", "skip"] = "raise") -> None:
        self._directory = directory
        self._damaged = damaged
        self._load()
        if not self._shards:
            raise BankError(f"{directory} is not a bank: there is no shard in it.")
        self.manifest: Manifest = self._shards[0].manifest

    def _load(self) -> None:
        self._shards = read_shards(self._directory, self._damaged)
        self.entries, self._rows = index(self._shards)
        self._mapped: dict[Path, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def tokens(self, key: str) -> Tensor:
        """(N, D) newly made; of int8 it is float32. Raises BankError where the file cannot be read."""
        tensors, row = self._find(key)
        scale = tensors.get("scale")
        return unpack(tensors["patch_tokens"][row], None if scale is None else scale[row])

    def cls(self, key: str) -> Tensor:
        """(D,) newly made. Raises BankError where the bank has none."""
        tensors, row = self._find(key)
        if "cls" not in tensors:
            raise BankError(f"{self._directory} has no [CLS] features: it was made of pickles, which have none.")
        return tensors["cls"][row].clone()

    def checksum(self, key: str) -> str:
        """The SHA-256 of the key's feature as it is stored now."""
        tensors, row = self._find(key)
        return checksum({name: tensor[row] for name, tensor in tensors.items()})

    def file(self, key: str) -> Path:
        """The shard that holds the key's feature."""
        return self._rows[key].shard.path

    def bytes_on_disk(self) -> int:
        """Of all shards together."""
        return sum(shard.bytes for shard in self._shards)

    def _find(self, key: str) -> tuple[dict[str, Tensor], int]:
        for attempt in (1, 2):
            shard, row = self._rows[key]
            try:
                tensors = self._mapped.get(shard.path)
                if tensors is None:
                    tensors = self._mapped[shard.path] = map_shard(shard)
                return tensors, row
            except FileNotFoundError as error:
                if attempt == 2:
                    raise BankError(f"{shard.path} is gone. Run the same extraction again to make it anew.") from error
                self._load()  # a run has put a more complete shard in its place since the bank was opened
                if key not in self._rows:
                    raise BankError(f"{shard.path} is gone, and with it {key!r}.") from error
        raise AssertionError


def map_shard(shard: Shard) -> dict[str, Tensor]:
    """A shard's tensors, mapped into memory: nothing is read until it is used.

    Raises FileNotFoundError where it is gone, BankError where it cannot be mapped.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard.path, framework="pt") as file:
            return {field.name: file.get_tensor(field.name) for field in fields(shard.manifest)}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise BankError(f"{shard.path} cannot be read: {error}.") from error
