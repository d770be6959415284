"""Runs that are killed, stopped, or not alone: processes and signals are real, instants are random."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from random import Random

import pytest

from patchbank import open_bank
from patchbank.bank import removal
from patchbank.bank.parts import find_payload
from tests.bank.test_check import damage_numbers
from tests.faults.conftest import BROKEN, Extraction, committed, in_shards
from tests.faults.processes import Calls, Run, run
from tests.faults.soundness import sound_keys
from tests.support import contents, no_leftovers

KILLS = 30


def test_killed_three_times(extraction: Extraction, tmp_path: Path) -> None:
    """SIGKILL while it writes: nothing partial has a final name, nothing committed is lost, and the end is the same."""
    bank, output, kept = tmp_path / "bank", tmp_path / "printed", set[str]()
    for batches in (1, 8, 9):
        process = Run(output, *extraction.to(bank), pause_after=batches).paused()
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        found = sound_keys(bank, extraction.expected, BROKEN)
        assert kept <= found, "what was committed is gone"
        kept = found
    assert kept
    run(output, *extraction.to(bank), check=1)
    assert contents(bank) == extraction.expected


def scratch_of(bank: Path) -> set[Path]:
    """The scratch directories in a bank; each run that writes has one."""
    return set(bank.glob(".patchbank-tmp-*"))


def started(bank: Path, output: Path, *arguments: object) -> Run:
    """A run that has just begun to write, or has ended."""
    before = scratch_of(bank)
    run = Run(output, *arguments)
    while run.alive and not scratch_of(bank) - before:
        time.sleep(0.001)
    return run


def seconds_of(extraction: Extraction, bank: Path, output: Path) -> float:
    """How long an uninterrupted run writes for, about."""
    run = started(bank, output, *extraction.to(bank))
    began = time.monotonic()
    assert run.wait() == 1, run.printed
    return time.monotonic() - began


@pytest.mark.full
@pytest.mark.timeout(900)
def test_killed_at_thirty_random_instants(extraction: Extraction, tmp_path: Path) -> None:
    """Likewise at any instant. Some banks are killed once and completed, others fourteen times."""
    random, killed, output = Random(0), 0, tmp_path / "printed"
    seconds = seconds_of(extraction, tmp_path / "bank", output)
    for number, times in enumerate(cycle((1, 14, 1))):
        bank, kept = tmp_path / f"bank{number}", set[str]()
        for _ in range(times):
            process = started(bank, output, *extraction.to(bank))
            left = 1.1 - len(kept) / extraction.count  # a tenth more: its end is tidying up
            time.sleep(random.uniform(0, left * seconds))
            process.send(signal.SIGKILL)
            code = process.wait()
            assert code in (-signal.SIGKILL, 1), process.printed  # 1: it was faster, and two images failed
            found = sound_keys(bank, extraction.expected, BROKEN)
            assert kept <= found, "what was committed is gone"
            kept = found
            if code == 1:
                seconds *= 0.8  # the machine has less to do than when it was measured
                break
            killed += 1
        run(output, *extraction.to(bank), check=1)
        assert contents(bank) == extraction.expected
        if killed >= KILLS:
            return


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "extraction"),
    [
        *(("convert", "ezhoi"), ("convert", "shards"), ("convert --pca", "shards"), ("import", "ezhoi")),
        *(("repair", "ezhoi"), ("repair", "shards")),
    ],
    indirect=["extraction"],
)
def test_other_commands_killed_at_random_instants(command: str, extraction: Extraction, tmp_path: Path) -> None:
    """Likewise what converts, imports and repairs."""
    random, killed, output, source = Random(0), 0, tmp_path / "printed", tmp_path / "source"
    run(output, *extraction.to(source), check=1)
    weights = extraction.arguments[extraction.arguments.index("--weights") + 1]
    options = {
        "convert": ("--layout", "shards" if extraction.layout == "ezhoi" else "ezhoi", "--shard-size", "20kB"),
        "convert --pca": ("--pca", 8, "--shard-size", "5kB"),
        "import": ("--model", "tiny", "--weights", weights),
        "repair": (),
    }
    if command == "import":
        shutil.rmtree(source / "index")
    if command == "repair":
        for path in committed(source)[::3]:
            damage_numbers(path)

    def begun(bank: Path) -> Run:
        if command != "repair":
            return started(bank, output, command.split()[0], source, bank, *options[command])
        if not bank.exists():
            shutil.copytree(source, bank)
        return started(bank, output, command, bank)

    def state(bank: Path) -> object:
        """A repair that goes on leaves a revoked part beside the new one, for the next run to merge."""
        if command != "repair":
            return contents(bank)
        return [*open_bank(bank)], open_bank(bank).failures, sorted(path.name for path in bank.rglob("*.damaged"))

    whole = begun(tmp_path / "whole")
    began = time.monotonic()
    code, seconds = whole.wait(), time.monotonic() - began
    expected = state(tmp_path / "whole")
    for number in range(KILLS):
        bank = tmp_path / f"bank{number}"
        kept = set(open_bank(tmp_path / "whole")) if command == "repair" else set[str]()
        for _ in range(3):
            process = begun(bank)
            time.sleep(random.uniform(0, seconds))
            process.send(signal.SIGKILL)
            if process.wait() == code:
                seconds *= 0.8
                break
            killed += 1
            found = set(open_bank(bank)) if find_payload(bank) else set[str]()
            assert kept <= found, "what was committed is gone"
            kept = kept if command == "repair" else found
            for key in kept:
                open_bank(bank).check(key)
        assert begun(bank).wait() == code
        assert state(bank) == expected
        if killed >= KILLS // 6:
            return
    raise AssertionError("no run was killed in time")


@pytest.mark.parametrize(
    "moment", [Calls(1), *(Calls(1, removal.__name__, name) for name in ("remove_runs", "remove_bank", "copy_runs"))]
)
def test_killed_while_it_replaces_a_bank(extraction: Extraction, tmp_path: Path, moment: Calls) -> None:
    """The old bank is whole until the new one is, which is then never lost; the same command completes it."""
    bank, output = tmp_path / "bank", tmp_path / "printed"
    run(output, *extraction.to(bank, "--resize", "squash", "--limit", 40), check=1)
    old, command = contents(bank), extraction.to(bank, "--overwrite")
    process = Run(output, *command, pause_after=moment).paused()
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = contents(bank)
    if moment.name in ("add", "remove_runs"):
        assert old.items() <= left.items()
    else:
        assert {*extraction.expected.values()} <= {*left.values()}
    run(output, *command, check=1)
    assert contents(bank) == extraction.expected


@in_shards
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped(extraction: Extraction, tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C or SIGTERM: what was begun is committed, the exit code says why it ended, and the next run goes on."""
    bank, output = tmp_path / "bank", tmp_path / "printed"
    process = Run(output, *extraction.to(bank), pause_after=6).paused()
    process.send(number)
    process.send(signal.SIGCONT)
    assert process.wait() == code, process.printed
    assert "what is committed is safe" in process.printed
    assert no_leftovers(bank)
    kept = sound_keys(bank, extraction.expected, BROKEN)
    assert len(kept) >= (18 if extraction.layout == "shards" else 8)
    assert f"{len(kept):,} already there" in run(output, *extraction.to(bank), check=1)
    assert contents(bank) == extraction.expected


