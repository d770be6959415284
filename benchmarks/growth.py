"""What grows with the number of images? Memory, start-up, resuming and speed, from a thousand keys to a million.

    python -m benchmarks.growth [--keys 1000,10000,100000,1000000] [--layouts shards,ezhoi] [--extract-up-to 10000]

The smallest CLIP there can be (32-pixel inputs, 16 tokens of 32 dimensions) and tiny JPEGs, so that what is left is
patchbank's own work for each image. The list is HICO-DET's; a few hundred files serve all keys, through links to their
directory. For each number of keys, each step a process of its own:

- make: `extract` up to `--extract-up-to` keys; then features of random numbers through the bank's writer up to
  `--write-up-to`, whose flushing is left out, since so many flushes measure the disk; beyond, the same shards without
  the writer. `ezhoi` stops at `--ezhoi-up-to` keys, a file each;
- open: `open_bank` of the complete bank, and one feature read;
- resume: `load_dataset` reads the list, and `make_plan` finds that nothing is left to do; the list's share is given.

Shards hold 634 images, as ViT-B/16's do in float32: a million keys are 1,578 files. Peak memory is of the process, its
imports included (torch's are most of it). Two things are looked at, and reported: that peak memory of `extract` at
10,000 keys is within 5 % of that at 1,000, and that opening and resuming a million take under 5 s each.

Prints the time of `patchbank --help` and a table, and ends in one JSON line.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import TINY, photograph

from benchmarks.common import batches, finish, listed, numbers, parser, print_table, seconds_of, untrained

_REPOSITORY = Path(__file__).parents[1]
_FILES = 250  # different pictures, and keys a directory
_SHARD_IMAGES = 634
_BATCH = 8
_MAKERS = {"extract": "extract", "write": "writer", "lay": "neither"}
_HELPS = 5  # times that `patchbank --help` is run


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--keys", type=numbers, default=[1_000, 10_000, 100_000, 1_000_000])
    command.add_argument("--layouts", type=listed, default=["shards", "ezhoi"])
    command.add_argument("--extract-up-to", type=int, default=10_000)
    command.add_argument("--write-up-to", type=int, default=100_000)
    command.add_argument("--ezhoi-up-to", type=int, default=100_000)
    command.add_argument("--directory", type=Path, help="where to write; default: the temporary directory")
    command.add_argument("--step", help="one step, in this process: for this program's own use")
    options = command.parse_args(arguments)
    if options.step:
        print(json.dumps(_STEPS[options.step](options.directory, options.keys[0], options.layouts[0])))
        return
    helps = [_help() for _ in range(_HELPS)]
    print(f"patchbank --help: {statistics.median(helps):.2f} s\n")
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        _prepare(Path(directory))
        for layout in options.layouts:
            results[layout] = [
                _measure(Path(directory), keys, layout, _way(keys, layout, options))
                for keys in options.keys
                if layout != "ezhoi" or keys <= options.ezhoi_up_to
            ]
    rows = [[f"{layout}, {row['keys']:,}", *list(row.values())[1:]] for layout in results for row in results[layout]]
    heads = ["", "made by", "images/s", "peak MB", "open, s", "peak MB", "resume, s", "the list, s", "peak MB", "files"]
    print_table(heads, rows)
    checks = _checks(results)
    for name, value in checks.items():
        print(f"{name}: {value}")
    finish("growth", "numpy", help_seconds=statistics.median(helps), results=results, checks=checks)


def _way(keys: int, layout: str, options: Any) -> str:
    """The step that makes a bank of so many keys."""
    if keys <= options.extract_up_to:
        return "extract"
    return "write" if keys <= options.write_up_to or layout == "ezhoi" else "lay"


def _measure(place: Path, keys: int, layout: str, way: str) -> dict[str, Any]:
    """One row of the table; the bank is deleted after."""
    make = _child(way, place, keys, layout)
    opened = _child("open", place, keys, layout)
    resumed = _child("resume", place, keys, layout)
    files = sum(len(names) for _, _, names in os.walk(place / "bank"))
    shutil.rmtree(place / "bank")
    return {
        "keys": keys,
        "made_by": _MAKERS[way],
        "images_per_second": None if way == "lay" else keys / make["seconds"],
        "make_peak_mb": None if way == "lay" else make["peak"] / 1e6,
        "open_seconds": opened["seconds"],
        "open_peak_mb": opened["peak"] / 1e6,
        "resume_seconds": resumed["seconds"],
        "of_it_the_list_seconds": resumed["list"],
        "resume_peak_mb": resumed["peak"] / 1e6,
        "files": files,
    }


def _checks(results: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """What is looked at, where its keys were measured: the number, and whether it is as it should be."""
    checks: dict[str, str] = {}
    for layout, rows in results.items():
        by_keys = {row["keys"]: row for row in rows}
        if {1_000, 10_000} <= by_keys.keys() and by_keys[10_000]["made_by"] == "extract":
            ratio = by_keys[10_000]["make_peak_mb"] / by_keys[1_000]["make_peak_mb"]
            checks[f"{layout}: peak memory at 10,000 of that at 1,000"] = _judged(ratio, 1.05)
        if million := by_keys.get(1_000_000):
            checks[f"{layout}: seconds to open 1,000,000"] = _judged(million["open_seconds"], 5)
            checks[f"{layout}: seconds to resume 1,000,000"] = _judged(million["resume_seconds"], 5)
    return checks


def _judged(value: float, bound: float) -> str:
    return f"{value:.3g}, {'within' if value <= bound else 'MORE THAN'} {bound:g}"


def _help() -> float:
    command = [sys.executable, "-m", "patchbank", "--help"]
    return seconds_of(lambda: subprocess.run(command, cwd=_REPOSITORY, check=True, stdout=subprocess.DEVNULL))


def _child(step: str, place: Path, keys: int, layout: str) -> dict[str, float]:
    """Run a step in a process of its own; returns what it printed last."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--step", step]
    command += ["--directory", str(place), "--keys", str(keys), "--layouts", layout]
    done = subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"The step {step} with {keys:,} keys failed.")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _prepare(place: Path) -> None:
    """Write the pictures, and the tiny model's weights."""
    untrained(TINY, place)
    pictures = place / "pictures"
    pictures.mkdir()
    source = photograph("coffee")
    for number in range(_FILES):
        part = source.crop((number, number % 50, number + 64, number % 50 + 48))
        part.save(pictures / f"HICO_test2015_{number:08}.jpg", quality=90)
    (place / "images").mkdir()


