"""One device's work: images read, encoded and handed to a bank; and a worker that does it unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from patchbank.bank.manifest import Manifest
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

# What is stored in half the bytes is rounded on the device, so that half the bytes are received. int8's scales are
# computed of float32.
_RECEIVED = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_REQUESTS = 4  # decode threads a core, where reading waits for a network


def encode_into(
    bank: BankWriter,
    runner: Runner,
    todo: Sequence[Sample],
    config: ExtractConfig,
    *,
    added: Callable[[int, Sequence[Failure]], None],
    stop: Callable[[], bool],
) -> tuple[StageTimes, DatasetError | None]:
    """Read and encode images, and hand them to a bank, in order.

    Returns:
        Seconds waited for each stage; and where the images are gone, the error that ended it, so that what came before
        can be committed first.
    """
    gone: list[DatasetError] = []
    wanted = bank.manifest.input

    def decode(sample: Sample, budget: ByteBudget) -> Decoded | Failure:
        try:
            return load(sample, wanted, budget)
        except DatasetError as error:
            gone.append(error)
            return Failure(sample.key, str(error))  # never recorded: the run stops before this batch is

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
    return times, gone[0] if gone else None


def _batches(todo: Sequence[Sample], batch_size: int) -> Iterator[Slots]:
    """An image belongs to batch ``position // batch_size``, slot ``position % batch_size``."""
    slots: list[tuple[int, Sample]] = []
    current = -1
    for sample in todo:
        number, slot = divmod(sample.position, batch_size)
        if number != current and slots:
            yield slots
            slots = []
        current = number
        slots.append((slot, sample))
    if slots:
        yield slots


def compiling_notes(manifest: Manifest, runner: Runner) -> list[str]:
    """What to say where a bank is compiled and this process's encoder is not."""
    if manifest.compiled and not runner.compiled:
        return ["The bank was begun compiled: the last bits of these features may differ."]
    return []


class Worker:
    """One process's share of a run: the model loaded once, the bank opened once, units done one after the other."""

    def __init__(self, task: Task, device: str) -> None:
        """Load the model. Raises WeightsError and ConfigError as `Runner` does."""
        manifest = task.manifest
        self._config = task.config
        self._runner = Runner(
            task.encoder, torch.device(device), batch_size=manifest.batch_size, compiled=manifest.compiled
        )
        self._stack = ExitStack()
        self._open = partial(BankWriter, task.out, manifest, {}, helper=True)
        self._bank: BankWriter | None = None
        self._notes = compiling_notes(manifest, self._runner)
        self._noted = 0

    def __call__(self, unit: Unit, stop: Callable[[], bool]) -> Outcome:
        """Do a unit; when this returns, it is durable.

        Raises BankError where the bank cannot be opened or written, and DatasetError where the images are gone.
        """
        images = 0
        failures: list[Failure] = []

        def added(count: int, failed: Sequence[Failure]) -> None:
            nonlocal images
            images += count
            failures.extend(failed)

        if self._bank is None:  # one who gets no unit leaves nothing in it to tidy up
            self._bank = self._stack.enter_context(self._open())
        bank = self._bank
        before = bank.bytes_written
        bank.expect({sample.key: sample.position for sample in unit.samples}, unit.known)
        todo = unit.todo
        times, gone = encode_into(bank, self._runner, todo, self._config, added=added, stop=stop)
        bank.commit()
        if gone:
            raise gone
        notes = [*self._runner.notes[self._noted :], *self._notes]
        self._noted = len(self._runner.notes)
        return Outcome(
            images,
            failures,
            bank.bytes_written - before,
            times,
            notes,
            stopped=images + len(failures) < len(todo),
        )

    def close(self) -> None:
        """Close the bank."""
        self._stack.close()
