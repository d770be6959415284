"""A plan's work in units, each a run of images that one worker reads, encodes and commits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from patchbank.bank.base_writer import BankState
from patchbank.bank.ledger import Snapshot
from patchbank.bank.manifest import Manifest
from patchbank.bank.shard import Shard
from patchbank.config import ExtractConfig
from patchbank.datasets import Sample
from patchbank.datasets.samples import Failure
from patchbank.encoders.openai.checkpoints import Checkpoint
from patchbank.encoders.openai.registry import Model
from patchbank.extraction.pipeline import StageTimes
from patchbank.extraction.plan import ExtractPlan

# Images a unit, about, at most. At the end of each, a worker waits for the disk; if it dies, so much is done again.
_UNIT = 1024
_ROUNDS = 4  # units for each worker, at least, where there are enough images: the slower ones get fewer


@dataclass(frozen=True)
class Task:
    """What every worker needs to know, and is told once."""

    out: Path
    config: ExtractConfig
    model: Model
    checkpoint: Checkpoint
    manifest: Manifest


@dataclass(frozen=True)
class Unit:
    """Some of a plan's images.

    Attributes:
        samples: all images of the shards concerned; of pickles, those to do.
        known: what the bank holds of them.
    """

    samples: tuple[Sample, ...]
    known: BankState

    @property
    def todo(self) -> list[Sample]:
        """The images without a feature."""
        return [sample for sample in self.samples if sample.key not in self.known.done]


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes:
        images: features committed.
        failures: of images that could not be extracted.
        bytes_written: of features.
        times: seconds waited for each stage.
        notes: what a user should know of how it was computed.
        stopped: whether images are left, because the worker was told to stop.
    """

    images: int
    failures: Sequence[Failure]
    bytes_written: int
    times: StageTimes
    notes: Sequence[str] = field(default_factory=list)
    stopped: bool = False


def task_of(plan: ExtractPlan) -> Task:
    """What workers must know of a plan. It must have its checkpoint."""
    assert plan.checkpoint is not None
    return Task(plan.out, plan.config, plan.model, plan.checkpoint, plan.manifest)


def units_of(plan: ExtractPlan, workers: int) -> list[Unit]:
    """The work that a plan has left, in the images' order, in units that keep `workers` busy.

    A shard is in one unit, and so is a batch.
    """
    manifest = plan.manifest
    atom = manifest.shard_images or manifest.batch_size  # positions that must not be parted
    todo = {sample.position // atom for sample in plan.todo}
    # A shard is made as a whole, though only some of it is left to do; of pickles, only those count.
    needed = plan.selected if manifest.shard_images else plan.todo
    most = max(1, min(_UNIT, len(plan.todo) // (_ROUNDS * workers)))
    runs: list[list[Sample]] = []
    for number, together in groupby(needed, lambda sample: sample.position // atom):
        samples = list(together)
        if number not in todo:
            continue
        if runs and len(runs[-1]) + len(samples) <= most:
            runs[-1] += samples
        else:
            runs.append(samples)
    return list(_units(plan, [(number, tuple(run)) for number, run in enumerate(runs)]))


def _units(plan: ExtractPlan, runs: Sequence[tuple[int, tuple[Sample, ...]]]) -> Iterator[Unit]:
    state = plan.state
    if state is None:
        yield from (Unit(samples, BankState(set(), {}, [])) for _, samples in runs)
        return
    if isinstance(state.read, Snapshot):
        ledger = state.read.entries
        for _, samples in runs:
            left = tuple(sample for sample in samples if sample.key not in state.done)
            entries = {sample.key: ledger[sample.key] for sample in left if sample.key in ledger}
            yield Unit(left, BankState(set(), {}, Snapshot(entries, [])))
        return
    shards = _by_run({sample.key: number for number, samples in runs for sample in samples}, state.read)
    for number, samples in runs:
        keys = {sample.key for sample in samples}
        yield Unit(samples, BankState(keys & state.done, {}, shards[number]))


def _by_run(number_of: dict[str, int], shards: Sequence[Shard]) -> dict[int, list[Shard]]:
    """The shards that hold some of each run's images."""
    found: dict[int, list[Shard]] = defaultdict(list)
    for shard in shards:
        entries = (*shard.features, *shard.failures)
        for number in {number_of[entry.key] for entry in entries if entry.key in number_of}:
            found[number].append(shard)
    return found