def _dataset(place: Path, keys: int) -> Any:
    """HICO-DET's list of so many images, read as `patchbank extract hicodet` reads it."""
    from patchbank import load_dataset

    return load_dataset("hicodet", place, "test", images=place / "images", annotations=place / f"{keys}.json")


def _write_list(place: Path, keys: int) -> list[str]:
    """Make sure that there are a list of so many keys, and images under them; returns the keys."""
    names = [f"{number // _FILES:05}/HICO_test2015_{number % _FILES:08}.jpg" for number in range(keys)]
    for directory in range(-(-keys // _FILES)):
        link = place / "images" / f"{directory:05}"
        if not link.exists():
            link.symlink_to(place / "pictures")
    entries = [{"file_name": name, "annotations": [], "hoi_annotation": []} for name in names]
    (place / f"{keys}.json").write_text(json.dumps(entries))
    return names


def _config(place: Path, layout: str) -> Any:
    from patchbank import ExtractConfig
    from patchbank.models import MODELS

    MODELS[TINY.name] = TINY
    dim, tokens = TINY.output_dim, TINY.tokens
    return ExtractConfig(
        model=TINY.name,
        weights=place / "untrained.pt",
        layout=layout,  # type: ignore[arg-type]
        batch_size=_BATCH,
        shard_size=_SHARD_IMAGES * 4 * dim * (tokens + 1),
        device="cpu",
    )


def _extract(place: Path, keys: int, layout: str) -> dict[str, float]:
    import torch

    from patchbank import extract

    _write_list(place, keys)
    torch.set_num_threads(1)  # two, on so small a model, mostly wait for each other
    summary = extract(_dataset(place, keys), place / "bank", _config(place, layout))
    if summary.images != keys:
        raise SystemExit(f"{summary.images} of {keys} images were extracted.")
    return {"seconds": summary.seconds, "peak": _peak()}


def _write(place: Path, keys: int, layout: str) -> dict[str, float]:
    """The bank that `extract` would make, but for its features' numbers."""
    import torch

    from patchbank.bank.base_writer import Feature
    from patchbank.bank.writer import open_writer
    from patchbank.plan import make_plan

    names = _write_list(place, keys)
    torch.set_num_threads(1)
    manifest = make_plan(_dataset(place, keys), place / "bank", _config(place, layout)).manifest
    every = torch.randn(1 + manifest.shape[0], manifest.dim)
    began = time.perf_counter()
    with mock.patch("os.fsync"), open_writer(place / "bank", manifest, names) as writer:
        for batch in batches(names, _SHARD_IMAGES):
            writer.add([Feature(name, every[1:], (64, 48), every[0]) for name in batch], [])
    return {"seconds": time.perf_counter() - began, "peak": _peak()}


def _lay(place: Path, keys: int, layout: str) -> dict[str, float]:
    """The shards that the writer would leave, each with the same feature for all of its images."""
    import torch

    from patchbank.bank.entries import Entry
    from patchbank.bank.packing import checksum, fields, memory, pack
    from patchbank.bank.shard import make_header
    from patchbank.plan import make_plan

    names = _write_list(place, keys)
    manifest = make_plan(_dataset(place, keys), place / "bank", _config(place, layout)).manifest
    every = torch.randn(1 + manifest.shape[0], manifest.dim)
    packed = {name: memory(tensor) for name, tensor in pack(manifest, every[1:], every[0]).items()}
    sha256 = checksum(packed)
    (place / "bank").mkdir()
    began = time.perf_counter()
    for number, batch in enumerate(batches(names, manifest.shard_images or 1)):
        header, name = make_header(manifest, number, [Entry(key, (64, 48), sha256) for key in batch], [])
        with open(place / "bank" / name, "wb") as file:
            file.write(header)
            file.writelines(bytes(packed[field.name]) * len(batch) for field in fields(manifest))
    return {"seconds": time.perf_counter() - began, "peak": _peak()}


def _open(place: Path, keys: int, _layout: str) -> dict[str, float]:
    import torch  # noqa: F401  a trainer has it, and reading a feature imports it

    from patchbank import open_bank

    began = time.perf_counter()
    bank = open_bank(place / "bank")
    seconds = time.perf_counter() - began
    if len(bank) != keys:
        raise SystemExit(f"The bank has {len(bank)} of {keys} features.")
    bank[next(iter(bank))]
    return {"seconds": seconds, "peak": _peak()}


def _resume(place: Path, keys: int, layout: str) -> dict[str, float]:
    from patchbank.plan import make_plan

    config = _config(place, layout)
    began = time.perf_counter()
    dataset = _dataset(place, keys)
    reading = time.perf_counter() - began
    plan = make_plan(dataset, place / "bank", config)
    seconds = time.perf_counter() - began
    if plan.todo:
        raise SystemExit(f"{len(plan.todo)} of {keys} images are left to do.")
    return {"seconds": seconds, "list": reading, "peak": _peak()}


def _peak() -> float:
    """The most memory that this process has had, in bytes.

    The kernel counts in `ru_maxrss` what a process had before it became this program, which is its parent's.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


_STEPS = {"extract": _extract, "write": _write, "lay": _lay, "open": _open, "resume": _resume}


if __name__ == "__main__":
    main()