def ended(processes: Sequence[Run]) -> list[int]:
    """The exit codes of runs, once all have ended."""
    return [process.wait() for process in processes]


@pytest.mark.parametrize("again", [0, *(pytest.param(again, marks=pytest.mark.full) for again in (1, 2))])
def test_two_runs_of_the_same_images_at_once(extraction: Extraction, tmp_path: Path, again: int) -> None:
    """Both end as one alone would, and the bank has the bytes of one run; again, to meet at other points."""
    bank = tmp_path / "bank"
    both = [Run(tmp_path / f"printed{each}", *extraction.to(bank)) for each in range(2)]
    assert ended(both) == [1, 1], [each.printed for each in both]
    assert contents(bank) == extraction.expected


@in_shards
def test_four_partitions_at_once(extraction: Extraction, tmp_path: Path) -> None:
    """Four processes share the work; the bank has the bytes of one run when the last has ended."""
    bank = tmp_path / "bank"
    parts = [Run(tmp_path / f"{part}", *extraction.to(bank, "--partition", f"{part}/4")) for part in range(4)]
    codes = ended(parts)
    assert set(codes) <= {0, 1}, [part.printed for part in parts]  # 1: its part has an image that cannot be read
    assert contents(bank) == extraction.expected


@in_shards
def test_four_partitions_that_are_killed(extraction: Extraction, tmp_path: Path) -> None:
    """Each is killed once, two of them in the middle of something, and begun again: nothing is lost."""
    random = Random(1)
    bank = tmp_path / "bank"
    commands = [extraction.to(bank, "--partition", f"{part}/4") for part in range(4)]
    parts = [Run(tmp_path / f"{part}", *command, pause_after=4) for part, command in enumerate(commands)]
    for part in parts:
        part.paused()
    for going_on, part in zip((True, False, True, False), random.sample(parts, 4), strict=True):
        if going_on:
            part.send(signal.SIGCONT)
            time.sleep(random.uniform(0, 0.1))
        part.send(signal.SIGKILL)
    codes = ended(parts)
    assert codes.count(-signal.SIGKILL) >= 2, [part.printed for part in parts]  # the others may have been faster
    kept = sound_keys(bank, extraction.expected, BROKEN)
    assert kept
    parts = [Run(tmp_path / f"{part}", *command) for part, command in enumerate(commands)]
    assert set(ended(parts)) <= {0, 1}, [part.printed for part in parts]
    assert kept <= set(open_bank(bank))
    assert contents(bank) == extraction.expected
