"""What the benchmarks share: pictures of HICO-DET's sizes, alternating rounds, and how results are printed."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from tests.support import REPOSITORY, photograph

import patchbank
from benchmarks.tables import TABLES
from benchmarks.tables import print_table as print_table
from patchbank import ExtractConfig, encoders
from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Feature
from patchbank.bench.machine import facts
from patchbank.datasets import Dataset
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.openai.registry import Model
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.extraction.devices import Devices
from patchbank.extraction.plan import describe
from patchbank.features import CLS, GRID

# The commonest sizes of HICO-DET's test images, as (width, height), and how many of a hundred have them; together they
# are 62 of a hundred. The rest differ little: 19,200 to 409,600 pixels.
HICO_SIZES = {
    (640, 480): 20,
    (640, 427): 17,
    (480, 640): 6,
    (640, 426): 5,
    (427, 640): 5,
    (640, 425): 3,
    (640, 640): 3,
    (640, 428): 2,
    (500, 375): 1,
}
_SOURCES = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
_T = TypeVar("_T")
_SKIPPED: list[str] = []  # what this process has not measured, and why
_VOCABULARY = 64  # the text tower is never run: a small one makes the file smaller


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with a benchmark's docstring as its help."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def options_of(
    description: str | None, arguments: Sequence[str] | None, file: bool = False, **defaults: Any
) -> argparse.Namespace:
    """The options of `parser`, one for each default.

    A list is written ``a,b``; False is a switch; a type stands for an option without a default. With `file`, one must
    be named.
    """
    command = parser(description)
    if file:
        command.add_argument("file", type=Path)
    for name, default in defaults.items():
        how: dict[str, Any] = {"default": default, "type": type(default), "help": f"default: {default}"}
        if default is False:
            how = {"action": "store_true"}
        elif isinstance(default, type):
            how = {"type": default}
        elif isinstance(default, list):
            how |= {"type": numbers if default and isinstance(default[0], int) else listed}
            how |= {"help": f"default: {','.join(map(str, default)) or 'none'}"}
        command.add_argument(f"--{name.replace('_', '-')}", **how)
    return command.parse_args(arguments)


def listed(text: str) -> list[str]:
    """``a,b`` -> ``["a", "b"]``."""
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    """``1000,2000`` -> ``[1000, 2000]``."""
    return [int(part) for part in listed(text)]


def hico_photographs(directory: Path, count: int) -> list[Path]:
    """Write `count` different JPEGs of HICO-DET's sizes, parts of photographs, of quality 90; the same each time."""
    directory.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    every = list(HICO_SIZES)
    chosen = [*every, *chance.choices(every, list(HICO_SIZES.values()), k=count)]
    chance.shuffle(chosen)
    paths: list[Path] = []
    for number, (width, height) in enumerate(chosen[:count]):
        source = photograph(_SOURCES[number % len(_SOURCES)])
        largest = min(source.width / width, source.height / height)
        scale = largest * chance.uniform(0.7, 1.0)
        left = chance.uniform(0, source.width - scale * width)
        top = chance.uniform(0, source.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        paths.append(directory / f"HICO_test2015_{number:08}.jpg")
        source.resize((width, height), Image.Resampling.BICUBIC, box).save(paths[-1], quality=90)
    return paths


def untrained(model: Model, directory: Path) -> Path:
    """Write a model's seeded untrained weights; the file that ``clip.load`` and patchbank both open."""
    path = directory / "untrained.pt"
    write_untrained(model, path, vocabulary=_VOCABULARY)
    return path


def spec_of(model: Model, weights: Path, precision: str = "fp32") -> EncoderSpec:
    """A model with the weights of a file."""
    return encoders.find(ExtractConfig(model=model.name, weights=weights, precision=precision))  # type: ignore[arg-type]


def manifest_of(config: ExtractConfig, dataset: str = "folder", split: str | None = None) -> Manifest:
    """The manifest of a configuration's bank with random weights, made on the CPU in batches of 8."""
    assert config.layout is not None
    made = Dataset(dataset, split, Path(), ())
    return describe(made, config.layout, config, Devices(("cpu",)), encoders.random(config))


def feature(key: str, tokens: torch.Tensor, size: tuple[int, int]) -> Feature:
    """A feature as the encoder returns it: views of (1 + N, D) tokens, [CLS] first."""
    return Feature(key, {CLS: tokens[0], GRID: tokens[1:]}, size)


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def child(benchmark: str, *arguments: object) -> dict[str, Any]:
    """Run a benchmark's step as a process of its own; returns the last line that it printed."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{benchmark}", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"This failed: {' '.join(command[3:])}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alternate(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Call each variant once per round, in turn, so that a slow minute of the machine affects them all.

    Each returns the seconds that it measured; this returns the medians.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            seconds[name].append(measure())
    return {name: statistics.median(each) for name, each in seconds.items()}


def seconds_of(action: Callable[[], object], device: torch.device | None = None) -> float:
    """The seconds of an action, including its work on the device."""
    if device is not None:
        synchronise(device)
    began = time.perf_counter()
    action()
    if device is not None:
        synchronise(device)
    return time.perf_counter() - began


def batches(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    """The items in runs of `size`; the last may be shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


def skipped(what: str, reason: BaseException | str) -> None:
    """Print what is not measured, and why; the JSON line has it too."""
    if isinstance(reason, BaseException):
        while reason.__cause__ is not None:
            reason = reason.__cause__
        lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
        reason = f"{type(reason).__name__}: {lines[0] if lines else 'no reason given'}"
    _SKIPPED.append(f"{what}: {reason[:160]}")
    print(f"skipped: {_SKIPPED[-1]}")


def versions(*packages: str) -> dict[str, str]:
    """The versions of patchbank, Python, torch and, if installed, these packages."""
    found = {"python": platform.python_version(), "patchbank": patchbank.__version__}
    for package in ("torch", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def finish(benchmark: str, *packages: str, device: torch.device | None = None, **found: Any) -> None:
    """Print the JSON line at the end of a benchmark, with the tables that it printed and what it skipped."""
    head = {
        "benchmark": benchmark,
        "machine": facts(device),
        "versions": versions(*packages),
        "weights": "untrained",
    }
    print(json.dumps(head | found | {"tables": TABLES, "skipped": _SKIPPED}))
    TABLES.clear()
    _SKIPPED.clear()
