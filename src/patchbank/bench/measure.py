"""Measure every stage in turn, and choose the options for this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from patchbank import encoders
from patchbank.bank.manifest import library_versions
from patchbank.bench import stages
from patchbank.bench.limit import Limit, product_rate
from patchbank.bench.machine import machine
from patchbank.bench.stages import Measure
from patchbank.config import ExtractConfig, Precision
from patchbank.datasets import Dataset
from patchbank.encoders.device import has_bfloat16, resolve_device
from patchbank.extraction.advice import auto_workers

_PRODUCTS = 64  # largest batch for measuring products: larger ones are no faster, and need much memory
_ENOUGH = 0.97  # of the fastest batch's speed: the smallest batch that reaches it is chosen


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        machine: in words.
        model: its name.
        limits: by precision, what the matrix products alone take.
        measures: in the order of the stages.
        bound: the stage that bounds the extraction end to end.
        options: of ``patchbank extract``, to choose on this machine.
    """

    machine: str
    model: str
    limits: dict[Precision, Limit]
    measures: list[Measure]
    bound: str | None
    options: dict[str, str]

    @property
    def steady(self) -> bool:
        """Whether no measure exceeds its limit, in whole percent; the limit was measured just before it."""
        return all(each.limit is None or round(each.rate / each.limit, 2) <= 1 for each in self.measures)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types."""
        return {
            "machine": self.machine,
            "versions": library_versions(),
            "weights": "random numbers",
            "model": self.model,
            "limit": {
                precision: {
                    "images_per_second": limit.images_per_second,
                    "flops_per_second": limit.flops_per_second,
                    "peak_flops_per_second": limit.peak,
                }
                for precision, limit in self.limits.items()
            },
            "measures": [
                asdict(each) | {"of_the_limit": each.rate / each.limit if each.limit else None}
                for each in self.measures
            ],
            "steady": self.steady,
            "bound": self.bound,
            "options": self.options,
        }


def run(dataset: Dataset, config: ExtractConfig, place: Path, now: Callable[[str], None]) -> Report:
    """Measure everything; what takes long is measured once, and with fewer images.

    Args:
        dataset: the images to decode.
        config: model, precision, layout, dtype, resize, device and workers of the extraction end to end.
        place: a directory on the disk to measure.
        now: called with what is being measured.

    Raises PatchbankError if there is no such device, or no image can be decoded.
    """
    device = resolve_device(config.device, config.precision)
    spec = encoders.random(config)
    workers = config.workers or auto_workers()
    measures: list[Measure] = []
    for how in ("exact", "fast"):
        for threads in sorted({1, workers}):
            now(f"decoding, {threads} at a time")
            measures.append(stages.decode(dataset, spec, config, how, threads))

    limits: dict[Precision, Limit] = {}
    sizes = [config.batch_size] if config.batch_size else _batch_sizes(device)
    best = sizes[0], 0.0
    for precision in dict.fromkeys((*_precisions(device), config.precision)):
        now(f"matrix products, {precision}")
        each = encoders.random(replace(config, precision=precision))
        limit = None
        if each.products:
            limits[precision] = product_rate(each, precision, device, min(sizes[-1], _PRODUCTS))
            limit = limits[precision].images_per_second
        now(f"encoding, {precision}")
        encoded = list(stages.encode(each, device, sizes, limit, config.compile == "on"))
        measures += [measure for _, measure in encoded]
        if precision == config.precision:
            fastest = max((measure.rate for _, measure in encoded), default=0.0)
            best = next(((size, one.rate) for size, one in encoded if one.rate >= _ENOUGH * fastest), best)

    now("writing and reading")
    measures += stages.write_and_read(dataset, spec, config, place)
    options = _options(measures, best, workers)
    now("images to files")
    size, rate = best
    decoding = max(each.rate for each in measures if each.what.startswith(config.decode))
    count = max(size, int(min(rate, decoding) * stages.SECONDS))
    chosen = replace(config, batch_size=size, limit=min(count, len(dataset)))
    whole, bound = stages.end_to_end(dataset, spec, chosen, place)
    measures.append(whole)
    return Report(machine(device), spec.name, limits, measures, bound, options)


def _precisions(device: torch.device) -> list[Precision]:
    """The precisions worth trying on a device."""
    if device.type == "cuda":
        return ["fp32", "tf32", "fp16", "bf16"]
    return ["fp32", "bf16"] if has_bfloat16() else ["fp32"]


def _batch_sizes(device: torch.device) -> list[int]:
    return [16, 64, 128, 256] if device.type == "cuda" else [1, 4, 8, 16]


def _options(measures: list[Measure], best: tuple[int, float], workers: int) -> dict[str, str]:
    """The batch size for ``patchbank extract``, and as many decode threads as feed the encoder."""
    batch_size, rate = best
    one = next(each.rate for each in measures if each.what == "exact, 1 thread")
    needed = ceil(rate / one)
    options = {"--batch-size": str(batch_size), "--workers": str(max(1, min(needed, workers)))}
    if needed > workers:
        options["--decode"] = "fast"
    return options
