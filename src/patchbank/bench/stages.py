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

from patchbank.bank.base_writer import Feature
from patchbank.bank.reader import Bank, open_bank
from patchbank.bank.writer import open_writer
from patchbank.bench.limit import Limit
from patchbank.budget import ByteBudget
from patchbank.config import Decode, ExtractConfig, Layout, Precision, StoredDtype
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Decoded
from patchbank.encoders.encoder import PatchEncoder, resolve_device
from patchbank.encoders.openai.random import random_encoder
from patchbank.encoders.openai.registry import Model
from patchbank.errors import PatchbankError
from patchbank.extraction.pipeline import StageTimes
from patchbank.extraction.plan import ExtractPlan, describe
from patchbank.extraction.run import execute
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


def decode(dataset: Dataset, config: ExtractConfig, model: Model, how: Decode, threads: int) -> Measure:
    """Images decoded and resized. Raises PatchbankError where none can be."""
    budget = ByteBudget(2 << 30)

    def one(position: int) -> bool:
        sample = dataset.samples[position]
        return isinstance(load(sample, config.resize, model.input_size, budget, how), Decoded)

    with ThreadPoolExecutor(threads) as pool:
        sound = sum(pool.map(one, range(len(dataset))))
        if not sound:
            raise PatchbankError(f"None of the images in {dataset.images} can be decoded. Name others with --images.")
        seconds = _median(lambda: all(pool.map(one, range(len(dataset)))))
    return Measure("decode", f"{how}, {threads} thread{'s' * (threads > 1)}", sound / seconds)


def encode(
    model: Model, precision: Precision, device: torch.device, batch_sizes: list[int], limit: Limit, compiled: bool
) -> Iterator[tuple[int, Measure]]:
    """(batch size, images encoded a second), from the smallest; ends where the device's memory does."""
    for batch_size in batch_sizes:
        try:
            encoder = random_encoder(model, precision, device, batch_size, compiled=compiled)
            n = model.input_size
            pixels = torch.randint(0, 256, (batch_size, n, n, 3), dtype=torch.uint8)
            encoder.submit(pixels)()  # what is prepared once
            if encoder.largest_batch < batch_size:
                return
            seconds = _median(partial(_encode, encoder, pixels))
        except (torch.OutOfMemoryError, PatchbankError):
            return
        how = ", compiled" if encoder.compiled else ""
        rate = batch_size / seconds
        yield batch_size, Measure("encode", f"{precision}, batches of {batch_size}{how}", rate, limit.images_per_second)


def write_and_read(model: Model, place: Path, count: int) -> Iterator[Measure]:
    """Features written durably, and read again at random, of random numbers, in each form that they are stored in."""
    tokens = torch.randn(count, 1 + model.tokens, model.output_dim)
    keys = [f"picture_{number:05}.jpg" for number in range(count)]
    features = [Feature(key, every[1:], (640, 480), cls=every[0]) for key, every in zip(keys, tokens, strict=True)]
    chosen = random.Random(0).choices(keys, k=count)
    dataset = Dataset("folder", None, place, ())
    for layout, dtype in _STORED:
        config = ExtractConfig(model=model.name, layout=layout, dtype=dtype, device="cpu")
        manifest = describe(dataset, layout, config, None)
        with TemporaryDirectory(dir=place, prefix=".patchbank-bench-") as directory:
            began = time.perf_counter()
            with open_writer(Path(directory, "bank"), manifest, keys) as writer:
                for first in range(0, count, 32):
                    writer.add(features[first : first + 32], ())
            yield Measure("write", f"{layout}, {dtype}", count / (time.perf_counter() - began))
            bank = open_bank(Path(directory, "bank"))
            _read(bank, chosen)  # maps what there is to map
            seconds = _median(partial(_read, bank, chosen))
            yield Measure("read", f"{layout}, {dtype}, at random", count / seconds)


def end_to_end(dataset: Dataset, config: ExtractConfig, model: Model, place: Path) -> tuple[Measure, StageTimes]:
    """An extraction as it is; only the weights are random numbers. And where the time went."""
    layout = config.layout or "ezhoi"
    manifest = describe(dataset, layout, config, None)
    device = resolve_device(config.device, config.precision)
    encoder = random_encoder(model, config.precision, device, manifest.batch_size, compiled=manifest.compiled)
    n = model.input_size
    encoder(torch.zeros(manifest.batch_size, n, n, 3, dtype=torch.uint8))
    with TemporaryDirectory(dir=place, prefix=".patchbank-bench-") as directory:
        plan = ExtractPlan(
            dataset=dataset,
            out=Path(directory, "bank"),
            config=config,
            model=model,
            checkpoint=None,
            manifest=manifest,
            resumed=False,
            state=None,
            selected=dataset.samples,
            todo=list(dataset.samples),
            failed_before=0,
            to_delete=[],
        )
        summary = execute(plan, encoder)
    what = f"{config.precision}, {config.decode}, {layout}, {config.dtype}"
    return Measure("end to end", what, summary.images_per_second), summary.times


def _encode(encoder: PatchEncoder, pixels: Tensor) -> Tensor:
    return encoder.submit(pixels)()


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
