"""`repair` mends what it can without pixels, keeps the old until the new is durable, and can always be run again."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchbank import ExtractConfig, ImageTransform, extract, load_dataset, open_bank
from patchbank.bank.repair import Repaired, confirm, repair
from patchbank.bank.verify import verify
from patchbank.errors import BankError
from tests.bank.test_verify import KEYS, damage_numbers, kinds, tokens_of
from tests.strangers import DEFECTS, MENDED_WITHOUT_PIXELS, write_bank
from tests.support import contents, no_leftovers, photographs, shards_in, tiny_manifest

TOKENS = tokens_of(KEYS)
DEFECT_OF = dict(zip(KEYS, DEFECTS, strict=False))
TO_EXTRACT = [key for key, kind in DEFECT_OF.items() if kind not in MENDED_WITHOUT_PIXELS]


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_bank(tmp_path / "bank", {key: TOKENS[key] for key in KEYS[:-1]}, DEFECT_OF)
    return tmp_path / "bank"


def expected(key: str) -> torch.Tensor:
    tokens = TOKENS[key][1:]
    return tokens.half().float() if DEFECT_OF.get(key) == "dtype" else tokens


def check_mended(directory: Path, done: Repaired) -> None:
    assert {finding.name for finding in done.to_extract} == {*TO_EXTRACT, KEYS[-1]}
    assert sorted(done.set_aside) == sorted(f"{key.split('.')[0]}_clip.pkl.damaged" for key in TO_EXTRACT)
    opened = open_bank(directory)
    assert list(opened) == [key for key in KEYS[:-1] if key not in TO_EXTRACT]
    assert set(opened.failures) == set(TO_EXTRACT)
    for key in opened:
        with open(opened.file(key), "rb") as file:  # as EZ-HOI reads it
            tokens = pickle.load(file)
        assert torch.equal(tokens, expected(key))
        assert tokens.dtype == torch.float32
        assert tokens.is_contiguous()
        assert not tokens.requires_grad
        assert tokens.untyped_storage().nbytes() == tokens.nbytes
        assert torch.equal(opened[key], tokens)
    assert no_leftovers(directory)
    assert not Path("patchbank-was-run").exists()


def test_strangers_pickles_become_a_bank(strangers: Path) -> None:
    sound = {path.name: path.read_bytes() for path in strangers.iterdir() if path.name[6:8] in ("11", "12", "13")}
    done = repair(strangers, KEYS, dataset="hicodet", split="test", size_of=lambda _: (640, 480))
    assert done.adopted
    assert {finding.kind for finding in done.mended} == set(MENDED_WITHOUT_PIXELS)
    check_mended(strangers, done)
    opened = open_bank(strangers)
    assert opened.manifest.title == "hicodet test"
    assert opened.fingerprint.model == "tiny"
    assert opened.fingerprint.weights_sha256 == "unknown"
    assert opened.transform(KEYS[-2]) == ImageTransform(640, 480, "center-crop", 32, 8)
    for name, content in sound.items():
        assert (strangers / name).read_bytes() == content  # nothing was wrong with them
    assert set(kinds(verify(strangers, KEYS)).values()) == {"failed", "missing"}
    # Once more finds nothing to mend.
    before = contents(strangers)
    again = repair(strangers, KEYS)
    assert not (again.mended or again.set_aside or again.adopted)
    assert {finding.name for finding in again.to_extract} == {*TO_EXTRACT, KEYS[-1]}
    assert contents(strangers) == before


def test_pickles_that_were_only_saved_badly_are_sound_after_it(tmp_path: Path) -> None:
    keys = KEYS[: len(MENDED_WITHOUT_PIXELS) + 1]
    defects = dict(zip(keys, MENDED_WITHOUT_PIXELS, strict=False))
    write_bank(tmp_path, {key: TOKENS[key] for key in keys}, defects)
    assert set(kinds(verify(tmp_path, keys)).values()) == set(MENDED_WITHOUT_PIXELS)
    assert repair(tmp_path, keys).to_extract == []
    assert verify(tmp_path, keys).findings == []


def test_without_a_list_keys_are_file_names_and_a_list_mends_that(strangers: Path) -> None:
    repair(strangers)
    opened = open_bank(strangers)
    assert "photo_11" in opened
    with pytest.raises(BankError, match="size of 'photo_11' is not known"):
        opened.transform("photo_11")
    before = {key: opened.sha256(key) for key in opened}
    repair(strangers, KEYS, dataset="hicodet", split="test")
    named = open_bank(strangers)
    assert list(named) == [key for key in KEYS[:-1] if key not in TO_EXTRACT]
    assert {key.removesuffix(".jpg"): named.sha256(key) for key in named} == before  # and not what is there by now
    assert named.manifest.title == "hicodet test"
    assert kinds(verify(strangers, KEYS)) == {**dict.fromkeys(TO_EXTRACT, "failed"), KEYS[-1]: "missing"}


def test_another_list_takes_nothing_from_an_adopted_bank(strangers: Path) -> None:
    repair(strangers, KEYS, dataset="hicodet", split="test")
    before = contents(strangers)
    repair(strangers, ["COCO_1.jpg", "COCO_2.jpg"], dataset="vcoco", split="val")
    assert contents(strangers) == before


def test_damage_to_an_adopted_bank_is_not_made_official(strangers: Path) -> None:
    repair(strangers, KEYS)
    adopted = list(open_bank(strangers))
    for key in adopted:
        damage_numbers(open_bank(strangers).file(key))
    assert {kinds(verify(strangers, KEYS))[key] for key in adopted} == {"checksum"}
    repair(strangers, KEYS)
    assert len(open_bank(strangers)) == 0
    assert {*adopted} <= set(open_bank(strangers).failures)


def test_names_that_no_image_has_are_left_alone(tmp_path: Path) -> None:
    """EZ-HOI cuts names at their first dot: it could never find these, nor could patchbank."""
    names = ["a_clip.pkl", "a.b_clip.pkl", "_clip.pkl", "sub/_clip.pkl", ".._clip.pkl"]
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(pickle.dumps(torch.full((16, 32), float(number + 2))))
    before = contents(tmp_path)
    report = verify(tmp_path)
    assert kinds(report) == dict.fromkeys(names[1:], "extra")
    assert report.problems == []
    repair(tmp_path)
    opened = open_bank(tmp_path)
    assert list(opened) == ["a"]
    assert opened["a"][0, 0] == 2
    assert {name: contents(tmp_path)[name] for name in names} == before


def test_a_passing_error_changes_nothing(strangers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "photo_12_clip.pkl":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    before = contents(strangers)
    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(BankError, match=r"could not be read.*Nothing was changed"):
        repair(strangers, KEYS)
    monkeypatch.undo()
    assert contents(strangers) == before


def test_a_passing_error_takes_nothing_from_a_bank_of_ours(
    tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs(tmp_path / "images", 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    before = contents(tmp_path / "bank")
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.suffix == ".pkl":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    done = repair(tmp_path / "bank")
    monkeypatch.undo()
    assert len(done.unread) == 2
    assert contents(tmp_path / "bank") == before


def test_a_tensor_that_was_saved_otherwise_is_mended_where_the_checksum_proves_it(
    tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    photographs(tmp_path / "images", 3)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    before = contents(tmp_path / "bank")
    opened = open_bank(tmp_path / "bank")
    with_cls = torch.cat([torch.ones(1, 32), opened["photo_0000.jpg"]])
    opened.file("photo_0000.jpg").write_bytes(pickle.dumps(with_cls))
    opened.file("photo_0001.jpg").write_bytes(pickle.dumps(with_cls[1:]))  # other tokens than were there
    opened.file("photo_0002.jpg").write_bytes(DEFECTS["cuda"](torch.cat([torch.ones(1, 32), opened["photo_0002.jpg"]])))
    done = repair(tmp_path / "bank")
    assert {finding.name for finding in done.mended} == {"photo_0000.jpg", "photo_0002.jpg"}
    assert [finding.name for finding in done.to_extract] == ["photo_0001.jpg"]
    after = contents(tmp_path / "bank")
    assert after["photo_0000_clip.pkl"] == before["photo_0000_clip.pkl"]
    assert after["photo_0002_clip.pkl"] == before["photo_0002_clip.pkl"]


@pytest.mark.parametrize("call", ["rename", "fsync", "link"])
def test_an_interrupted_repair_is_begun_again(
    strangers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever call it dies in: no image's only file is ever lost, and the end is the same."""
    original = getattr(os, call)
    for at in range(60):
        copy = shutil.copytree(strangers, tmp_path / f"{call}{at}")
        count = 0

        def dying(*arguments: object, at: int = at) -> object:
            nonlocal count
            count += 1
            if count == at + 1:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(os, call, dying)
        try:
            repair(copy, KEYS)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(os, call, original)
        for key in KEYS[:-1]:
            stem = copy / f"{key.split('.')[0]}_clip.pkl"
            assert stem.exists() or stem.with_name(f"{stem.name}.damaged").exists()
        repair(copy, KEYS)
        assert {*open_bank(copy)} == {*KEYS[:-1]} - {*TO_EXTRACT}
        assert not [name for name, kind in kinds(verify(copy, KEYS)).items() if kind not in ("failed", "missing")]
        shutil.rmtree(copy)
    assert at > 0


