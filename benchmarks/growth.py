"""What grows with the number of images? Memory, start-up, resuming and speed, from a thousand keys to ten million.

    python -m benchmarks.growth [--keys 1000,10000,100000,1000000,10000000] [--layouts shards,ezhoi] [--rounds 1]

The smallest CLIP there can be (32-pixel inputs, 16 tokens of 32 dimensions) and tiny JPEGs, so that what is left is
patchbank's own work for each image. The list is HICO-DET's; a few hundred files serve all keys, through links to their
directory. For each number of keys, each step a process of its own:

- make: `extract` up to `--extract-up-to` keys; then features of random numbers through the bank's writer up to
  `--write-up-to`, whose flushing is left out, since so many flushes measure the disk. Beyond, the bank is laid out
  without the writer: shards with their real headers and a hole in the place of the numbers; pickles that are all the
  same, and their index. `ezhoi` stops at `--ezhoi-up-to` keys, a file each;
- open: `open_bank` of the complete bank, and one feature read;
- resume: `load_dataset` reads the list, and `make_plan` finds that nothing is left to do; the list's share is given;
- again: `extract` on the complete bank, to its summary;
- plan: the list read and a bank planned that is not there yet; what the process holds then beyond what it held before;
  and the plan cut into units, as for a cluster, with the bytes of the largest of them as a worker gets it. "Known" are
  the units of a complete bank of shards, as if all of it were to be done again: the most that a unit can carry.

Shards hold 634 images, as ViT-B/16's do in float32: a million keys are 1,578 files. Peak memory is of the process, its
imports included (torch's are most of it). Of several rounds the best counts; for memory, the largest.
Two checks are reported: that peak memory of `extract` at 10,000 keys is within 5 % of that at 1,000, and
that opening and resuming a million take under 5 s each.

Ten million keys in shards take 9 GB of memory, 3 GB of disk and seven minutes a round; a million pickles, 4 GB of disk
and some minutes.

Prints the time of `patchbank --help` and two tables, and ends in one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import finish, listed, numbers, parser, print_table, seconds_of
from benchmarks.growth_steps import STEPS, prepare

_REPOSITORY = Path(__file__).parents[1]
_MAKERS = {"extract": "extract", "write": "writer", "lay": "neither"}
_HELPS = 5  # runs of `patchbank --help`
_READERS = ("open", "resume", "again", "plan")


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--keys", type=numbers, default=[1_000, 10_000, 100_000, 1_000_000, 10_000_000])
    command.add_argument("--layouts", type=listed, default=["shards", "ezhoi"])
    command.add_argument("--extract-up-to", type=int, default=10_000)
    command.add_argument("--write-up-to", type=int, default=100_000)
    command.add_argument("--ezhoi-up-to", type=int, default=1_000_000)
    command.add_argument("--rounds", type=int, default=1, help="of all steps but making")
    command.add_argument("--directory", type=Path, help="where to write; default: the temporary directory")
    command.add_argument("--step", help="one step, in this process: for this program's own use")
    options = command.parse_args(arguments)
    if options.step:
        print(json.dumps(STEPS[options.step](options.directory, options.keys[0], options.layouts[0])))
        return
    helps = [_help() for _ in range(_HELPS)]
    print(f"patchbank --help: {statistics.median(helps):.2f} s\n")
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        prepare(Path(directory))
        for layout in options.layouts:
            results[layout] = [
                _measure(Path(directory), keys, layout, _way(keys, options), options.rounds)
                for keys in options.keys
                if layout != "ezhoi" or keys <= options.ezhoi_up_to
            ]
    _print_tables(results)
    checks = _checks(results)
    for name, value in checks.items():
        print(f"{name}: {value}")
    finish("growth", "numpy", help_seconds=statistics.median(helps), results=results, checks=checks)


def _way(keys: int, options: Any) -> str:
    """The step that makes a bank with this many keys."""
    if keys <= options.extract_up_to:
        return "extract"
    return "write" if keys <= options.write_up_to else "lay"


def _measure(place: Path, keys: int, layout: str, way: str, rounds: int) -> dict[str, Any]:
    """Measure one number of keys; delete the bank afterwards."""
    make = _child(way, place, keys, layout)
    found = {step: _best([_child(step, place, keys, layout) for _ in range(rounds)]) for step in _READERS}
    files = sum(len(names) for at, _, names in os.walk(place / "bank") if Path(at).name != "runs")
    shutil.rmtree(place / "bank")
    resumed, planned = found["resume"], found["plan"]
    return {
        "keys": keys,
        "made_by": _MAKERS[way],
        "images_per_second": None if way == "lay" else keys / make["seconds"],
        "make_peak_mb": None if way == "lay" else make["peak"] / 1e6,
        "open_seconds": found["open"]["seconds"],
        "open_peak_mb": found["open"]["peak"] / 1e6,
        "resume_seconds": resumed["seconds"],
        "of_it_the_list_seconds": resumed["list"],
        "resume_peak_mb": resumed["peak"] / 1e6,
        "again_seconds": found["again"]["seconds"],
        "again_peak_mb": found["again"]["peak"] / 1e6,
        "files": files,
        "plan_seconds": planned["seconds"],
        "plan_peak_mb": planned["peak"] / 1e6,
        "plan_bytes_a_key": round(planned["held"] / keys),
        "resumed_bytes_a_key": round(resumed["held"] / keys),
        "units": planned["units"],
        "units_seconds": planned["units_seconds"],
        "units_peak_mb": planned["units_peak"] / 1e6,
        "pickle_seconds": planned["pickle_seconds"],
        "unit_bytes": planned["unit_bytes"],
        "known_units_seconds": resumed.get("units_seconds"),
        "known_units_peak_mb": resumed["units_peak"] / 1e6 if "units_peak" in resumed else None,
        "known_unit_bytes": resumed.get("unit_bytes"),
    }


def _best(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The minimum of the seconds, and the maximum of everything else."""
    return {
        name: (min if name == "list" or name.endswith("seconds") else max)(each[name] for each in rounds)
        for name in rounds[0]
    }


_READING = {
    "made by": "made_by",
    "images/s": "images_per_second",
    "peak MB": "make_peak_mb",
    "open, s": "open_seconds",
    "MB": "open_peak_mb",
    "resume, s": "resume_seconds",
    "the list, s": "of_it_the_list_seconds",
    "MB ": "resume_peak_mb",
    "again, s": "again_seconds",
    "MB  ": "again_peak_mb",
    "files": "files",
}
_PLANNING = {
    "plan, s": "plan_seconds",
    "peak MB": "plan_peak_mb",
    "bytes a key": "plan_bytes_a_key",
    "resumed": "resumed_bytes_a_key",
    "units": "units",
    "s": "units_seconds",
    "MB": "units_peak_mb",
    "pickled, s": "pickle_seconds",
    "bytes a unit": "unit_bytes",
    "known, s": "known_units_seconds",
    "MB ": "known_units_peak_mb",
    "bytes a unit ": "known_unit_bytes",
}


def _print_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    for columns in (_READING, _PLANNING):
        rows = [
            [f"{layout}, {row['keys']:,}", *(row[name] for name in columns.values())]
            for layout in results
            for row in results[layout]
        ]
        print_table(["", *columns], rows)
        print()


def _checks(results: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The checks whose keys were measured: the number, and whether it is within its limit."""
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
    """Run a step in a separate process; return the last line that it printed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--step", step]
    command += ["--directory", str(place), "--keys", str(keys), "--layouts", layout]
    done = subprocess.run(command, cwd=_REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"The step {step} with {keys:,} keys failed.")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
