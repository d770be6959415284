"""`repair` fixes banks in place: what is damaged goes into quarantine, and repair can always run again."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.bank.repair import repair
from patchbank.errors import BankError
from patchbank.files import quarantine
from tests.bank.test_check import damage_numbers, kinds
from tests.support import contents, no_leftovers, parts_in, patchbank, photographs
from tests.third_party import DEFECTS, unreadable

LAYOUTS = ["ezhoi", "shards"]


def extracted(root: Path, config: ExtractConfig, count: int, layout: str = "ezhoi") -> Path:
    """A bank of photographs; three images a shard."""
    photographs(root / "images", count)
    config = replace(config, layout=layout, shard_size=3 * 2176)  # type: ignore[arg-type]
    extract(load_dataset("folder", root / "images"), root / "bank", config)
    return root / "bank"


def again(bank: Path, config: ExtractConfig, layout: str) -> int:
    """Complete the bank; returns how many images were extracted."""
    config = replace(config, layout=layout, shard_size=3 * 2176)  # type: ignore[arg-type]
    return extract(load_dataset("folder", bank.parent / "images"), bank, config).images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_features_are_revoked_and_extracted_again(
    tiny_config: ExtractConfig, tmp_path: Path, layout: str
) -> None:
    bank = extracted(tmp_path, tiny_config, 7, layout)
    whole = {key: tokens.clone() for key, tokens in open_bank(bank).items()}
    damage_numbers(open_bank(bank).file("photo_0006.jpg"))
    [damaged] = kinds(verify(bank))
    done = repair(bank)
    assert [finding.name for finding in done.to_extract] == [damaged]
    opened = open_bank(bank)
    assert damaged not in opened
    assert "to be extracted again" in opened.failures[damaged]
    assert kinds(verify(bank)) == {damaged: "failed"}
    assert no_leftovers(bank)
    once_more = contents(bank)
    assert [finding.name for finding in repair(bank).to_extract] == [damaged]
    assert contents(bank) == once_more
    assert again(bank, tiny_config, layout) == 1
    assert kinds(verify(bank)) == {}
    assert all(torch.equal(open_bank(bank)[key], tokens) for key, tokens in whole.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_part_goes_into_quarantine(tiny_config: ExtractConfig, tmp_path: Path, layout: str) -> None:
    bank = extracted(tmp_path, tiny_config, 7, layout)
    whole = contents(bank)
    path = parts_in(bank)[-1]
    path.write_bytes(path.read_bytes()[:-1])
    done = repair(bank)
    assert done.quarantined == [f"{path.name}.damaged"]
    assert not path.exists()
    assert again(bank, tiny_config, layout) == (1 if layout == "shards" else 7)
    path.with_name(done.quarantined[0]).unlink()
    assert contents(bank) == whole


def test_features_whose_files_are_gone_are_no_longer_listed(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    bank = extracted(tmp_path, tiny_config, 2)
    (bank / "photo_0001_clip.pkl").unlink()
    repair(bank)
    assert list(open_bank(bank)) == ["photo_0000.jpg"]


def test_a_tensor_that_was_saved_again_is_restored_where_the_checksum_proves_it(
    tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    bank = extracted(tmp_path, tiny_config, 3)
    before = contents(bank)
    opened = open_bank(bank)
    with_cls = torch.cat([torch.ones(1, 32), opened["photo_0000.jpg"]])
    opened.file("photo_0000.jpg").write_bytes(pickle.dumps(with_cls))
    opened.file("photo_0001.jpg").write_bytes(pickle.dumps(with_cls[1:]))  # other tokens than before
    opened.file("photo_0002.jpg").write_bytes(DEFECTS["cuda"](torch.cat([torch.ones(1, 32), opened["photo_0002.jpg"]])))
    done = repair(bank)
    assert {finding.name for finding in done.fixed} == {"photo_0000.jpg", "photo_0002.jpg"}
    assert [finding.name for finding in done.to_extract] == ["photo_0001.jpg"]
    assert done.quarantined == ["photo_0001_clip.pkl.damaged"]
    after = contents(bank)
    assert after["photo_0000_clip.pkl"] == before["photo_0000_clip.pkl"]
    assert after["photo_0002_clip.pkl"] == before["photo_0002_clip.pkl"]


def test_an_error_that_may_pass_takes_nothing(
    tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = extracted(tmp_path, tiny_config, 2)
    before = contents(bank)
    unreadable(monkeypatch, "*.pkl")
    done = repair(bank)
    monkeypatch.undo()
    assert len(done.unread) == 2
    assert contents(bank) == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", ["rename", "fsync", "unlink"])
def test_an_interrupted_repair_can_be_repeated(
    tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, call: str
) -> None:
    """Whichever call fails, no sound feature is lost, and the result is the same."""
    bank = extracted(tmp_path, tiny_config, 7, layout)
    for key in ("photo_0000.jpg", "photo_0006.jpg"):
        damage_numbers(open_bank(bank).file(key))
    wrong = set(kinds(verify(bank)))
    sound = set(open_bank(bank)) - wrong
    original = getattr(os, call)
    for at in range(60):
        copy = shutil.copytree(bank, tmp_path / f"{call}{at}")
        count = 0

        def dying(*arguments: object, at: int = at, **options: object) -> object:
            nonlocal count
            count += 1
            if count == at + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(os, call, dying)
        try:
            repair(copy)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(os, call, original)
        assert sound <= set(open_bank(copy))
        repair(copy)
        assert set(open_bank(copy)) == sound
        assert kinds(verify(copy)) == dict.fromkeys(wrong, "failed")
        assert layout == "shards" or len([*copy.glob("*_clip.pkl")]) == len(sound)
        shutil.rmtree(copy)
    assert at > 0


def test_what_no_list_names_is_not_to_be_extracted(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    """A feature, a failure and a damaged feature of images that are no longer listed: `verify` and `repair` agree."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.jpg").write_bytes(b"")
    bank = extracted(tmp_path, tiny_config, 3)
    listed = ["photo_0000.jpg"]
    damage_numbers(bank / "photo_0002_clip.pkl")
    assert [finding.name for finding in verify(bank, listed).problems] == ["photo_0002.jpg"]
    done = repair(bank, listed)
    assert done.quarantined == ["photo_0002_clip.pkl.damaged"]
    assert done.to_extract == []
    assert verify(bank, listed).problems == []
    assert list(open_bank(bank)) == ["photo_0000.jpg", "photo_0001.jpg"]


