"""The ``ezhoi`` layout, writing: each feature a durable file of its own, and then a line in the ledger."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from patchbank.bank import ezhoi
from patchbank.bank.base_writer import BankState, BankWriter, Feature
from patchbank.bank.entries import Entry
from patchbank.bank.ledger import Ledger, Snapshot
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import NotFiniteError, pack
from patchbank.bank.pickles import pickle_bytes, to_pickle
from patchbank.datasets.samples import Failure
from patchbank.files import fsync_directory, make_directory, sha256_of_chunks, write_and_sync


def file_bytes(manifest: Manifest) -> int:
    """The size of each feature's file."""
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    return pickle_bytes(manifest.shape, dtype)


def present(directory: Path, entries: Mapping[str, Entry], manifest: Manifest) -> set[str]:
    """Keys that the ledger lists and whose files are there in full size."""
    usual, place = file_bytes(manifest), str(directory)
    keys: set[str] = set()
    for key, entry in entries.items():
        if entry.failure is None:
            try:  # no Path: making it takes as long as the system call
                size = os.stat(f"{place}/{ezhoi.pickle_name(key)}").st_size  # noqa: PTH116
            except (OSError, ValueError):  # ValueError: a name that no file can have
                continue
            if size == (entry.bytes or usual):
                keys.add(key)
    return keys


def _failed(entries: Mapping[str, Entry]) -> dict[str, str]:
    return {key: entry.failure for key, entry in entries.items() if entry.failure is not None}


class EzhoiWriter(BankWriter):
    """Writes one pickle an image. Every `add` is durable when it returns."""

    def _begin(self) -> None:
        self._numbers = itertools.count()
        self.manifest = self._wanted.create(self.directory, self._scratch)
        known = self._known.read if self._known and isinstance(self._known.read, Snapshot) else Snapshot({}, [])
        self._ledger = Ledger(self.directory, self._scratch, known, look=not self._helper)
        self.done = present(self.directory, self._ledger.entries, self.manifest)

    def _expect(self, positions: Mapping[str, int], known: BankState) -> None:
        self._positions, self.done = positions, known.done
        self._ledger.begin(known.read.entries if isinstance(known.read, Snapshot) else {})

    def _commit(self) -> None:
        """Every `add` is durable when it returns."""

    def _end(self) -> None:
        if not self._helper:
            self._ledger.compact()
            self._settle(self._ledger.entries)

    def _add(self, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]:
        # Never the same name twice: where one write fails, others of the same call may still be under way.
        temporaries = [self._scratch / f"{next(self._numbers)}.part" for _ in features]
        outcomes = list(self._threads.map(self._write, features, temporaries))
        entries = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
        not_finite = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        moves = [
            (temporary, self.directory / ezhoi.pickle_name(outcome.key))
            for temporary, outcome in zip(temporaries, outcomes, strict=True)
            if isinstance(outcome, Entry)
        ]
        for temporary, path in moves:
            make_directory(path.parent)
            temporary.rename(path)
        for directory in {path.parent for _, path in moves}:
            fsync_directory(directory)
        entries += [Entry(failure.key, failure=failure.reason) for failure in (*failures, *not_finite)]
        if entries:
            self._ledger.append(entries)
        self.features_committed += len(moves)
        self.bytes_written += len(moves) * file_bytes(self.manifest)
        return not_finite

    @property
    def state(self) -> BankState:
        """As the base class says."""
        return BankState(self.done, _failed(self._ledger.entries), Snapshot(self._ledger.entries, []))

    def has(self, feature: Feature) -> bool:
        """As the base class says."""
        entry = self._ledger.entries.get(feature.key)
        if entry is None or entry.sha256 is None:
            return False
        parts = to_pickle(pack(self.manifest, feature.tokens, None)["patch_tokens"])
        return sha256_of_chunks(parts) == entry.sha256

    def _write(self, feature: Feature, path: Path) -> Entry | Failure:
        """Make one feature durable as the file `path`. Called from several threads."""
        try:
            parts = to_pickle(pack(self.manifest, feature.tokens, None)["patch_tokens"])
        except NotFiniteError as error:
            return Failure(feature.key, str(error))
        write_and_sync(path, parts)
        return Entry(feature.key, feature.size, sha256_of_chunks(parts))
