"""Each stage of an extraction measured by itself, on this machine, and then all of them together."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from patchbank.bank.payload import Feature
from patchbank.bank.reader import Bank, open_bank
from patchbank.bank.writer import BankWriter
from patchbank.bench.limit import Limit
from patchbank.budget import ByteBudget
from patchbank.config import ExtractConfig, Layout, StoredDtype
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Decoded
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.runner import Runner
from patchbank.errors import PatchbankError
from patchbank.extraction.devices import Devices
from patchbank.extraction.pipeline import StageTimes
from patchbank.extraction.plan import describe, make_plan
from patchbank.extraction.run import execute, load_runner
from patchbank.features import Input
from patchbank.preprocess import load

_ROUNDS = 3
_STORED: tuple[tuple[Layout, StoredDtype], ...] = (("ezhoi", "float32"), ("shards", "float32"), ("shards", "float16"))


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        stage: ``decode``, ``encode``, ``write``, ``read`` or ``end to end``.
        what: how.
        rate: images a second.
        limit: images a second that the model's matrix products alone would allow; None where that says nothing.
    """

    stage: str
    what: str
    rate: float
    limit: float | None = None


def decode(dataset: Dataset, wanted: Input, threads: int) -> Measure:
    """Images decoded and resized. Raises PatchbankError where none can be."""
    budget = ByteBudget(2 << 30)

    def one(position: int) -> bool:
        return isinstance(load(dataset.samples[position], wanted, budget), Decoded)

    with ThreadPoolExecutor(threads) as pool:
        sound = sum(pool.map(one, range(len(dataset))))
        if not sound:
            raise PatchbankError(f"None of the images in {dataset.images} can be decoded. Name others with --images.")
        seconds = _median(lambda: all(pool.map(one, range(len(dataset)))))
    return Measure("decode", f"{wanted.decoder}, {threads} thread{'s' * (threads > 1)}", sound / seconds)


def encode(
    spec: EncoderSpec, device: torch.device, batch_sizes: list[int], limit: Limit, compiled: bool
) -> Iterator[tuple[int, Measure]]:
    """(batch size, images encoded a second), from the smallest; ends where the device's memory does."""
    for batch_size in batch_sizes:
        try:
            runner = Runner(spec, device, batch_size=batch_size, compiled=compiled)
            pixels = torch.randint(0, 256, (batch_size, *spec.input.size, 3), dtype=torch.uint8)
            runner.submit(pixels)()  # what is prepared once
            if runner.largest_batch < batch_size:
                return
            seconds = _median(partial(_encode, runner, pixels))
        except (torch.OutOfMemoryError, PatchbankError):
            return
        how = f"{spec.identity.get('precision', '')}, batches of {batch_size}{', compiled' if runner.compiled else ''}"
        yield batch_size, Measure("encode", how, batch_size / seconds, limit.images_per_second)


def write_and_read(spec: EncoderSpec, place: Path, count: int) -> Iterator[Measure]:
    """Features written durably, and read again at random, of random numbers, in each form that they are stored in."""
    keys = [f"picture_{number:05}.jpg" for number in range(count)]
    outputs = {name: torch.randn(count, *each.shape) for name, each in spec.outputs.items()}
    features = [
        Feature(key, {name: values[row] for name, values in outputs.items()}, (640, 480))
        for row, key in enumerate(keys)
    ]
    chosen = random.Random(0).choices(keys, k=count)
    dataset = Dataset("folder", None, place, ())
    for layout, dtype in _STORED:
        config = ExtractConfig(model=spec.name, layout=layout, dtype=dtype, device="cpu")
        manifest = describe(dataset, layout, config, Devices(("cpu",)), spec)
        with TemporaryDirectory(dir=place, prefix=".patchbank-bench-") as directory:
            began = time.perf_counter()
            with BankWriter(Path(directory, "bank"), manifest, keys) as writer:
                for first in range(0, count, 32):
                    writer.add(features[first : first + 32], ())
            yield Measure("write", f"{layout}, {dtype}", count / (time.perf_counter() - began))
            bank = open_bank(Path(directory, "bank"))
            _read(bank, chosen)  # maps what there is to map
            seconds = _median(partial(_read, bank, chosen))
            yield Measure("read", f"{layout}, {dtype}, at random", count / seconds)


def end_to_end(
    dataset: Dataset, config: ExtractConfig, spec: EncoderSpec, device: torch.device, place: Path
) -> tuple[Measure, StageTimes]:
    """An extraction as it is; only the weights are random numbers. And where the time went."""
    with TemporaryDirectory(dir=place, prefix=".patchbank-bench-") as directory:
        plan = make_plan(dataset, Path(directory, "bank"), config, Devices((str(device),)), spec)
        runner = load_runner(plan)
        assert runner is not None  # an image is left to do, on this device
        runner(torch.zeros(runner.batch_size, *spec.input.size, 3, dtype=torch.uint8))
        summary = execute(plan, runner)
    what = f"{config.precision}, {config.decode}, {plan.manifest.layout}, {config.dtype}"
    return Measure("end to end", what, summary.images_per_second), summary.times


def _encode(runner: Runner, pixels: Tensor) -> dict[str, Tensor]:
    return runner.submit(pixels)()


def _read(bank: Bank, keys: list[str]) -> None:
    for key in keys:
        _ = bank[key]


def _median(function: Callable[[], object]) -> float:
    """Seconds, of some repetitions."""
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return median(seconds)
