"""How long does a command take before its first image, and with nothing to do?

    python -m benchmarks.start [--model ViT-B/16] [--rounds 5] [--directory DIR]

Real processes in turn, from the start of Python; the median of the rounds counts:

- torch: ``import torch``, until it is there, and until that process has ended;
- torch and file: the same, and the bytes of the weights' file read: what no command that computes can do without;
- start: `patchbank extract folder` of one image into a new bank, until it says "1 image to do": weights are checked,
  loaded and packed, the bank is open, and the first batch can be computed;
- nothing: the same command on the bank that it has made, until that process has ended.

Start is compared with torch and file, both until they are ready; nothing with torch, both until they have ended. Each
is measured with the file in the place of the official one, and with the file as ``--weights``. The weights are
untrained, in the official format; the registry takes them for the official file. A round that does not count goes
first: so files are in the page cache, and modules compiled to bytecode.

Two checks are reported: start within 1.3 times torch and file, and nothing within 1.2 times torch.

Prints a table, and ends in one JSON line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.common import alternate, finish, parser, print_table, untrained
from patchbank.encoders.openai.registry import get_model
from patchbank.files import sha256_of

_REPOSITORY = Path(__file__).parents[1]
_TORCH = "import sys, torch\nopen(sys.argv[1], 'rb').read()\nprint('ready', file=sys.stderr, flush=True)"
_COMMAND = (
    "from patchbank.cli import main\n"
    "from patchbank.encoders.openai.registry import MODELS, Model\n"
    "MODELS[{0.name!r}] = {0!r}\n"
    "main()"
)


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="ViT-B/16", help="one of OpenAI's")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--directory", type=Path, help="where to write; default: the temporary directory")
    options = command.parse_args(arguments)
    model = get_model(options.model)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        place = Path(directory)
        weights = untrained(model, place)
        official = place / "checkpoints" / model.file_name
        official.parent.mkdir()
        official.symlink_to(weights)
        (place / "images").mkdir()
        Image.new("RGB", (64, 48), (10, 200, 30)).save(place / "images" / "one.png")
        ways = {
            "official": (sha256_of(weights), "--checkpoints", str(official.parent)),
            "--weights": (model.sha256, "--weights", str(weights)),
        }
        variants: dict[str, Callable[[], float]] = {
            "torch": partial(_seconds, [_TORCH, os.devnull], "ready"),
            "torch, ended": partial(_seconds, [_TORCH, os.devnull]),
            "torch and file": partial(_seconds, [_TORCH, str(weights)], "ready"),
        }
        for way, (sha256, *given) in ways.items():
            program = _COMMAND.format(replace(model, sha256=sha256))
            extract = [program, "extract", "folder", str(place / "images")]
            extract += ["--model", model.name, "--device", "cpu", *given, "--out"]
            complete, new = place / f"complete {way}", place / f"new {way}"
            _seconds([*extract, str(complete)])
            variants[f"start, {way}"] = partial(_start, [*extract, str(new)], new)
            variants[f"nothing, {way}"] = partial(_seconds, [*extract, str(complete)])
        alternate(variants, 1)
        seconds = alternate(variants, options.rounds)
    bases = {"start": ("torch and file", 1.3), "nothing": ("torch, ended", 1.2)}
    found = {
        name: (value / seconds[bases[kind][0]], bases[kind][1])
        for name, value in seconds.items()
        if (kind := name.partition(",")[0]) in bases
    }
    rows = [[name, f"{value:.2f}", f"{found[name][0]:.2f}" if name in found else ""] for name, value in seconds.items()]
    print_table(["", "seconds", "ratio"], rows)
    checks = {
        name: f"{ratio:.3g}, {'within' if ratio <= bound else 'MORE THAN'} {bound}"
        for name, (ratio, bound) in found.items()
    }
    ratios = {name: ratio for name, (ratio, _) in found.items()}
    finish("start", model=model.name, rounds=options.rounds, seconds=seconds, ratios=ratios, checks=checks)


def _start(program: Sequence[str], bank: Path) -> float:
    shutil.rmtree(bank, ignore_errors=True)
    return _seconds(program, "1 image to do")


def _seconds(program: Sequence[str], until: str = "") -> float:
    """The seconds until a process has ended, or has written `until` to its standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    line, ready = [sys.executable, "-c", *program], None
    began = time.perf_counter()
    with subprocess.Popen(
        line, cwd=_REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said: list[str] = []
        for each in process.stderr:
            said.append(each)
            if until and until in each:
                ready = ready or time.perf_counter() - began
    ended = time.perf_counter() - began
    if process.returncode or (until and ready is None):
        raise SystemExit(f"{' '.join(line[3:])} failed: {''.join(said)}")
    return ended if ready is None else ready


if __name__ == "__main__":
    main()
