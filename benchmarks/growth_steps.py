"""The steps of `benchmarks.growth`: each a function here, and a separate process there."""

from __future__ import annotations

import itertools
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import TINY, photograph

from benchmarks.common import batches, feature, untrained

FILES = 250  # different pictures, and keys a directory
SHARD_IMAGES = 634  # as ViT-B/16's shards hold in float32
_BATCH = 8


def prepare(place: Path) -> None:
    """Write the pictures, and the tiny model's weights."""
    untrained(TINY, place)
    pictures = place / "pictures"
    pictures.mkdir()
    source = photograph("coffee")
    for number in range(FILES):
        part = source.crop((number, number % 50, number + 64, number % 50 + 48))
        part.save(pictures / f"HICO_test2015_{number:08}.jpg", quality=90)
    (place / "images").mkdir()


def _dataset(place: Path, keys: int) -> Any:
    """HICO-DET's list of so many images, read as `patchbank extract hicodet` reads it."""
    from patchbank import load_dataset

    return load_dataset("hicodet", place, "test", images=place / "images", annotations=place / f"{keys}.json")


def _names(keys: int) -> Iterator[str]:
    return (f"{number // FILES:05}/HICO_test2015_{number % FILES:08}.jpg" for number in range(keys))


def _write_list(place: Path, keys: int) -> None:
    """Write the list of this many keys, and link their images, unless that is done."""
    for directory in range(-(-keys // FILES)):
        link = place / "images" / f"{directory:05}"
        if not link.exists():
            link.symlink_to(place / "pictures")
    with open(place / f"{keys}.json", "w") as file:  # a line at a time: of ten million, it is a gigabyte
        for number, name in enumerate(_names(keys)):
            file.write(f'{"," if number else "["}{{"file_name":"{name}","annotations":[],"hoi_annotation":[]}}\n')
        file.write("]")


def _config(place: Path, layout: str) -> Any:
    from patchbank import ExtractConfig
    from patchbank.encoders.openai.registry import MODELS

    MODELS[TINY.name] = TINY
    dim, tokens = TINY.output_dim, TINY.tokens
    return ExtractConfig(
        model=TINY.name,
        weights=place / "untrained.pt",
        layout=layout,  # type: ignore[arg-type]
        batch_size=_BATCH,
        shard_size=SHARD_IMAGES * 4 * dim * (tokens + 1),
        device="cpu",
    )


def _manifest(place: Path, layout: str) -> Any:
    """The bank's manifest; it does not depend on the number of images."""
    from patchbank import encoders
    from patchbank.datasets import Dataset
    from patchbank.extraction.devices import Devices
    from patchbank.extraction.plan import describe

    config = _config(place, layout)
    dataset = Dataset("hicodet", "test", place / "images", ())
    return describe(dataset, config.layout, config, Devices(("cpu",)), encoders.find(config, place, rounding=True))


def _extract(place: Path, keys: int, layout: str) -> dict[str, float]:
    """Make the bank by `extract`."""
    import torch

    from patchbank import extract

    _write_list(place, keys)
    torch.set_num_threads(1)  # two, on so small a model, mostly wait for each other
    summary = extract(_dataset(place, keys), place / "bank", _config(place, layout))
    if summary.images != keys:
        raise SystemExit(f"{summary.images} of {keys} images were extracted.")
    return {"seconds": summary.seconds, "peak": _peak()}


def _write(place: Path, keys: int, layout: str) -> dict[str, float]:
    """Make the bank that `extract` would make, except for the numbers of its features."""
    import torch

    from patchbank.bank.writer import BankWriter

    _write_list(place, keys)
    torch.set_num_threads(1)
    manifest = _manifest(place, layout)
    tokens, dim = manifest.shape
    every = torch.randn(1 + tokens, dim)
    names = list(_names(keys))
    began = time.perf_counter()
    with mock.patch("os.fsync"), BankWriter(place / "bank", manifest, names) as writer:
        for batch in batches(names, SHARD_IMAGES):
            writer.add([feature(name, every, (64, 48)) for name in batch], [])
    return {"seconds": time.perf_counter() - began, "peak": _peak()}


def _lay(place: Path, keys: int, layout: str) -> dict[str, float]:
    """Lay out the files of the writer; shards have their headers, and holes instead of numbers."""
    _write_list(place, keys)
    manifest = _manifest(place, layout)
    (place / "bank").mkdir()
    began = time.perf_counter()
    (_lay_shards if layout == "shards" else _lay_pickles)(place / "bank", keys, manifest)
    return {"seconds": time.perf_counter() - began, "peak": _peak()}


def _lay_shards(bank: Path, keys: int, manifest: Any) -> None:
    from patchbank.bank.packing import sample_bytes

    for start, name, count in _parts(bank, keys, manifest, "0" * 64):
        with open(bank / name, "wb") as file:
            file.write(start)
            file.truncate(len(start) + count * sample_bytes(manifest.outputs))


def _parts(bank: Path, keys: int, manifest: Any, sha256: str) -> Iterator[tuple[bytes, str, int]]:
    """Each part of the index: its beginning, its name, and the number of its samples."""
    from patchbank.bank.index import Entry, Part
    from patchbank.bank.parts import name_part, payload_of

    payload, names = payload_of(bank, manifest.layout), _names(keys)
    for number in itertools.count():
        entries = tuple(Entry(key, (64, 48), sha256) for key in islice(names, manifest.part_size))
        if not entries:
            return
        start, name = name_part(payload, Part(bank, manifest, number, entries, (), 0, 0))
        yield start, name, len(entries)


def _lay_pickles(bank: Path, keys: int, manifest: Any) -> None:
    import torch

    from patchbank.bank.pickles import INDEX, pickle_name
    from patchbank.bank.pickling import to_pickle
    from patchbank.files import sha256_of_chunks

    parts = to_pickle(torch.randn(manifest.shape))
    content, sha256 = b"".join(parts), sha256_of_chunks(parts)
    for number, key in enumerate(_names(keys)):
        path = f"{bank}/{pickle_name(key)}"
        if number % FILES == 0:
            os.mkdir(os.path.dirname(path))  # noqa: PTH102, PTH120
        with open(path, "wb", buffering=0) as file:
            file.write(content)
    (bank / INDEX).mkdir()
    for start, name, _ in _parts(bank, keys, manifest, sha256):
        (bank / INDEX / name).write_bytes(start)


def _open(place: Path, keys: int, _layout: str) -> dict[str, float]:
    """`open_bank`, and one feature read."""
    import torch  # noqa: F401  a trainer has it, and reading a feature imports it

    from patchbank import open_bank

    began = time.perf_counter()
    bank = open_bank(place / "bank")
    seconds = time.perf_counter() - began
    if len(bank) != keys:
        raise SystemExit(f"The bank has {len(bank)} of {keys} features.")
    bank[next(iter(bank))]
    return {"seconds": seconds, "peak": _peak()}


def _plan(place: Path, keys: int, layout: str) -> dict[str, float]:
    """Read the list, plan a new bank, and split the plan into units for workers."""
    from patchbank.extraction.plan import make_plan

    config = _config(place, layout)
    before = _memory("VmRSS")
    began = time.perf_counter()
    dataset = _dataset(place, keys)
    listed = time.perf_counter()
    plan = make_plan(dataset, place / "another", config)
    planned = time.perf_counter()
    if len(plan.todo) != keys:
        raise SystemExit(f"{len(plan.todo)} of {keys} images are left to do.")
    found = {
        "list": listed - began,
        "seconds": planned - began,
        "peak": _peak(),
        "held": _memory("VmRSS") - before,
    }
    return found | _units(plan)


def _resume(place: Path, keys: int, layout: str) -> dict[str, float]:
    """Read the list, and plan the complete bank: nothing to do. Then its units, as if all had to be done again."""
    from patchbank.extraction.plan import make_plan

    config = _config(place, layout)
    before = _memory("VmRSS")
    began = time.perf_counter()
    dataset = _dataset(place, keys)
    reading = time.perf_counter() - began
    plan = make_plan(dataset, place / "bank", config)
    seconds = time.perf_counter() - began
    if plan.todo:
        raise SystemExit(f"{len(plan.todo)} of {keys} images are left to do.")
    found = {"seconds": seconds, "list": reading, "peak": _peak(), "held": _memory("VmRSS") - before}
    if layout == "ezhoi":
        return found  # a unit of pickles has the images that are left, and nothing is
    return found | _units(replace(plan, todo=list(plan.selected)))


def _units(plan: Any) -> dict[str, float]:
    """The work of a cluster's driver on a plan, and the bytes of one call of a worker."""
    from patchbank.extraction.work import units_of

    began = time.perf_counter()
    units = units_of(plan, workers=8)
    cut = time.perf_counter()
    sizes = [len(pickle.dumps(unit, pickle.HIGHEST_PROTOCOL)) for unit in units]
    return {
        "units": len(units),
        "units_seconds": cut - began,
        "pickle_seconds": time.perf_counter() - cut,
        "unit_bytes": max(sizes),
        "units_peak": _peak(),
    }


def _again(place: Path, keys: int, layout: str) -> dict[str, float]:
    """`extract` on the complete bank, from the list to the summary."""
    from patchbank import extract

    began = time.perf_counter()
    summary = extract(_dataset(place, keys), place / "bank", _config(place, layout))
    seconds = time.perf_counter() - began
    if (summary.images, summary.settled) != (0, keys):
        raise SystemExit(f"{summary.images} images were extracted, and {summary.settled} of {keys} are settled.")
    return {"seconds": seconds, "peak": _peak()}


def _peak() -> float:
    """The peak memory of this process, in bytes.

    The kernel counts in `ru_maxrss` what a process had before it became this program, which is its parent's.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _memory("VmHWM") or float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _memory(name: str) -> float:
    """This process's memory as Linux counts it, in bytes; 0 on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0.0)


Step = Callable[[Path, int, str], dict[str, float]]
STEPS: dict[str, Step] = {
    "extract": _extract,
    "write": _write,
    "lay": _lay,
    "open": _open,
    "plan": _plan,
    "resume": _resume,
    "again": _again,
}
