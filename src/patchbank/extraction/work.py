"""A plan's work in units, each a run of images that one worker reads, encodes and commits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from patchbank.bank.index import Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.writer import BankState
from patchbank.config import ExtractConfig
from patchbank.datasets import Sample
from patchbank.datasets.samples import Failure
from patchbank.encoders.base import EncoderSpec
from patchbank.extraction.devices import Devices
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
    encoder: EncoderSpec
    manifest: Manifest
    devices: Devices


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
    """What workers must know of a plan whose weights are there."""
    return Task(plan.out, plan.config, plan.encoder, plan.manifest, plan.devices)


def units_of(plan: ExtractPlan, workers: int) -> list[Unit]:
    """The work that a plan has left, in the images' order, in units that keep `workers` busy.

    A shard is in one unit, and so is a batch.
    """
    manifest, state = plan.manifest, plan.state or BankState(set(), {}, [])
    shards = manifest.layout == "shards"
    atom = manifest.part_size if shards else manifest.batch_size  # positions that stay together
    todo = {sample.position // atom for sample in plan.todo}
    # A shard is made as a whole, though only some of it is left to do; of pickles, only those count.
    needed = plan.selected if shards else plan.todo
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
    parts = _by_run({sample.key: number for number, samples in enumerate(runs) for sample in samples}, state.parts)
    return [
        Unit(tuple(samples), BankState({sample.key for sample in samples} & state.done, {}, parts[number]))
        for number, samples in enumerate(runs)
    ]


def _by_run(number_of: dict[str, int], parts: Sequence[Part]) -> dict[int, list[Part]]:
    """The parts that list some of each run's samples."""
    found: dict[int, list[Part]] = defaultdict(list)
    for part in parts:
        for number in {number_of[entry.key] for entry in part.entries if entry.key in number_of}:
            found[number].append(part)
    return found
