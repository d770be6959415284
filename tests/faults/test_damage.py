"""What a failing disk or a careless hand did to a bank's files, and clocks that jump."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from patchbank import extract, load_dataset, open_bank
from patchbank.bank.check import verify
from tests.faults.conftest import BROKEN, Extraction, Short, committed
from tests.faults.processes import run
from tests.faults.soundness import sound_keys
from tests.support import abandoned_scratch, contents, no_leftovers


def flipped(path: Path, position: int) -> None:
    """Flip a bit of the byte at a position."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flipped(path, 0),
    "header": lambda path: flipped(path, 300),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "last byte gone": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_part(short: Short, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """A shard, or a file of the index, whose header or length is not what its name says goes into quarantine; its
    samples are done again, to the same bytes."""
    bank = tmp_path / "bank"
    extract(load_dataset("folder", short.images), bank, short.config)
    shards = short.config.layout == "shards"
    [damaged, *_] = sorted(bank.glob("shard-*")) if shards else (bank / "index").iterdir()
    damage(damaged)
    spoilt = damaged.read_bytes()
    kinds = {finding.kind for finding in verify(bank).problems} - {"failed"}
    assert kinds == {"damaged-part"}
    summary = extract(load_dataset("folder", short.images), bank, short.config)
    assert summary.images == (3 if shards else 6)
    aside = damaged.with_name(damaged.name + ".damaged")
    assert aside.read_bytes() == spoilt
    assert aside.name in " ".join(summary.notes)
    aside.unlink()
    assert contents(bank) == short.expected


def test_damaged_numbers(extraction: Extraction, tmp_path: Path) -> None:
    """A bit of a feature's numbers: a resumed run reads headers, names and sizes alone and does not see it. `verify`
    does, and `repair --extract` makes that feature again, with the same bytes."""
    bank, output = tmp_path / "bank", tmp_path / "printed"
    run(output, *extraction.to(bank), check=1)
    features = {key: (open_bank(bank).sha256(key), open_bank(bank)[key]) for key in open_bank(bank)}
    damaged = sorted(committed(bank))[1]
    flipped(damaged, damaged.stat().st_size - 600)
    spoilt = contents(bank)
    assert "100 already there" in run(output, *extraction.to(bank), check=1)
    assert contents(bank) == spoilt
    run(output, "verify", bank, "--images", extraction.images, check=1)
    [finding] = [each for each in verify(bank).problems if each.kind != "failed"]
    assert finding.kind == "checksum"
    weights = extraction.arguments[extraction.arguments.index("--weights") + 1]
    # 1: the two images that can never be read.
    run(output, "repair", bank, "--images", extraction.images, "--extract", "--weights", weights, check=1)
    assert [each for each in verify(bank).problems if each.kind != "failed"] == []
    repaired = open_bank(bank)
    assert repaired.failures.keys() == BROKEN
    assert features.keys() == set(repaired)
    for key, (sha256, tokens) in features.items():
        assert repaired.sha256(key) == sha256
        assert (repaired[key] == tokens).all()
    for path in bank.rglob("*.damaged"):
        path.unlink()
    changed = {name for name, sha256 in contents(bank).items() if extraction.expected.get(name) != sha256}
    assert len(changed) == 1, "more than the index, or that shard, changed"
    assert changed.pop().startswith("shard-00001" if extraction.layout == "shards" else "index/")


class AfterTwoBatches(Event):
    """Set when a run asks for the third time."""

    asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked > 1


@pytest.mark.parametrize("year", [1970, 2100])
def test_clocks_that_jump(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    """A clock that runs backwards, and files of 1970 or of 2100, an abandoned scratch directory among them: no
    decision is made by a time of day, and none is written."""
    bank, dataset = tmp_path / "bank", load_dataset("folder", short.images)
    backwards = itertools.count(4e9, -1e6)
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(backwards) * 1e9))
    assert extract(dataset, bank, short.config, stop=AfterTwoBatches()).remaining
    kept = sound_keys(bank, short.expected, {"photo_0003a.jpg"})
    (abandoned_scratch(bank) / "0.part").write_bytes(b"half of it")
    moment = (year - 1970) * 365.25 * 86400
    for path in (*bank.rglob("*"), *short.images.iterdir(), bank):
        os.utime(path, (moment, moment))
    summary = extract(dataset, bank, short.config)
    assert summary.already_done == len(kept) > 0
    assert no_leftovers(bank)
    assert contents(bank) == short.expected
    assert extract(dataset, bank, short.config).images == 0
