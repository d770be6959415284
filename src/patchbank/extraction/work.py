"""Splits a plan's work into units, runs of images; a worker reads, encodes and commits one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch

from patchbank.bank.index import Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.writer import BankState, BankWriter
from patchbank.config import ExtractConfig
from patchbank.datasets import Sample
from patchbank.datasets.samples import Failure
from patchbank.decoder_warnings import Warned
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.runner import Runner
from patchbank.extraction.devices import Devices
from patchbank.extraction.pipeline import StageTimes, encode, lane_of, notes_of
from patchbank.extraction.plan import ExtractPlan

# Images per unit, at most, about. A worker waits for the disk after each unit; if it dies, its unit is done again.
_UNIT = 1024
_ROUNDS = 4  # units per worker, at least, if there are enough images: slower workers get fewer


@dataclass(frozen=True)
class Task:
    """The facts that each worker gets once, when it starts."""

    out: Path
    config: ExtractConfig
    encoder: EncoderSpec
    manifest: Manifest
    devices: Devices


@dataclass(frozen=True)
class Unit:
    """Some of a plan's images.

    Attributes:
        samples: all images of the unit's shards; for pickles, the images to do.
        known: the bank's state for these samples.
    """

    samples: tuple[Sample, ...]
    known: BankState

    @property
    def todo(self) -> list[Sample]:
        """The images without a feature."""
        return [sample for sample in self.samples if sample.key not in self.known.done]


@dataclass(frozen=True)
class Outcome:
    """The result of a unit.

    Attributes:
        images: features committed.
        failures: of images that could not be extracted.
        bytes_written: of features.
        times: seconds waited for each stage.
        notes: what a user should know about the computation, one sentence each.
        warned: the decoders' warnings about images.
    """

    images: int
    failures: Sequence[Failure]
    bytes_written: int
    times: StageTimes
    notes: Sequence[str]
    warned: Warned


def units_of(plan: ExtractPlan, workers: int) -> list[Unit]:
    """A plan's images to do, in their order, in units that keep `workers` busy. Units split no shard and no batch."""
    manifest, state = plan.manifest, plan.state
    shards = manifest.layout == "shards"
    atom = manifest.part_size if shards else manifest.batch_size  # positions per shard or batch
    todo = {sample.position // atom for sample in plan.todo}
    # A shard is written as a whole, even if only some of its images are left to do.
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
    known = enumerate(runs) if state.parts else ()  # of a new bank, nothing is known
    run_of = {sample.key: number for number, samples in known for sample in samples}
    parts: dict[int, list[Part]] = defaultdict(list)  # by run: those that list some of its samples
    for part in state.parts:
        for number in {run_of[entry.key] for entry in part.entries if entry.key in run_of}:
            parts[number].append(part)
    return [
        Unit(tuple(samples), BankState({each.key for each in samples if each.key in state.done}, {}, parts[number]))
        for number, samples in enumerate(runs)
    ]


class Worker:
    """One process's part of a run: loads the model once, opens the bank once, and does one unit after the other."""

    def __init__(self, task: Task, device: str) -> None:
        """Load the model. Raises WeightsError and ConfigError as `Runner` does."""
        batch_size, compiled = task.manifest.batch_size, task.manifest.compiled
        self._task = task
        self._runner = Runner(task.encoder, torch.device(device), batch_size=batch_size, compiled=compiled)
        self._stack = ExitStack()

    @cached_property
    def _bank(self) -> BankWriter:
        """Opened for the first unit: a worker without units leaves no files in it."""
        return self._stack.enter_context(BankWriter(self._task.out, self._task.manifest, {}, helper=True))

    def __call__(self, unit: Unit, stop: Callable[[], bool]) -> Outcome:
        """Do a unit. It is durable when this returns.

        Raises BankError if the bank cannot be opened or written, and DatasetError if the images are gone.
        """
        failures: list[Failure] = []

        def added(_: int, failed: Sequence[Failure]) -> None:
            failures.extend(failed)

        bank = self._bank
        images, size = bank.features_committed, bank.bytes_written
        bank.expect({sample.key: sample.position for sample in unit.samples}, unit.known)
        lane = lane_of(bank, self._runner, unit.todo, added)
        gone = encode([lane], self._task.config, stop)
        bank.commit()
        if gone:
            raise gone
        return Outcome(
            images=bank.features_committed - images,
            failures=failures,
            bytes_written=bank.bytes_written - size,
            times=lane.times,
            notes=notes_of(bank, self._runner),
            warned=lane.warned,
        )

    def close(self) -> None:
        """Close the bank."""
        self._stack.close()
