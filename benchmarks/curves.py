"""How does speed depend on the batch size and on cores? Images a second of the encoder, and of a whole extraction.

    python -m benchmarks.curves [--model ViT-B/16] [--precision fp32,bf16] [--batch-sizes 1,2,4,8,16,32] [--cores 1,2]
        [--images 32] [--rounds 3] [--device cuda]

Untrained weights, JPEGs of HICO-DET's sizes. Batch sizes run in turn within one process, each on as many images. Each
number of cores is a process of its own, kept to so many (one of a pair that shares a core's units comes first), with as
many threads: the encoder alone in patchbank's batches, and `extract` into shards, with its default workers. Medians
over the rounds count; ends in one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, child, finish, hico_photographs, options_of, print_table, seconds_of
from patchbank import ExtractConfig, Runner, encoders, load_dataset
from patchbank.budget import keep_freed_memory
from patchbank.encoders.device import resolve_device
from patchbank.extraction.advice import cores
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute


def main(arguments: Sequence[str] | None = None) -> None:
    every = sorted({cores(), *(1 << power for power in range(cores().bit_length()))})
    model = {"model": "ViT-B/16", "precision": ["fp32", "bf16"], "device": "cpu", "batch_sizes": [1, 2, 4, 8, 16, 32]}
    options = options_of(__doc__, arguments, **model, cores=every, images=32, rounds=3, step=False)
    if options.step:  # for this program's own use
        print(json.dumps(_with_cores(options)))
        return
    keep_freed_memory()  # as the command line does
    batches = {precision: _batches(options, precision) for precision in options.precision}
    passed_on = [f"--{name}={value}" for name, value in vars(options).items() if name in ("model", "device")]
    passed_on += [f"--images={options.images}", f"--rounds={options.rounds}"]
    passed_on.append(f"--precision={','.join(options.precision)}")
    by_cores = {str(count): child("curves", "--step", "--cores", count, *passed_on) for count in options.cores}
    print_table(
        [f"{options.model}, images/s in batches of", *map(str, options.batch_sizes)],
        [[precision, *rates.values()] for precision, rates in batches.items()],
    )
    print_table(
        ["images/s on cores", *by_cores],
        [[stage, *(rates[stage] for rates in by_cores.values())] for stage in next(iter(by_cores.values()))],
    )
    device = resolve_device(options.device, "fp32")
    finish("curves", device=device, model=options.model, images=options.images, batches=batches, cores=by_cores)


def _batches(options: Any, precision: str) -> dict[str, float]:
    """Images a second of the encoder, by batch size."""
    config = ExtractConfig(model=options.model, precision=precision)  # type: ignore[arg-type]
    runner = Runner(encoders.random(config), resolve_device(options.device, config.precision))
    measures: dict[str, Callable[[], float]] = {}
    for size in options.batch_sizes:
        pixels = torch.randint(0, 256, (size, *runner.spec.input.size, 3), dtype=torch.uint8)
        runner.largest_batch = max(runner.largest_batch, size)
        measures[str(size)] = partial(_encode, runner, pixels, max(1, options.images // size))
        measures[str(size)]()
    return {size: 1 / each for size, each in alternate(measures, options.rounds).items()}


def _encode(runner: Runner, pixels: torch.Tensor, times: int) -> float:
    """Seconds an image."""

    def run() -> None:
        for _ in range(times):
            runner.submit(pixels)()

    return seconds_of(run) / (times * len(pixels))


def _with_cores(options: Any) -> dict[str, float]:
    """Images a second on so many cores: of each precision, the encoder and the extraction."""
    (count,) = options.cores
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0), key=_sibling)[:count])
    torch.set_num_threads(count)
    keep_freed_memory()  # as the command line does
    measures: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        hico_photographs(place / "images", options.images)
        dataset = load_dataset("folder", place / "images")
        for precision in options.precision:
            config = ExtractConfig(model=options.model, precision=precision, device=options.device)
            runner = Runner(encoders.random(config), resolve_device(options.device, precision))
            size = min(runner.batch_size, options.images)
            pixels = torch.randint(0, 256, (size, *runner.spec.input.size, 3), dtype=torch.uint8)
            measures[f"encoder, {precision}"] = partial(_encode, runner, pixels, max(1, options.images // size))
            measures[f"extract, {precision}"] = partial(_extract, runner, dataset, place / "bank", config)
        for measure in measures.values():
            measure()
        return {name: 1 / each for name, each in alternate(measures, options.rounds).items()}


def _sibling(core: int) -> tuple[int, int]:
    """0 of the first that computes with a core's units, 1 of its sibling; and the core."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    first = path.read_text().replace("-", ",").partition(",")[0] if path.exists() else str(core)
    return int(first) != core, core


def _extract(runner: Runner, dataset: Any, bank: Path, config: ExtractConfig) -> float:
    """Seconds an image of a whole extraction."""
    summaries = []
    seconds = seconds_of(
        lambda: summaries.append(execute(make_plan(dataset, bank, config, encoder=runner.spec), runner))
    )
    if summaries[0].images != len(dataset):
        raise SystemExit(f"{summaries[0].images} of {len(dataset)} images were extracted.")
    shutil.rmtree(bank)
    return seconds / len(dataset)


if __name__ == "__main__":
    main()
