"""The ``shards`` layout, writing: images in their order, a shard for every so many of them.

Image i of a data set belongs to shard ``i // shard_images``. A shard that a run could not complete (it was stopped, or
was for a part of the images) is committed as it is; a later run that has the rest puts a more complete one in its
place. The names of the two differ, and the first is deleted only when the second is durable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from patchbank.bank.base_writer import BankState, BankWriter, Feature, check_same
from patchbank.bank.entries import Entry, join
from patchbank.bank.packing import NotFiniteError, checksum, fields, memory, pack
from patchbank.bank.shard import Shard, make_header
from patchbank.bank.shards import joined, map_shard, read_shards, rows_of
from patchbank.bank.storage import storage_of
from patchbank.datasets.samples import Failure
from patchbank.files import DAMAGED, write_and_sync

_ATTEMPTS = 8  # at a shard, while other processes go on writing

_Packed = Mapping[str, memoryview]


class ShardWriter(BankWriter):
    """Writes shards. Outcomes are held in memory until those of another shard come, or the end.

    They must come in the order of the keys, as far as shards are concerned; else shards are written more than once.
    """

    def _begin(self) -> None:
        self._storage = storage_of(self.directory)
        self._features: dict[str, tuple[Entry, _Packed]] = {}
        self._failures: dict[str, Entry] = {}
        shards: list[Shard] = []
        if not self._helper:
            before = self._set_aside()
            known = self._known.read if self._known and isinstance(self._known.read, list) else []
            shards = read_shards(self._storage, "set aside", known)
            if aside := sorted(self._set_aside() - before):
                listed = ", ".join(aside)
                self.notes.append(f"Damaged shards were set aside, and what they held is made anew: {listed}.")
        self.manifest = shards[0].manifest if shards else self._wanted
        self._expect(self._positions, BankState(set(), {}, shards))

    def _set_aside(self) -> set[str]:
        return {name for name in self._storage.names() if name.endswith(DAMAGED)}

    def _expect(self, positions: Mapping[str, int], known: BankState) -> None:
        self._positions = positions
        self._features, self._failures = {}, {}
        self._shards = known.read if isinstance(known.read, list) else []
        self._entries = joined(self._shards)
        self.done = {key for key, entry in self._entries.items() if entry.failure is None}
        self._numbers: dict[str, int | None] = {}
        self._current: int | None = None
        self._commits = 0

    def _end(self) -> None:
        if self._helper:  # what of a unit was not committed is done again
            return
        self._commit()
        self._read()
        counts = Counter(number for shard in self._shards if (number := self._only_number(shard)) is not None)
        for number, count in counts.items():
            if count > 1:  # two processes had a part of it each
                self._write(number)
        self._settle(joined(self._shards))

    def _add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]:
        packed = list(self._threads.map(self._pack, features))
        outcomes = [*packed, *((Entry(failure.key, failure=failure.reason), None) for failure in failures)]
        for entry, numbers in sorted(outcomes, key=lambda each: self._positions[each[0].key]):
            if (number := self._number(entry.key)) != self._current:
                self._commit()
                self._current = number
            entry = entry.after(self._entries.get(entry.key))
            if numbers is None:
                self._failures[entry.key] = entry
            else:
                self._features[entry.key] = entry, numbers
        return [Failure(entry.key, entry.failure) for entry, _ in packed if entry.failure is not None]

    def _pack(self, feature: Feature) -> tuple[Entry, _Packed | None]:
        """What is stored of one image; None where it cannot be. Called from several threads."""
        try:
            tensors = pack(self.manifest, feature.tokens, feature.cls)
        except NotFiniteError as error:
            return Entry(feature.key, failure=str(error)), None
        packed = {name: memory(tensor) for name, tensor in tensors.items()}
        return Entry(feature.key, feature.size, checksum(packed)), packed

    def _commit(self) -> None:
        """Make durable what has come."""
        if self._current is None or not (self._features or self._failures):
            return
        self._write(self._current)
        join(self._entries, (entry for entry, _ in self._features.values()))
        join(self._entries, self._failures.values())
        self.features_committed += len(self._features)
        self.bytes_written += sum(part.nbytes for _, packed in self._features.values() for part in packed.values())
        self._features, self._failures = {}, {}

    def _read(self) -> None:
        """Read the shards that are there by now. Raises BankError where another run has made some of other features."""
        self._shards = read_shards(self._storage, "skip", self._shards)
        if self._shards:
            check_same(self.directory, self._shards[0].manifest, self.manifest)

    def _write(self, number: int) -> None:
        """Put one shard in the place of all that hold images of this number alone, with what has come beside.

        Shards that hold images of several numbers, as a data set that has grown leaves them, stay as they are.
        """
        # What other processes have written meanwhile is looked for now and then, to notice a run of other features;
        # what they wrote of this very shard is joined with it at the end. Each time would be a listing a shard.
        self._commits += 1
        if not self._helper and self._commits & (self._commits - 1) == 0:
            self._read()
        for attempt in range(_ATTEMPTS):
            try:
                return self._write_once(number)
            except FileNotFoundError:  # another process has put a more complete shard in the place of one read here
                if attempt == _ATTEMPTS - 1:
                    raise
                self._read()
        return None

    def _write_once(self, number: int) -> None:
        replaced = [shard for shard in self._shards if self._only_number(shard) == number]
        entries = joined(replaced)
        rows = rows_of(replaced, entries)
        join(entries, (entry for entry, _ in self._features.values()))
        join(entries, self._failures.values())
        ordered = sorted(entries.values(), key=lambda entry: self._positions[entry.key])
        features = tuple(entry for entry in ordered if entry.failure is None)
        failures = tuple(entry for entry in ordered if entry.failure is not None)
        header, name = make_header(self.manifest, number, features, failures)
        path = self.directory / name
        known = next((shard for shard in replaced if shard.path == path), None)
        if known is None:
            mapped = [map_shard(self._storage, shard) for shard in replaced]

            def packed(entry: Entry) -> _Packed:
                if (new := self._features.get(entry.key)) and new[0] == entry:
                    return new[1]
                shard, row = rows[entry.key]
                return {field: column[row].data for field, column in mapped[shard].items()}

            numbers = (packed(entry)[field.name] for field in fields(self.manifest) for entry in features)
            temporary = self._scratch / name
            write_and_sync(temporary, chain([header], numbers))
            known = Shard(path, self.manifest, number, features, failures, temporary.stat().st_size)
            self._storage.commit(temporary, name)
        else:
            self._storage.sync()
        for shard in replaced:
            if shard.path != path:
                self._storage.delete(shard.path.name)
        self._shards = [*(shard for shard in self._shards if shard not in replaced), known]

    @property
    def state(self) -> BankState:
        """As the base class says."""
        failed = {key: entry.failure for key, entry in self._entries.items() if entry.failure is not None}
        return BankState(self.done, failed, self._shards)

    def has(self, feature: Feature) -> bool:
        """As the base class says."""
        entry = self._entries.get(feature.key)
        if entry is None or entry.sha256 is None:
            return False
        tensors = pack(self.manifest, feature.tokens, feature.cls)
        return checksum({name: memory(tensor) for name, tensor in tensors.items()}) == entry.sha256

    def _number(self, key: str) -> int | None:
        """The number of the shard that an image belongs to; None of an image that is not in the data set."""
        position = self._positions.get(key)
        return None if position is None else position // (self.manifest.shard_images or 1)

    def _only_number(self, shard: Shard) -> int | None:
        """The number that all of a shard's images belong to; None where there is no such."""
        name = shard.path.name
        if name not in self._numbers:  # it is asked of every shard at every commit
            numbers = {self._number(entry.key) for entry in (*shard.features, *shard.failures)}
            self._numbers[name] = numbers.pop() if len(numbers) == 1 else None
        return self._numbers[name]


def take_back(directory: Path, reasons: Mapping[str, str], scratch: Path) -> None:
    """Write the shards that hold features which cannot be used anew without them; the reasons stand in their place."""
    storage = storage_of(directory)
    shards = read_shards(storage, "skip")
    entries = joined(shards)
    for shard in shards:
        if not any(entry.key in reasons for entry in shard.features):
            continue
        kept = [(row, entry) for row, entry in enumerate(shard.features) if entry.key not in reasons]
        lost = [
            Entry(entry.key, failure=reasons[entry.key]).after(entries[entry.key])
            for entry in shard.features
            if entry.key in reasons
        ]
        header, name = make_header(shard.manifest, shard.number, [entry for _, entry in kept], [*shard.failures, *lost])
        mapped = map_shard(storage, shard)
        numbers = (mapped[field.name][row].data for field in fields(shard.manifest) for row, _ in kept)
        write_and_sync(scratch / name, chain([header], numbers))
        storage.commit(scratch / name, name)
        storage.delete(shard.path.name)
