"""`patchbank bench`, as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from patchbank import ExtractConfig, load_dataset
from patchbank.bench import stages
from patchbank.bench.measure import Report, run
from patchbank.bench.stages import Measure
from patchbank.extraction.run import execute
from tests.support import command, patchbank, photographs


def test_every_stage_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    photographs(tmp_path / "images", 9)
    (tmp_path / "out").mkdir()
    done = patchbank(
        *("bench", "--model", "tiny", "--images", tmp_path / "images", "--limit", "8", "--out", tmp_path / "out"),
        "--json",
        check=0,
    )
    report = json.loads(done.stdout)
    assert [each["stage"] for each in report["measures"] if "float" not in each["what"]].count("decode") >= 2
    assert {each["stage"] for each in report["measures"]} == {"decode", "encode", "write", "read", "end to end"}
    assert all(each["rate"] > 0 for each in report["measures"])
    assert all(each["of_the_limit"] > 0 for each in report["measures"] if each["stage"] == "encode")
    assert report["limit"]["fp32"]["peak_flops_per_second"] > 0
    assert report["bound"] in ("decode", "encode", "write")
    assert int(report["options"]["--batch-size"]) >= 1 and int(report["options"]["--workers"]) >= 1
    assert not list((tmp_path / "out").iterdir())


def test_what_takes_long_is_measured_once(
    tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time left: one size of batches, and end to end one batch of it."""
    photographs(tmp_path / "images", 9)
    monkeypatch.setattr(stages, "SECONDS", 1e-9)
    dataset, encoded = load_dataset("folder", tmp_path / "images"), list[int]()
    monkeypatch.setattr(stages, "execute", lambda plan, runner: encoded.append(len(plan.todo)) or execute(plan, runner))
    report = run(dataset, replace(tiny_config, device="cpu", batch_size=None), tmp_path, lambda _: None)
    assert {each.what.partition(", ")[2] for each in report.measures if each.stage == "encode"} == {"batches of 1"}
    assert encoded == [1]
    assert report.measures[-1].rate > 0
    rounds = iter(range(9))
    assert stages._median(lambda: next(rounds))[1] == 0


def test_the_table_and_the_options_below_it(tmp_path: Path) -> None:
    done = patchbank("bench", "--model", "tiny", "--limit", "4", "--batch-size", "2", "--out", tmp_path, check=0)
    for words in ("fp32, batches of 2", "exact, 1 thread", "shards, float16, at random", "-bound. For fp32:"):
        assert words in done.stdout
    assert "--batch-size 2 --workers" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        command("bench", "--model", "tiny", "--limit", "2000", "--out", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        # With something in it: Python itself leaves a directory whose making is interrupted.
        while not list(tmp_path.glob("*patchbank-bench-*/*")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert not list(tmp_path.glob("*patchbank-bench-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "nowhere"], "There is no directory nowhere"),
        (["--images", "nowhere"], "nowhere"),
        (["--model", "ViT-B/17"], "no model 'ViT-B/17'"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 needs CUDA"),
        (["--dtype", "int8"], "int8 is for --layout shards"),
        (["--model", "tiny", "--batch-size", "1000000000", "--device", "cpu"], "--batch-size 1,000,000,000 needs"),
    ],
)
def test_a_wrong_setup_is_one_message(arguments: list[str], words: str) -> None:
    done = patchbank("bench", *arguments, check=2)
    assert words in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(("rate", "steady"), [(99.0, True), (100.4, True), (101.0, False)])
def test_more_than_the_limit_is_not_steady(rate: float, steady: bool) -> None:
    """As it is printed: no 101 % goes without a note."""
    measures = [Measure("encode", "fp32", rate, 100.0), Measure("read", "", 1000.0)]
    assert Report("", "tiny", {}, measures, None, {}).steady == steady


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.jpg").write_bytes(b"no picture")
    done = patchbank("bench", "--model", "tiny", "--images", tmp_path / "images", check=2)
    assert "None of the images" in done.stderr
