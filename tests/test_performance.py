"""`python -m benchmarks`, and the docs made of its records. Nothing here is about time."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from benchmarks import __main__ as runner
from benchmarks import performance, records

from tests.support import REPOSITORY

RECORDS = performance.read()


def test_the_page_is_made_of_the_records() -> None:
    assert (performance.DOCS / "why/performance.md").read_text() == performance.page(RECORDS), (
        "python -m benchmarks.performance"
    )


def test_the_pictures_are_made_of_the_records() -> None:
    made = {name: picture for name, record in RECORDS.items() if (picture := performance.draw(record))}
    found = {path.stem: path.read_text() for path in (performance.DOCS / "images").glob("*.svg")}
    assert found.keys() == made.keys()
    for name, picture in found.items():
        assert len(picture) < 60_000
        if f"Matplotlib {mpl.__version__}<" in picture:  # other versions place things otherwise
            assert picture == made[name], "python -m benchmarks.performance"


def test_figures_of_other_pages_are_the_records() -> None:
    readme, first = ((REPOSITORY / name).read_text() for name in ("README.md", "docs/start/first-bank.md"))
    assert any(_speeds(record) in readme for record in RECORDS.values()), [*map(_speeds, RECORDS.values())]
    for record in RECORDS.values():
        if found := record["benchmarks"].get("dtypes", {}).get("result"):
            assert found["model"] == "ViT-B/16"
            for dtype, row in found["dtypes"].items():
                (size,) = re.findall(rf"^\| .*`{dtype}`.* \| (\d+) kB", first, re.MULTILINE)
                # 402 kB are the pickle's, the index included.
                assert int(size) == pytest.approx(row["bytes"] / 1e3, abs=2)
                error = f"{row['tokens']:.1e}".replace("e-0", "e-")
                assert dtype == "float32" or error in first
                assert dtype not in ("float16", "int8") or (f"{size} kB in `{dtype}`" in readme and error in readme)


def _speeds(record: dict[str, Any]) -> str:
    """The README's table of them."""
    rows = []
    for name, found in record["benchmarks"]["end_to_end"]["result"]["results"].items():
        rates = [found["images_per_second"][each] for each in ("original", "open_clip", "patchbank")]
        first, second, own, limit = (f"{rate:#.3g}" for rate in (*rates, found["limit_images_per_second"]))
        rows.append(f"| {name.replace(' ', ', ')} | {first} | {second} | **{own}** | {limit} |")
    return "\n".join(rows)


def test_a_page_without_records_says_how_to_make_one() -> None:
    page = performance.page({})
    assert page.count("No record of this yet") > 10 and "](../images/" not in page
    assert "`python -m benchmarks encoder --full` makes one" in page and "python -m benchmarks --device cuda" in page


def test_records_name_no_paths() -> None:
    for path in records.RESULTS.glob("*.json"):
        assert not re.findall(r"\"[^\"]*(?:/home|/root|/tmp|/usr|/work)\b[^\"]*\"", path.read_text())


def test_paths_and_urls_are_replaced_whole(tmp_path: Path) -> None:
    for text, public in {
        "/home/alice": "PATH",
        "~/secret/x and ~alice": "PATH and PATH",
        "--directory=/data/a@b/c --weights ~bob/w.pt": "--directory=PATH --weights PATH",
        "[Errno 2] No such file: '/home/a b/c d'": "[Errno 2] No such file: 'PATH'",
        "FileNotFoundError: /srv/x.json: gone, and (/tmp/y).": "FileNotFoundError: PATH: gone, and (PATH).",
        "s3://alice/bank, file:///home/alice": "PATH, PATH",
        "/é/ü:/usr/lib": "PATH",
    }.items():
        assert records._public({text: [text]}) == {public: [public]}
    names = "ViT-B/16,ViT-L/14@336px: images/s, timm/vit_small.dino, a / b, ~5 ms, 1/2 MB/s, 'GFLOP/s', ../x"
    assert records._public(names) == names
    for path in records.RESULTS.glob("*.json"):
        assert records._public(records.load(path)) == records.load(path)
    records.save({"/home/alice": 1} | next(iter(RECORDS.values())), tmp_path / "r.json")
    assert "alice" not in (tmp_path / "r.json").read_text()


STUCK = """
import signal, subprocess, sys
program = "import time; print(end='begun', flush=True); time.sleep(20); print('survived')"  # in one write
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1], "w") as fifo:
    child = subprocess.Popen([sys.executable, "-c", program], stdout=fifo)
child.wait()
"""
RUNNER = """
import sys
from pathlib import Path
from benchmarks import __main__ as runner
runner._DIRECTORY = Path(sys.argv[1])
runner._LIMIT = float(sys.argv[3])
print(runner._run("stuck", sys.argv[2])["failed"])
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, None])
def test_nothing_of_a_benchmark_survives_its_end(tmp_path: Path, end: signal.Signals | None) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/stuck.py").write_text(STUCK)
    os.mkfifo(fifo := tmp_path / "fifo")
    limit, said = 1000 if end else 2, b""
    while b"begun" not in said:  # a limit that ends it before is doubled
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        command = [sys.executable, "-c", RUNNER, tmp_path / "benchmarks", fifo, str(limit)]
        runs = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True)
        with runs, open(reader, "rb") as read:
            if end:
                select.select([read], [], [])
                runs.send_signal(end)
            printed, _ = runs.communicate()
            said = read.read()  # to its end: until nobody is there to write
        limit *= 2
    assert said == b"begun"
    if end:
        assert runs.returncode in (-end, 128 + end)
    else:
        assert printed == "it took longer than an hour\n"


def test_it_runs_as_a_program_and_writes_both_files(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)

    listing = run("--help").stdout.partition("benchmarks:\n")[2].splitlines()
    assert [line.split()[0] for line in listing] == list(runner.BENCHMARKS)
    assert all(len(line.split()) > 4 for line in listing)
    wrong = run("nonsense")
    assert wrong.returncode == 2 and "no such benchmark: nonsense" in wrong.stderr

    out = tmp_path / "record.json"
    out.write_text(json.dumps({"machine": {"processor": "another"}, "benchmarks": {}}))
    assert "a record of another machine" in run("pooling", "--out", out).stderr
    out.unlink()
    done = run("pooling", "--out", out)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"pooling +[\d.]+ s\n{out}\n{out.with_suffix('.md')}\n", done.stdout)
    record = records.load(out)
    found = record["benchmarks"]["pooling"]
    assert record["machine"]["cores"] and record["machine"]["gpu"] is None
    assert found["arguments"] == runner.BENCHMARKS["pooling"].quick and found["seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and found["result"]["versions"]["torch"]
    (one, other) = found["result"]["tables"][0]["rows"]
    text = out.with_suffix(".md").read_text()
    assert f"| {one[0]}" in text and f"| {other[0]}" in text and found["arguments"] in text
    assert text == records.page(record)


def test_what_fails_or_misses_a_package_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("import nowhere_at_all")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    sizes = {"families": runner.Sizes("", ""), "pooling": runner.Sizes("--rounds x", "--rounds 1")}
    monkeypatch.setattr(runner, "BENCHMARKS", sizes)
    out = tmp_path / "record.json"
    assert runner.main(["--out", str(out)]) == 1
    found = records.load(out)["benchmarks"]
    assert found["families"]["skipped"] == "ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert "argument --rounds" in found["pooling"]["failed"]
    # The file is completed: one benchmark again, the other stays.
    assert runner.main(["pooling", "--full", "--out", str(out)]) == 0
    again = records.load(out)["benchmarks"]
    assert "result" in again["pooling"] and again["families"] == found["families"]
