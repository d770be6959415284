"""How fast are features written? The original's pickles, patchbank's durable ones, and shards in every dtype.

    python -m benchmarks.write [--model ViT-B/16] [--images 512] [--rounds 5] [--directory DIR]

Features of random numbers, made before, in memory. The original's `pickle.dump` flushes nothing: its files are in the
page cache when it returns. What patchbank writes is on the disk: each pickle, its directory and the index are flushed
for every batch of 8, as `patchbank extract` does on a CPU; shards when they are whole. The limits are what the same
bytes take with one write and one flush a file: as many files as features, and one file. `--directory` says which disk.

Variants run in turn within one process; medians over the rounds count. Prints a table and ends in one JSON line.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common import alternate, batches, feature, finish, manifest_of, options_of, print_table, seconds_of
from patchbank import ExtractConfig
from patchbank.bank import writer as bank_writer
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.budget import keep_freed_memory
from patchbank.encoders.openai.registry import Model, get_model
from patchbank.features import GRID
from patchbank.files import write_and_sync

_BATCH = 8  # images that `extract` hands over at a time on a CPU

# Features to the directory that they are written into.
Write = Callable[[Sequence[Feature], Path], None]


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, model="ViT-B/16", images=512, rounds=5, directory=Path)
    keep_freed_memory()  # as the command line does
    model = get_model(options.model)
    features = _features(model, options.images)
    variants = _variants(model, features)
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        place = Path(directory)
        measures = {name: partial(_timed, write, features, place, name, sizes) for name, write in variants.items()}
        seconds = alternate(measures, options.rounds)
    rates = {name: len(features) / each for name, each in seconds.items()}
    speeds = {name: sizes[name] / each for name, each in seconds.items()}
    # Each against the limit that makes as many files.
    limits = {name: "files, flushed" if name.startswith("pickles") else "one file, flushed" for name in variants}
    of_limit = {name: None if "durable" not in name else speeds[name] / speeds[limits[name]] for name in variants}
    print_table(
        ["", "features/s", "MB/s", "bytes each", "of the limit's MB/s"],
        [
            [name, rates[name], speeds[name] / 1e6, round(sizes[name] / len(features)), of_limit[name]]
            for name in variants
        ],
    )
    finish(
        "write",
        model=options.model,
        images=options.images,
        rounds=options.rounds,
        features_per_second=rates,
        bytes_per_second=speeds,
        of_the_limit=of_limit,
    )


def _features(model: Model, count: int) -> list[Feature]:
    """Features as an encoder returns them: views of (1 + N, D) with [CLS] first."""
    generator = torch.Generator().manual_seed(0)
    features = []
    for number in range(count):
        every = torch.randn(model.tokens + 1, model.output_dim, generator=generator)
        features.append(feature(f"image_{number:06}.jpg", every, (640, 480)))
    return features


def _variants(model: Model, features: Sequence[Feature]) -> dict[str, Write]:
    content = features[0].outputs[GRID].contiguous().view(torch.uint8).numpy().data.cast("B")
    variants: dict[str, Write] = {"pickles, original": _original}
    for threads in (1, 2, 4, 8):
        variants[f"pickles, durable, {threads} threads"] = partial(_with_threads, model, threads)
    for dtype in ("float32", "float16", "int8"):
        variants[f"shards, durable, {dtype}"] = partial(_bank, model, "shards", dtype)
    return variants | {
        "files, flushed": partial(_files, content),
        "one file, flushed": partial(_one_file, content),
    }


def _timed(write: Write, features: Sequence[Feature], place: Path, name: str, sizes: dict[str, int]) -> float:
    out = place / "out"
    os.sync()  # flush the previous variant's writes first
    seconds = seconds_of(lambda: write(features, out))
    sizes[name] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return seconds


def _original(features: Sequence[Feature], out: Path) -> None:
    out.mkdir()
    for each in features:
        with open(out / f"{each.key.split('.')[0]}_clip.pkl", "wb") as file:
            pickle.dump(each.outputs[GRID], file)


def _bank(model: Model, layout: str, dtype: str, features: Sequence[Feature], out: Path) -> None:
    config = ExtractConfig(model=model.name, layout=layout, dtype=dtype)  # type: ignore[arg-type]
    with BankWriter(out, manifest_of(config), [each.key for each in features]) as writer:
        for batch in batches(features, _BATCH):
            writer.add(batch, [])


def _with_threads(model: Model, threads: int, features: Sequence[Feature], out: Path) -> None:
    with mock.patch.object(bank_writer, "_THREADS", threads):
        _bank(model, "ezhoi", "float32", features, out)


def _files(content: memoryview, features: Sequence[Feature], out: Path) -> None:
    out.mkdir()
    for each in features:
        write_and_sync(out / each.key, [content])


def _one_file(content: memoryview, features: Sequence[Feature], out: Path) -> None:
    out.mkdir()
    write_and_sync(out / "features", [content] * len(features))


if __name__ == "__main__":
    main()