def test_an_adoption_that_ended_before_its_manifest_leaves_no_second_names(strangers: Path) -> None:
    repair(strangers)
    (strangers / "bank.json").unlink()
    repair(strangers, KEYS)
    assert list(open_bank(strangers)) == [key for key in KEYS[:-1] if key not in TO_EXTRACT]


def test_pickles_of_no_known_model_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(torch.randn(511)))
    before = contents(tmp_path)
    with pytest.raises(BankError, match="of no known model"):
        repair(tmp_path)
    assert contents(tmp_path) == before


# --- banks of ours


def test_what_is_damaged_is_taken_back_and_made_again(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    for layout in ("ezhoi", "shards"):
        photographs(tmp_path / "images", 7)
        config = replace(tiny_config, layout=layout, shard_size=3 * 2176)  # type: ignore[arg-type]
        dataset = load_dataset("folder", tmp_path / "images")
        bank = tmp_path / layout
        extract(dataset, bank, config)
        whole = {key: tokens.clone() for key, tokens in open_bank(bank).items()}
        damage_numbers(open_bank(bank).file("photo_0006.jpg"))
        [damaged] = kinds(verify(bank))
        done = repair(bank)
        assert [finding.name for finding in done.to_extract] == [damaged]
        opened = open_bank(bank)
        assert damaged not in opened
        assert "to be extracted again" in opened.failures[damaged]
        assert kinds(verify(bank)) == {damaged: "failed"}
        assert extract(dataset, bank, config).images == 1
        assert kinds(verify(bank)) == {}
        assert all(torch.equal(open_bank(bank)[key], tokens) for key, tokens in whole.items())


def test_a_damaged_shard_is_set_aside(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 7)
    config = replace(tiny_config, layout="shards", shard_size=3 * 2176)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "bank", config)
    whole = contents(tmp_path / "bank")
    path = shards_in(tmp_path / "bank")[1]
    path.write_bytes(path.read_bytes()[:-1])
    done = repair(tmp_path / "bank")
    assert done.set_aside == [f"{path.name}.damaged"]
    assert len(open_bank(tmp_path / "bank")) == 4
    assert extract(dataset, tmp_path / "bank", config).images == 3
    (tmp_path / "bank" / done.set_aside[0]).unlink()
    assert contents(tmp_path / "bank") == whole


def test_features_whose_files_are_gone_are_no_longer_listed(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    (tmp_path / "bank/photo_0001_clip.pkl").unlink()
    repair(tmp_path / "bank")
    assert list(open_bank(tmp_path / "bank")) == ["photo_0000.jpg"]


def test_an_adopted_bank_that_is_confirmed_can_be_completed(strangers: Path) -> None:
    repair(strangers, KEYS)
    found = open_bank(strangers).manifest
    confirm(strangers, found, tiny_manifest(), "5 agree")
    manifest = open_bank(strangers).manifest
    assert manifest.fingerprint == tiny_manifest().fingerprint
    assert manifest.adopted == "pickles of unknown making, by their shapes; 5 agree"
