"""Several devices of one machine: two processes on the CPU stand for two GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from patchbank import extract, load_dataset, open_bank
from patchbank.config import ExtractConfig
from patchbank.encoders.device import resolve_devices
from patchbank.errors import ConfigError
from tests.datasets.packed import packed
from tests.faults.processes import Calls, Run, run
from tests.support import contents, no_leftovers, patchbank, photographs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many") / "images"
    photographs(directory, 40)
    (directory / "broken.jpg").write_bytes(b"no picture")
    return directory


@pytest.mark.parametrize("layout", ["shards", pytest.param("ezhoi", marks=pytest.mark.full)])
def test_two_processes_make_the_bank_of_one(
    layout: str, images: Path, tiny_config: ExtractConfig, tiny_weights: Path, tmp_path: Path
) -> None:
    config = replace(tiny_config, layout=layout, shard_size=7 * 2200)  # type: ignore[arg-type]
    alone = extract(load_dataset("folder", images), tmp_path / "alone", config)
    extract(load_dataset("folder", images), tmp_path / "both", replace(config, limit=9))  # and they go on
    both = extract(load_dataset("folder", images), tmp_path / "both", replace(config, device="cpu:0,1"))
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    assert no_leftovers(tmp_path / "both")
    assert both.failures == alone.failures == {"broken.jpg": "not an image that Pillow can identify"}
    assert (both.images, both.already_done, both.remaining) == (32, 8, 0)
    assert both.settled == both.listed == alone.settled == 41
    assert both.failed == alone.failed == 1
    assert both.bytes_written > 32 * 16 * 32 * 4


@pytest.mark.parametrize("kind", ["tar", pytest.param("parquet", marks=pytest.mark.full)])
def test_tars_and_tables_are_read_by_each_process(
    kind: str, images: Path, tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    dataset = packed(kind, images, tmp_path / "packed", files=3)
    config = replace(tiny_config, layout="shards", shard_size=4 * 2200)
    alone = extract(dataset, tmp_path / "alone", config)
    both = extract(dataset, tmp_path / "both", replace(config, device="cpu:0,1"))
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    assert (both.images, both.failures) == (alone.images, alone.failures) == (40, alone.failures)
    assert list(both.failures) == ["broken.jpg"]


def test_what_a_worker_cannot_do_is_one_message(images: Path, tiny_weights: Path, tmp_path: Path) -> None:
    run = ("extract", "folder", images, "--model", "tiny", "--weights", tiny_weights, "--out", tmp_path / "bank")
    done = patchbank(*run, "--device", "cpu:0,1", "--batch-size", "1000000000", check=2)
    assert "--batch-size 1,000,000,000 needs" in done.stderr


# The last step of the first process before it pauses.
MOMENTS = {
    "one begun": Calls(1, SpawnProcess, "start"),
    "both begun": Calls(2, SpawnProcess, "start"),
    "one ready": Calls(1, Connection, "recv"),
    "at work": Calls(3, Connection, "recv"),  # one of three messages from two workers is what became of a unit
}


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        ("first worker", "at work"),
        ("run", "at work"),
        pytest.param("second worker", "at work", marks=pytest.mark.full),
        *(
            pytest.param(each, "both begun", marks=pytest.mark.full)
            for each in ("first worker", "second worker", "run")
        ),
    ],
)
def test_killed_it_goes_on_from_there(
    victim: str, moment: str, images: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    """A worker's death ends the run, with a message, though others work on; the run's death ends its workers."""
    bank = tmp_path / "bank"
    command = ("extract", "folder", images, "--model", "tiny", "--weights", tiny_weights, "--out", bank)
    options = ("--layout", "ezhoi", "--batch-size", "4", "--device", "cpu:0,1")
    process = Run(tmp_path / "printed", *command, *options, pause_after=MOMENTS[moment]).paused()
    workers = _workers(process, 2)
    assert bool(list(bank.glob("*.pkl"))) == (moment == "at work")
    if victim == "run":
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        while any(map(_lives, workers)):
            time.sleep(0.01)
    else:
        os.kill({"first worker": min(workers), "second worker": max(workers)}[victim], signal.SIGKILL)
        process.send(signal.SIGCONT)
        assert process.wait() == 2 and "worker process" in process.printed
    run(tmp_path / "printed", *command, *options, check=1)
    assert no_leftovers(bank)
    run(tmp_path / "printed", *command, "--layout", "ezhoi", "--batch-size", "4", "--overwrite", check=1)
    assert len(open_bank(bank)) == 40


@pytest.mark.parametrize(
    "moment",
    ["both begun", *(pytest.param(each, marks=pytest.mark.full) for each in ("one begun", "one ready", "at work"))],
)
def test_a_stop_while_its_workers_start(moment: str, images: Path, tiny_weights: Path, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches all processes at once, also those that have just begun."""
    command = ("extract", "folder", images, "--model", "tiny", "--weights", tiny_weights, "--out", tmp_path / "bank")
    options = ("--layout", "ezhoi", "--batch-size", "4", "--device", "cpu:0,1")
    process = Run(tmp_path / "printed", *command, *options, pause_after=MOMENTS[moment], own_group=True).paused()
    workers = _workers(process, 1)
    process.interrupt_all()
    process.send(signal.SIGCONT)
    assert process.wait() == 130, process.printed
    assert "error:" not in process.printed
    assert not any(map(_lives, workers))
    assert no_leftovers(tmp_path / "bank")


@pytest.mark.parametrize(
    ("guard", "code", "words"),
    [
        ("", 1, "under `if __name__"),
        pytest.param("if __name__ == '__main__': ", 0, "40\n", marks=pytest.mark.full),
    ],
)
def test_a_script_without_a_guard_gets_a_message(
    guard: str, code: int, words: str, images: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    call = (
        "from patchbank import extract, load_dataset\n"
        "from patchbank.config import ExtractConfig\n"
        "from patchbank.encoders.openai.registry import MODELS\n"
        "from tests.support import TINY\n"
        "MODELS[TINY.name] = TINY\n"
        "{}print(extract(load_dataset('folder', {!r}), {!r}, ExtractConfig(model='tiny', weights={!r}, "
        "device='cpu:0,1')).images)\n"
    )
    given = str(images), str(tmp_path / "bank"), str(tiny_weights)
    script = tmp_path / "script.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script.write_text(call.format(guard, *given))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr


def _workers(run: Run, least: int) -> list[int]:
    """The processes that a run has started; waits for `least` of them to be programs of their own."""
    while len(found := _started(run)) < least:
        assert run.alive, run.printed
        time.sleep(0.005)
    return found


def _started(run: Run) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == run.process.pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_which_devices_a_name_means(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert [str(each) for each in resolve_devices("cpu:0,1,0", "fp32")] == ["cpu:0", "cpu:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name in ("auto", "cuda"):
        assert [str(each) for each in resolve_devices(name, "fp16")] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(each) for each in resolve_devices("cuda:2", "fp16")] == ["cuda:2"]
    assert [str(each) for each in resolve_devices("cuda:0,2", "fp16")] == ["cuda:0", "cuda:2"]
    with pytest.raises(ConfigError, match="sees 3 CUDA devices"):
        resolve_devices("cuda:0,3", "fp16")
    with pytest.raises(ConfigError, match="fp16 needs CUDA"):
        resolve_devices("cpu:0,1", "fp16")