def test_readers_learn_of_a_lost_feature_before_its_file_is_renamed(
    tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = extracted(tmp_path, tiny_config, 2)
    damage_numbers(bank / "photo_0001_clip.pkl")
    listed: list[list[str]] = []

    def renamed(path: Path) -> Path:
        listed.append([*open_bank(bank)])
        return quarantine(path)

    monkeypatch.setattr("patchbank.bank.repair.quarantine", renamed)
    repair(bank)
    assert listed == [["photo_0000.jpg"]]


def test_third_party_pickles_are_not_repaired(tmp_path: Path) -> None:
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(torch.randn(16, 32)))
    before = contents(tmp_path)
    with pytest.raises(BankError, match=r"not a bank of patchbank.*patchbank import"):
        repair(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("ezhoi", "a bank in ezhoi of which no part is sound"),
        ("shards", "a bank in shards of which no part is sound"),
    ],
)
def test_a_bank_of_which_no_part_is_sound(tmp_path: Path, tiny_weights: Path, layout: str, words: str) -> None:
    """Nothing is renamed before it is known that nothing can be repaired; the command that made the bank repairs it."""
    photographs(tmp_path / "images", 3)
    options = ("--model", "tiny", "--weights", tiny_weights, "--layout", layout)
    make = ("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *options)
    patchbank(*make, check=0)
    [part] = parts_in(tmp_path / "bank")
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    done = patchbank("verify", tmp_path / "bank", check=1)
    assert words in done.stdout and "ValueError" not in done.stdout
    assert "The command that made it makes it again" in " ".join(done.stdout.split())
    asked = ("--images", tmp_path / "images", "--weights", tiny_weights)
    assert "No part of" in patchbank("repair", tmp_path / "bank", "--extract", *asked, check=2).stderr
    assert part.read_bytes() == whole[:-100]
    patchbank(*make, check=0)
    assert part.read_bytes() == whole
