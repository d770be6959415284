"""Run benchmarks, each in a process of its own, and write one record: FILE.json, and its tables in FILE.md.

    python -m benchmarks                     all of them, at sizes for ten minutes on two cores
    python -m benchmarks encoder loading     these
    python -m benchmarks --full --out benchmarks/results/NAME.json     the sizes of docs/why/performance.md, for an hour

A record that exists keeps its other benchmarks. One that fails costs no other: its reason is recorded, and the exit
code is 1; one whose package is missing is skipped. `python -m benchmarks.performance` makes the docs of the records.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import records
from patchbank.bench.machine import facts

_DIRECTORY = Path(__file__).parent
_LIMIT = 3600  # seconds of one benchmark


class Sizes(NamedTuple):
    """The arguments of a script: at ten minutes for all, with --full, and with --device; None: not measured there."""

    quick: str
    full: str
    device: str | None = None


# Left out: `billion`, which measures nothing, and `visible`, which needs a file of annotations.
BENCHMARKS = {
    "end_to_end": Sizes(
        "--images 16 --original-images 4 --rounds 1",
        "--images 16 --original-images 4 --rounds 2",
        "--model ViT-B/16,ViT-L/14@336px",
    ),
    "encoder": Sizes(
        "--images 8 --rounds 2 --without 'inductor frozen'",
        "--model ViT-B/16,ViT-L/14@336px --images 8 --rounds 3 "
        "--without 'original single,open_clip,transformers,inductor frozen,patchbank compiled'",
        "--model ViT-B/16,ViT-L/14@336px",
    ),
    "curves": Sizes(
        "--batch-sizes 1,8 --images 8 --rounds 1",
        "--batch-sizes 1,2,4,8,16 --images 16 --rounds 2",
        "--batch-sizes 1,4,16,64,256 --images 512",
    ),
    "families": Sizes("--batch-size 2 --rounds 1", "--batch-size 4 --rounds 3", "--batch-size 64"),
    "outputs": Sizes("--images 2 --rounds 1 --blocks 6", "--images 4 --rounds 3", "--images 64"),
    "crops": Sizes("--images 2 --rounds 1", "--images 6 --rounds 3"),
    "boxes": Sizes("--images 10000", "--images 100000"),
    "two_models": Sizes("--images 24 --rounds 1", "--images 48 --rounds 3"),
    "decode": Sizes("--images 24 --rounds 2", "--images 60 --rounds 3"),
    "read": Sizes("--images 500 --reads 500 --rounds 3", ""),
    "loading": Sizes("--images 400 --workers 0,2 --rounds 1", ""),
    "pooling": Sizes("--rounds 20", "--images 32 --rounds 20", "--images 32"),
    "write": Sizes("--images 128 --rounds 2", ""),
    "dtypes": Sizes("", ""),
    "components": Sizes("--images 4 --random 500", ""),
    "fidelity": Sizes("--without-compiled", "", ""),
    "start": Sizes("--rounds 2", "--rounds 5"),
    "growth": Sizes("--keys 1000,10000", "--keys 1000,10000,1000000"),
    "page": Sizes("--keys 500 --samples 24", "--keys 5000"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    record: dict[str, Any] = {"machine": facts(options.device and torch.device(options.device)), "benchmarks": {}}
    out = options.out or Path(f"{records.slug(record['machine'])}-{records.today()}.json")
    if out.exists():
        existing = records.load(out)
        if existing["machine"] != record["machine"]:
            raise SystemExit(f"{out} is a record of another machine: name another file with --out.")
        record = existing
    for name in options.names:
        print(f"{name:12}", end=" ", flush=True)
        found = record["benchmarks"][name] = _run(name, _arguments(name, options))
        records.save(record, out)  # each time: what is done is kept, whatever comes
        reason = next((f", {state}: {found[state]}" for state in ("skipped", "failed") if state in found), "")
        print(f"{found['seconds']:7.1f} s{reason}", flush=True)
    print(f"{out}\n{out.with_suffix('.md')}")
    return int(any("failed" in record["benchmarks"][name] for name in options.names))


def _options(arguments: Sequence[str] | None) -> Any:
    listing = "\n".join(f"  {name:12} {_question(name)}" for name in BENCHMARKS)
    command = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    command.add_argument("--full", action="store_true", help="the sizes of the docs")
    command.add_argument("--device", help="a GPU (cuda): the benchmarks that take one, at sizes for it")
    command.add_argument("--out", type=Path, metavar="FILE.json", help="default: MACHINE-DATE.json, here")
    options = command.parse_args(arguments)
    able = [name for name, sizes in BENCHMARKS.items() if not options.device or sizes.device is not None]
    if wrong := [name for name in options.names if name not in able]:
        command.error(f"no such benchmark{' on a GPU' if options.device else ''}: {', '.join(wrong)}")
    if options.device and not torch.cuda.is_available():
        command.error("this torch finds no GPU")
    options.names = options.names or able
    return options


def _question(name: str) -> str:
    """The first line of a script's docstring."""
    docstring = ast.get_docstring(ast.parse((_DIRECTORY / f"{name}.py").read_text()))
    assert docstring is not None
    return docstring.partition("\n")[0]


def _arguments(name: str, options: argparse.Namespace) -> str:
    sizes = BENCHMARKS[name]
    if options.device:
        return f"--device {options.device} {sizes.device}".strip()
    return sizes.full if options.full else sizes.quick


def _run(name: str, arguments: str) -> dict[str, Any]:
    """A benchmark's part of the record."""
    found: dict[str, Any] = {"date": records.today(), "arguments": arguments}
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *shlex.split(arguments)]
    for number in (signal.SIGTERM, signal.SIGHUP):  # which end this process alone
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    began = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=_DIRECTORY.parent, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            return found | {"seconds": float(_LIMIT), "failed": "it took longer than an hour"}
        finally:  # Ctrl-C too. A browser, in a group of its own, ends with its driver
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    found["seconds"] = time.perf_counter() - began
    if process.returncode:
        last = (errors.strip() or "no reason given").splitlines()[-1]
        missing = last.startswith("ModuleNotFoundError")
        reason = f"signal {-process.returncode}" if process.returncode < 0 else last
        return found | {"skipped" if missing else "failed": reason}
    result = json.loads(printed.splitlines()[-1])
    return found | {"result": {key: value for key, value in result.items() if key not in ("benchmark", "machine")}}


if __name__ == "__main__":
    sys.exit(main())
