"""How fast are features read at random? Pickles as EZ-HOI reads them, against shards, stacked or a tensor a key.

    python -m benchmarks.read [--images 2000] [--reads 1000]

Features of ViT-B/16's shape, of random numbers: no model is needed. All variants run in turn within one process,
several rounds; the median round counts. Files are in the page cache: what is measured is the reading, not the disk.
Prints a table and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchbank import ExtractConfig, open_bank
from patchbank.bank.base_writer import Feature
from patchbank.bank.convert import convert
from patchbank.bank.manifest import Manifest
from patchbank.bank.writer import open_writer
from patchbank.models import get_model
from patchbank.plan import make_fingerprint

_ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--reads", type=int, default=1000)
    options = parser.parse_args()
    keys = [f"image_{number:06}.jpg" for number in range(options.images)]
    chosen = [random.Random(0).choice(keys) for _ in range(options.reads)]
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        readers, sizes = _make(place, keys)
        rounds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(_ROUNDS):
            for name, read in readers.items():
                began = time.perf_counter()
                for key in chosen:
                    read(key)
                rounds[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(each) for name, each in rounds.items()}
    base, base_size = seconds["pickles, pickle.load"], sizes["pickles, pickle.load"]
    print(f"{'':44}{'reads/s':>10}{'us each':>10}{'faster':>9}{'bytes':>9}")
    for name, each in seconds.items():
        print(
            f"{name:44}{options.reads / each:10,.0f}{each / options.reads * 1e6:10.1f}{base / each:8.1f}x"
            f"{sizes[name] / base_size:9.3f}"
        )
    result = {
        "benchmark": "reading",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "images": options.images,
        "reads": options.reads,
        "microseconds": {name: each / options.reads * 1e6 for name, each in seconds.items()},
        "times_faster_than_pickles": {name: base / each for name, each in seconds.items()},
        "bytes_of_the_pickles": {name: sizes[name] / base_size for name in sizes},
    }
    print(json.dumps(result))


def _make(place: Path, keys: list[str]) -> tuple[dict[str, Callable[[str], Tensor]], dict[str, int]]:
    """Write the same features in every form; returns how each is read, and its size in bytes."""
    model = get_model("ViT-B/16")
    manifest = Manifest.of_model(
        model,
        layout="shards",
        dataset="folder",
        split=None,
        fingerprint=make_fingerprint(model, "0" * 64, ExtractConfig(layout="shards")),
        batch_size=8,
        device="cpu",
        cls=True,
        shard_images=634,
    )
    generator = torch.Generator().manual_seed(0)
    (place / "original").mkdir()
    with open_writer(place / "float32", manifest, keys) as writer:
        for key in keys:
            every = torch.randn(model.tokens + 1, model.output_dim, generator=generator)
            writer.add([Feature(key, every[1:], (640, 480), every[0])], [])
            # As the original scripts do: a view whose storage holds [CLS] too.
            (place / "original" / f"{key}.pkl").write_bytes(pickle.dumps(every[1:]))
    exact = open_bank(place / "float32")
    convert(exact, place / "pickles", "ezhoi", shard_size=1)
    for dtype in ("float16", "int8"):
        convert(exact, place / dtype, "shards", dtype, shard_size=256_000_000)  # type: ignore[arg-type]
    half = open_bank(place / "float16")
    save_file({key: half[key] for key in keys}, place / "a_tensor_a_key.safetensors")
    by_key = safetensors.safe_open(place / "a_tensor_a_key.safetensors", framework="pt")
    banks = {name: open_bank(place / name) for name in ("pickles", "float32", "float16", "int8")}

    def original(key: str) -> Tensor:
        with open(place / "original" / f"{key}.pkl", "rb") as file:
            tokens: Tensor = pickle.load(file)
        return tokens

    readers: dict[str, Callable[[str], Tensor]] = {
        "pickles, pickle.load": original,
        "pickles, open_bank": banks["pickles"].__getitem__,
        "shards, float32": banks["float32"].__getitem__,
        "shards, float16": banks["float16"].__getitem__,
        "shards, float16, to float32": lambda key: banks["float16"][key].float(),
        "shards, int8 (read as float32)": banks["int8"].__getitem__,
        # What the layout is not: one tensor a key. Copied likewise, since a mapped tensor is everybody's.
        "one file, float16, a tensor a key": lambda key: torch.from_numpy(by_key.get_tensor(key).numpy().copy()),
    }
    files = sum(path.stat().st_size for path in (place / "original").iterdir())
    sizes = [
        files,
        *(banks[name].bytes_on_disk() for name in ("pickles", "float32", "float16", "float16", "int8")),
        (place / "a_tensor_a_key.safetensors").stat().st_size,
    ]
    return readers, dict(zip(readers, sizes, strict=True))


if __name__ == "__main__":
    main()
