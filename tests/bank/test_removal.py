"""What a run may rename or delete in a bank's directory is the bank's own."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank import removal
from patchbank.bank.convert import convert
from patchbank.bank.payload import Payload
from patchbank.bank.repair import repair
from patchbank.bank.runs import Run, read_runs, write_run
from patchbank.bank.writer import BankWriter
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.extraction.plan import make_plan
from patchbank.files import NEXT, quarantine
from tests.bank.test_check import damage_numbers
from tests.support import SecondLook, contents, no_leftovers, parts_in, photographs


@pytest.fixture(params=["ezhoi", "shards"])
def config(tiny_config: ExtractConfig, request: pytest.FixtureRequest) -> ExtractConfig:
    return replace(tiny_config, layout=request.param)


@pytest.fixture
def bank(tmp_path: Path, config: ExtractConfig) -> Path:
    photographs(tmp_path / "images", 3)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    return tmp_path / "bank"


def test_starting_from_scratch_deletes_what_the_bank_lists(bank: Path, config: ExtractConfig) -> None:
    """And no other pickle, or file beside the log."""
    dataset, whole = load_dataset("folder", bank.parent / "images"), contents(bank)
    run = Run(
        began="2026-01-31T12:00:00Z", seconds=1, images=1, failures=0, remaining=0, bytes_written=1, device="cpu",
        engine="local", partition="0/1",
    )  # fmt: skip
    (bank / "runs").mkdir(exist_ok=True)
    own = {*(bank / "runs").iterdir()}
    write_run(bank, run)
    [logged] = {*(bank / "runs").iterdir()} - own
    mine = [bank / "mine_clip.pkl", bank / "runs/mine.json", bank / "runs/run-0123456789abcdef.json"]
    for path in mine:
        path.write_text(json.dumps(asdict(run)))
    extract(dataset, bank, replace(config, overwrite=True))
    assert all(path.exists() for path in mine)
    assert not logged.exists()
    mine[0].unlink()
    assert contents(bank) == whole


def test_the_old_bank_stays_until_the_new_one_is_complete(bank: Path, config: ExtractConfig) -> None:
    """A stopped run goes on with the same options, and begins again with others."""
    photographs(bank.parent / "images", 6)
    dataset, old, opened = load_dataset("folder", bank.parent / "images"), contents(bank), open_bank(bank)
    config = replace(config, overwrite=True, batch_size=2, shard_size=2 * 2176)
    other = replace(config, resize="squash")
    assert extract(dataset, bank, config, stop=SecondLook()).remaining == 4
    assert {path: sha256 for path, sha256 in contents(bank).items() if not path.startswith(".")} == old
    assert all(opened[key].equal(open_bank(bank)[key]) for key in opened)
    assert "the same command completes it" in make_plan(dataset, bank, replace(config, overwrite=False)).notes[0]
    assert extract(dataset, bank, other, stop=SecondLook()).remaining == 4
    assert extract(dataset, bank, other).already_done == 2
    assert len(read_runs(bank)) == 2
    extract(dataset, bank.parent / "fresh", replace(other, overwrite=False))
    assert contents(bank) == contents(bank.parent / "fresh")
    assert no_leftovers(bank)
    assert extract(dataset, bank, other).already_done == 0


def test_the_last_of_several_runs_replaces_the_bank(bank: Path, config: ExtractConfig) -> None:
    dataset, old = load_dataset("folder", bank.parent / "images"), contents(bank)
    config = replace(config, overwrite=True, resize="squash")
    plan = make_plan(dataset, bank, config)
    with BankWriter(bank, plan.manifest, {}, overwrite=True):
        assert extract(dataset, bank, config).images == 3
        assert old.items() < contents(bank).items()
    assert extract(dataset, bank, config).images == 0
    assert open_bank(bank).manifest == plan.manifest and no_leftovers(bank)


def test_no_feature_of_the_old_bank_is_lost(bank: Path, config: ExtractConfig) -> None:
    """An image that has become unreadable keeps its bank as it is, until it is readable again."""
    dataset, old, opened = load_dataset("folder", bank.parent / "images"), contents(bank), open_bank(bank)
    image = bank.parent / "images/photo_0001.jpg"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    overwriting = replace(config, overwrite=True)
    summary = extract(dataset, bank, overwriting)
    assert "'photo_0001.jpg' for one. The old bank was kept" in summary.failures[str(bank)]
    assert {path: content for path, content in contents(bank).items() if not path.startswith(NEXT)} == old
    assert all(opened[key].equal(open_bank(bank)[key]) for key in opened)
    image.write_bytes(whole)
    assert extract(dataset, bank, overwriting).failures == {}
    assert contents(bank) == old and no_leftovers(bank)
    extract(dataset[:1], bank, overwriting)  # the others are not asked for
    assert len(open_bank(bank)) == 1


def test_a_damaged_source_replaces_no_bank(bank: Path, config: ExtractConfig, tmp_path: Path) -> None:
    convert(open_bank(bank), tmp_path / "copy", config.layout or "ezhoi", shard_size=1 << 20)
    whole, copy = contents(tmp_path / "copy"), tmp_path / "copy"
    damage_numbers(open_bank(bank).file("photo_0002.jpg"))
    done = convert(open_bank(bank), copy, config.layout or "ezhoi", shard_size=1 << 20, overwrite=True)
    assert list(done.damaged) == ["photo_0002.jpg"] and "'photo_0002.jpg' for one" in done.kept
    assert {path: content for path, content in contents(copy).items() if not path.startswith(NEXT)} == whole


def test_runs_that_replace_a_bank_take_turns(
    bank: Path, config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one does, none can begin or end; and none deletes what a run with other options writes."""
    swap = removal._swap
    turns: list[bool] = []

    def looked(place: Path, new: Payload) -> None:
        directory = os.open(place, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        turns.append(True)
        os.close(directory)
        swap(place, new)

    monkeypatch.setattr(removal, "_swap", looked)
    dataset, old = load_dataset("folder", bank.parent / "images"), contents(bank)
    overwriting = replace(config, overwrite=True)
    extract(dataset, bank, overwriting)
    assert turns == [True] and contents(bank) == old
    plan = make_plan(dataset, bank, overwriting)
    with BankWriter(bank, plan.manifest, {sample.key: sample.position for sample in dataset}, overwrite=True) as live:
        live.add([], [Failure(dataset[0].key, "a reason")])
        live.commit()
        with pytest.raises(BankError, match="Another run with overwrite and other options"):
            extract(dataset, bank, replace(overwriting, dtype="float16"))
        assert live.replace(list(open_bank(bank))).startswith("another run writes the new bank")
    assert contents(bank).items() >= old.items()


def test_a_kill_in_a_swap_leaves_others_pickles_alone(
    bank: Path, config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bank / "mine_clip.pkl").write_bytes(b"mine")
    dataset, remove = load_dataset("folder", bank.parent / "images"), removal.remove_bank

    def killed(place: Path) -> None:
        remove(place)
        raise KeyboardInterrupt

    for layout in ("ezhoi", "shards"):
        overwriting = replace(config, layout=layout, overwrite=True)  # type: ignore[arg-type]
        monkeypatch.setattr(removal, "remove_bank", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(dataset, bank, overwriting)
        monkeypatch.setattr(removal, "remove_bank", remove)
        extract(dataset, bank, overwriting)
        assert (bank / "mine_clip.pkl").read_bytes() == b"mine" and len(open_bank(bank)) == 3


@pytest.mark.parametrize("content", [b"mine", b"{}", b'{"format": "another"}', b"\0" * 99 + b"x", b"\x80" * 9999])
def test_other_codes_files_of_our_names_are_refused(bank: Path, config: ExtractConfig, content: bytes) -> None:
    """Whatever would read, rename or delete them: reading, completing, repairing, starting from scratch, converting."""
    part = parts_in(bank)[0]
    part.with_name(part.name.replace(part.stem[-16:], "0123456789abcdef")).write_bytes(content)
    before, dataset = contents(bank), load_dataset("folder", bank.parent / "images")
    extract(dataset, bank.parent / "source", config)
    source, layout = open_bank(bank.parent / "source"), config.layout or "shards"
    for action in (
        lambda: open_bank(bank),
        lambda: extract(dataset, bank, config),
        lambda: repair(bank),
        lambda: extract(dataset, bank, replace(config, overwrite=True)),
        lambda: convert(source, bank, layout, shard_size=1, overwrite=True),
    ):
        with pytest.raises(BankError, match=r"0123456789abcdef.*If it is yours, move it"):
            action()
    assert contents(bank) == before


@pytest.mark.parametrize("kept", [0, 300, -1])
def test_what_a_crash_or_a_disk_leaves_of_our_files_is_ours(bank: Path, config: ExtractConfig, kept: int) -> None:
    whole, dataset = contents(bank), load_dataset("folder", bank.parent / "images")
    for fault in (
        lambda old: old[:kept],
        lambda old: bytes(len(old)),
        lambda old: old.replace(b"patchbank", b"patchbanc"),
    ):
        part = parts_in(bank)[0]
        part.write_bytes(fault(part.read_bytes()))
        extract(dataset, bank, config)
        part.with_name(f"{part.name}.damaged").unlink()
        assert contents(bank) == whole


def test_a_log_that_is_a_link_is_refused(bank: Path, config: ExtractConfig) -> None:
    elsewhere = (bank / "runs").rename(bank.parent / "elsewhere")
    (bank / "runs").symlink_to(elsewhere)
    before, dataset = contents(elsewhere), load_dataset("folder", bank.parent / "images")
    for overwrite in (False, True):
        with pytest.raises(BankError, match="runs is a link"):
            extract(dataset, bank, replace(config, overwrite=overwrite))
    with pytest.raises(BankError, match="runs is a link"):
        repair(bank)
    assert contents(elsewhere) == before


def test_an_index_that_is_a_link_is_refused(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    bank, elsewhere, dataset = tmp_path / "bank", tmp_path / "elsewhere", load_dataset("folder", tmp_path / "images")
    bank.mkdir()
    elsewhere.mkdir()
    (bank / "index").symlink_to(elsewhere)
    for overwrite in (False, True):
        with pytest.raises(BankError, match="index is a link"):
            extract(dataset, bank, replace(tiny_config, overwrite=overwrite))
    assert not [*elsewhere.iterdir()]
    extract(dataset, tmp_path / "whole", tiny_config)
    (tmp_path / "whole/index").rename(elsewhere / "index")
    (tmp_path / "whole/index").symlink_to(elsewhere / "index")
    with pytest.raises(BankError, match="index is a link"):
        repair(tmp_path / "whole")


def test_quarantine_replaces_no_file(bank: Path, tmp_path: Path) -> None:
    part = parts_in(bank)[0]
    mine = part.with_name(f"{part.name}.damaged")
    mine.write_text("a user's")
    if part.suffix == ".json":
        damage_numbers(pickle := open_bank(bank).file("photo_0000.jpg"))
        pickle.with_name(f"{pickle.name}.damaged").write_text("a user's")
        [renamed] = repair(bank).quarantined
        assert (bank / renamed).exists() and renamed != f"{pickle.name}.damaged"
        part = parts_in(bank)[0]
        mine = part.with_name(f"{part.name}.damaged")
        mine.write_text("a user's")
    part.write_bytes(part.read_bytes()[:-1])
    [renamed] = repair(bank).quarantined
    assert mine.read_text() == "a user's"
    assert part.with_name(renamed).exists() and renamed.endswith(".damaged")
    (tmp_path / "x").touch()
    (tmp_path / "x.damaged").symlink_to("nowhere")
    assert quarantine(tmp_path / "x") != tmp_path / "x.damaged"
