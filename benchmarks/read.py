"""How fast are features read at random? Pickles as EZ-HOI reads them, against shards, stacked or a tensor a key.

    python -m benchmarks.read [--images 2000] [--reads 1000] [--rounds 7]

Features of ViT-B/16's shape, of random numbers: no model is needed. All variants run in turn within one process,
several rounds; the median round counts. Files are in the page cache: what is measured is the reading, not the disk.
Prints a table and ends in one JSON line.
"""

from __future__ import annotations

import pickle
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import alternate, feature, finish, manifest_of, parser, print_table, seconds_of
from patchbank import ExtractConfig, open_bank
from patchbank.bank.convert import convert
from patchbank.bank.writer import BankWriter

_PICKLES = "pickles, pickle.load"


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--images", type=int, default=2000)
    command.add_argument("--reads", type=int, default=1000)
    command.add_argument("--rounds", type=int, default=7)
    options = command.parse_args(arguments)
    keys = [f"image_{number:06}.jpg" for number in range(options.images)]
    chosen = [random.Random(0).choice(keys) for _ in range(options.reads)]
    with tempfile.TemporaryDirectory() as directory:
        readers, sizes = _make(Path(directory), keys)
        seconds = alternate({name: partial(_timed, read, chosen) for name, read in readers.items()}, options.rounds)
    base, base_size = seconds[_PICKLES], sizes[_PICKLES]
    print_table(
        ["", "reads/s", "us each", "times as fast", "bytes"],
        [
            [name, options.reads / each, each / options.reads * 1e6, base / each, sizes[name] / base_size]
            for name, each in seconds.items()
        ],
    )
    finish(
        "read",
        "safetensors",
        images=options.images,
        reads=options.reads,
        microseconds={name: each / options.reads * 1e6 for name, each in seconds.items()},
        times_faster_than_pickles={name: base / each for name, each in seconds.items()},
        bytes_of_the_pickles={name: sizes[name] / base_size for name in sizes},
    )


def _timed(read: Callable[[str], Tensor], keys: Sequence[str]) -> float:
    def run() -> None:
        for key in keys:
            read(key)

    return seconds_of(run)


def _make(place: Path, keys: list[str]) -> tuple[dict[str, Callable[[str], Tensor]], dict[str, int]]:
    """Write the same features in every form; return each form's reader and its size in bytes."""
    manifest = manifest_of(ExtractConfig(layout="shards"))
    tokens, dim = manifest.shape
    generator = torch.Generator().manual_seed(0)
    (place / "original").mkdir()
    with BankWriter(place / "float32", manifest, keys) as writer:
        for key in keys:
            every = torch.randn(1 + tokens, dim, generator=generator)
            writer.add([feature(key, every, (640, 480))], [])
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
        _PICKLES: original,
        "pickles, open_bank": banks["pickles"].__getitem__,
        "shards, float32": banks["float32"].__getitem__,
        "shards, float16": banks["float16"].__getitem__,
        "shards, float16, to float32": lambda key: banks["float16"][key].float(),
        "shards, int8 (read as float32)": banks["int8"].__getitem__,
        # The alternative layout: one tensor per key. Copied too, since a mapped tensor is shared.
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
