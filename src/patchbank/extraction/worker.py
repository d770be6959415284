"""The work of one device: reads and encodes images into a bank; a worker does it unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import groupby

import torch

from patchbank.bank.writer import BankWriter
from patchbank.budget import ByteBudget
from patchbank.config import ExtractConfig
from patchbank.datasets import Sample
from patchbank.datasets.samples import Decoded, Failure
from patchbank.encoders.runner import Runner
from patchbank.errors import DatasetError
from patchbank.extraction.advice import auto_workers
from patchbank.extraction.pipeline import Slots, Stages, StageTimes, run
from patchbank.extraction.work import Outcome, Task, Unit
from patchbank.preprocess import load

# Features stored as halves are rounded on the device, so that half the bytes are transferred. int8 scales are computed
# from float32.
_RECEIVED = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_REQUESTS = 4  # decode threads per core, if reading waits for a network


def encode_into(
    bank: BankWriter,
    runner: Runner,
    todo: Sequence[Sample],
    config: ExtractConfig,
    *,
    added: Callable[[int, Sequence[Failure]], None],
    stop: Callable[[], bool],
) -> tuple[StageTimes, list[str], DatasetError | None]:
    """Read and encode images, and give them to a bank, in order.

    Returns:
        Seconds waited for each stage; notes for the user; and the error that ended the run if the images are gone, for
        the caller to raise after committing the features before it.
    """
    gone: list[DatasetError] = []
    wanted = bank.manifest.input

    def decode(sample: Sample, budget: ByteBudget) -> Decoded | Failure:
        try:
            return load(sample, wanted, budget)
        except DatasetError as error:
            gone.append(error)
            return Failure(sample.key, str(error))  # never stored: the run stops before this batch

    stages = Stages(
        decode=decode,
        submit=partial(runner.submit, dtype=_RECEIVED.get(bank.manifest.dtype, torch.float32)),
        add=bank.add,
        added=added,
        pinned=runner.device.type == "cuda",
    )
    workers = config.workers or auto_workers() * (_REQUESTS if any(each.source.remote for each in todo[:1]) else 1)
    batch_size = bank.manifest.batch_size
    times = run(
        _batches(todo, batch_size),
        stages,
        batch_size=batch_size,
        input_size=wanted.size,
        workers=workers,
        stop=lambda: bool(gone) or stop(),
    )
    notes = list(runner.notes)
    if bank.manifest.compiled and not runner.compiled:
        notes.append("The bank was begun compiled: the last bits of these features may differ.")
    return times, notes, gone[0] if gone else None


def _batches(todo: Sequence[Sample], batch_size: int) -> Iterator[Slots]:
    """The batches: an image belongs to batch ``position // batch_size``, slot ``position % batch_size``."""
    for _, together in groupby(todo, lambda sample: sample.position // batch_size):
        yield [(sample.position % batch_size, sample) for sample in together]


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
        times, notes, gone = encode_into(bank, self._runner, unit.todo, self._task.config, added=added, stop=stop)
        bank.commit()
        if gone:
            raise gone
        return Outcome(bank.features_committed - images, failures, bank.bytes_written - size, times, notes)

    def close(self) -> None:
        """Close the bank."""
        self._stack.close()
