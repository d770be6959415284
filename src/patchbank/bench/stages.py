"""Each stage of an extraction, measured alone on this machine; then all of them together."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from patchbank.bank.payload import Feature
from patchbank.bank.reader import Bank, open_bank
from patchbank.bank.writer import BankWriter
from patchbank.budget import ByteBudget
from patchbank.config import Decode, ExtractConfig, Layout, StoredDtype
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Decoded
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.runner import Runner
from patchbank.errors import PatchbankError
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute, load_runner
from patchbank.features import GRID
from patchbank.preprocess import load

SECONDS = 20.0  # about, at most, for each precision's batches, and for the images end to end
_ROUNDS = 3
_STORED: tuple[tuple[Layout, StoredDtype], ...] = (("ezhoi", "float32"), ("shards", "float32"), ("shards", "float16"))

T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        stage: ``decode``, ``encode``, ``write``, ``read`` or ``end to end``.
        what: how.
        rate: images per second.
        limit: images per second that the encoder's matrix products alone would allow; None for other stages.
    """

    stage: str
    what: str
    rate: float
    limit: float | None = None


def decode(dataset: Dataset, spec: EncoderSpec, config: ExtractConfig, how: Decode, threads: int) -> Measure:
    """Measure decoding and resizing. Raises PatchbankError if no image can be decoded."""
    budget = ByteBudget(2 << 30)
    wanted = replace(spec.input.resized_by(config.resize), decoder=how)

    def all_images() -> int:
        return sum(pool.map(lambda sample: isinstance(load(sample, wanted, budget), Decoded), dataset.samples))

    with ThreadPoolExecutor(threads) as pool:
        seconds, sound = _median(all_images)
    if not sound:
        raise PatchbankError(f"None of the images in {dataset.images} can be decoded. Name others with --images.")
    return Measure("decode", f"{how}, {threads} thread{'s' * (threads > 1)}", sound / seconds)


def encode(
    spec: EncoderSpec, device: torch.device, batch_sizes: list[int], limit: float | None, compiled: bool
) -> Iterator[tuple[int, Measure]]:
    """(batch size, images encoded per second), from the smallest on; ends where they take too much memory or time."""
    rate = math.inf
    for batch_size in batch_sizes:
        if 2 * batch_size / rate > SECONDS:
            return
        try:
            runner = Runner(spec, device, batch_size=batch_size, compiled=compiled)
            pixels = torch.randint(0, 256, (batch_size, *spec.input.size, 3), dtype=torch.uint8)
            runner.submit(pixels)()  # prepares the encoder
            if runner.largest_batch < batch_size:
                return
            seconds, _ = _median(lambda runner=runner, pixels=pixels: runner.submit(pixels)())  # type: ignore[misc]
        except (torch.OutOfMemoryError, PatchbankError):
            return
        rate = batch_size / seconds
        how = f"{spec.identity['precision']}, batches of {batch_size}{', compiled' if runner.compiled else ''}"
        yield batch_size, Measure("encode", how, rate, limit)


def write_and_read(dataset: Dataset, spec: EncoderSpec, config: ExtractConfig, place: Path) -> Iterator[Measure]:
    """Features of random numbers, written durably and read at random, in each layout and dtype of `_STORED`."""
    keys = [f"picture_{number:05}.jpg" for number in range(128)]
    outputs = {name: torch.randn(len(keys), *each.shape) for name, each in spec.outputs.items()}
    features = [
        Feature(key, {name: value[row] for name, value in outputs.items()}, (640, 480)) for row, key in enumerate(keys)
    ]
    chosen = random.Random(0).choices(keys, k=len(keys))
    for layout, dtype in _STORED:
        if layout == "ezhoi" and config.output not in ((), (GRID,)):
            continue
        with TemporaryDirectory(dir=place, prefix=".patchbank-bench-") as directory:
            bank = Path(directory, "bank")
            wanted = make_plan(dataset, bank, replace(config, layout=layout, dtype=dtype), encoder=spec).manifest
            began = time.perf_counter()
            with BankWriter(bank, wanted, keys) as writer:
                for first in range(0, len(keys), 32):
                    writer.add(features[first : first + 32], ())
            yield Measure("write", f"{layout}, {dtype}", len(keys) / (time.perf_counter() - began))
            opened = open_bank(bank)
            _read(opened, chosen)  # opens the memory maps
            seconds, _ = _median(partial(_read, opened, chosen))
            yield Measure("read", f"{layout}, {dtype}, at random", len(keys) / seconds)


def end_to_end(dataset: Dataset, spec: EncoderSpec, config: ExtractConfig, place: Path) -> tuple[Measure, str | None]:
    """A real extraction with random weights, and the stage that bounds it."""
    with TemporaryDirectory(dir=place, prefix=".patchbank-bench-") as directory:
        plan = make_plan(dataset, Path(directory, "bank"), config, encoder=spec)
        runner = load_runner(plan)
        if runner is not None:
            runner(torch.zeros(runner.batch_size, *spec.input.size, 3, dtype=torch.uint8))
        summary = execute(plan, runner)
    what = f"{config.precision}, {config.decode}, {plan.manifest.layout}, {config.dtype}"
    return Measure("end to end", what, summary.images_per_second), summary.bound


def _read(bank: Bank, keys: list[str]) -> None:
    for key in keys:
        _ = bank[key]


def _median(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds, of some repetitions, or of one that takes long; and what the last one returned."""
    taken = list[float]()
    while len(taken) < _ROUNDS and sum(taken) < SECONDS / 4:
        began = time.perf_counter()
        result = function()
        taken.append(time.perf_counter() - began)
    return median(taken), result
