"""verify, repair, convert as processes: what people see, what machines read, and the exit codes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from patchbank import extract, load_dataset, load_encoder, open_bank
from patchbank.config import ExtractConfig, Partition
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.extraction.plan import make_plan
from patchbank.features import CLS, GRID
from tests.reference.original import Original
from tests.support import (
    REPOSITORY,
    TINY,
    TINY_VOCABULARY,
    contents,
    hico_root,
    patchbank,
    photographs,
    relative_error,
)
from tests.third_party import DEFECTS, write_bank

BANK = "hicodet_pkl_files/cliptiny_img_hicodet_test"


@pytest.fixture
def root(tmp_path: Path, tiny_weights: Path) -> Path:
    """An EZ-HOI root whose test bank has every defect; two are sound, one is missing."""
    hico_root(tmp_path / "root", len(DEFECTS) + 3, splits=["test"])
    dataset = load_dataset("hicodet", tmp_path / "root", "test")
    keys = [sample.key for sample in dataset.samples]
    made = load_encoder("tiny", weights=tiny_weights).encode([Image.open(sample.path) for sample in dataset.samples])
    tokens = dict(zip(keys[:-1], torch.cat([made[CLS][:, None], made[GRID]], 1), strict=False))
    # Names from one on, so that EZ-HOI's first is sound.
    write_bank(tmp_path / "root" / BANK, tokens, dict(zip(keys[1:], DEFECTS, strict=False)))
    return tmp_path / "root"


def test_third_party_pickles_are_verified_and_imported(root: Path, tiny_weights: Path) -> None:
    """The whole way of a user: the list and the images are found by the path of the bank."""
    before = contents(root)
    done = patchbank("verify", root / BANK, check=1)
    assert contents(root) == before
    lacking: list[str] = []
    for words in (
        "13 features read",
        "compared with the 14 images",
        "would run code",
        "cut short",
        "wrong shape",
        "NaN or Inf",
        "all zero",
        "normalised",
        "missing",
        "[CLS] left in",
        "GPU",
        "dtype",
        "a view",
        "gradients",
        "12 of 14 are not as they should be",
        f"patchbank import {root / BANK}",
    ):
        lacking += [words] * (words not in done.stdout)
    assert not lacking, done.stdout
    assert not (REPOSITORY / "patchbank-was-run").exists()  # where the process ran

    report = json.loads(patchbank("verify", root / BANK, "--json", check=1).stdout)
    assert report["counts"] == {**dict.fromkeys(report["counts"], 1)}
    assert set(report["counts"]) == {*DEFECTS, "missing"}
    assert report["problems"] == 12
    assert report["list"].endswith("test_hico.json")

    new, weights = root / "new" / BANK.rpartition("/")[2], ("--weights", tiny_weights)
    named = "--model", "tiny", *weights, "--root", root, "--dataset", "hicodet", "--split", "test"
    done = patchbank("import", root / BANK, new, *named, "--sample", 3, "--json", check=1)
    result = json.loads(done.stdout)
    assert len(result["left_out"]) == 7
    assert "3 features agree with a fresh extraction" in result["imported"]
    assert contents(root / BANK) == {name[len(BANK) + 1 :]: each for name, each in before.items() if BANK in name}
    original = Original(tiny_weights)
    bank = open_bank(new)
    images = {sample.key: sample.path for sample in load_dataset("hicodet", root, "test").samples}
    assert len(bank) == 7
    for key in bank:
        assert relative_error(bank[key], original(images[key])) <= 3e-4  # one was stored as float16
    assert "agree with a fresh extraction" in patchbank("info", new, check=0).stdout
    # Where features agree, `extract` completes the bank.
    extract = "extract", "hicodet", "--root", root, "--split", "test", "--out", root / "new"
    done = patchbank(*extract, "--model", "tiny", *weights, check=0)
    assert "7 features written" in done.stdout and "7 already there" in done.stdout
    listed = "--root", root, "--dataset", "hicodet", "--split", "test"
    assert "No problems found." in patchbank("verify", new, *listed, "--sample", 3, *weights, check=0).stdout


def test_features_of_other_weights_are_not_imported(root: Path, tiny_weights: Path) -> None:
    for path in (root / BANK).iterdir():
        path.write_bytes(pickle.dumps(torch.randn(16, 32)))
    named = "--model", "tiny", "--weights", tiny_weights, "--root", root, "--dataset", "hicodet", "--split", "test"
    done = patchbank("import", root / BANK, root / "new", *named, "--sample", 3, check=2)
    assert "differ from a fresh extraction" in done.stderr
    assert not (root / "new").exists()


def test_weights_that_are_not_the_banks(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    patchbank("extract", "folder", root / "hicodet", "--out", tmp_path / "bank", *tiny(tiny_weights), check=0)
    write_untrained(TINY, tmp_path / "other.pt", seed=2, vocabulary=TINY_VOCABULARY)
    sample = "verify", tmp_path / "bank", "--images", root / "hicodet", "--sample", "3"
    patchbank(*sample, "--weights", tiny_weights, check=0)
    done = patchbank(*sample, "--weights", tmp_path / "other.pt", check=2)
    assert "made with other weights than" in done.stderr
    assert "No problems found." in done.stdout  # the report comes first
    assert "give the file with --weights" in patchbank(*sample, check=2).stderr
    before = contents(tmp_path / "bank")
    repair = "repair", tmp_path / "bank", "--extract", "--images", root / "hicodet"
    assert "give the file with --weights" in patchbank(*repair, check=2).stderr
    assert contents(tmp_path / "bank") == before


def tiny(weights: Path) -> tuple[str, ...]:
    return "--model", "tiny", "--weights", str(weights), "--batch-size", "4"


def test_pickles_that_are_only_saved_badly_are_compared_with_pixels_too(root: Path, tiny_weights: Path) -> None:
    """All that the original scripts write are views."""
    (root / BANK).rename(root / "aside")
    keys = [sample.key for sample in load_dataset("hicodet", root, "test").samples]
    original = Original(tiny_weights)
    images = root / "hicodet/hico_20160224_det/images/test2015"
    tokens = {key: torch.cat([torch.ones(1, 32), original(images / key)]) for key in keys[:3]}
    write_bank(root / BANK, tokens, dict(zip(tokens, ("view", "cls", "dtype"), strict=True)))
    named = "--model", "tiny", "--weights", tiny_weights, "--root", root, "--dataset", "hicodet", "--split", "test"
    done = patchbank("import", root / BANK, root / "new", *named, "--sample", 3, "--json", check=1)
    assert "3 features agree with a fresh extraction" in json.loads(done.stdout)["imported"]


def test_images_that_changed_since_are_found(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 4)
    for layout in ("ezhoi", "shards"):
        bank = tmp_path / layout
        run = "extract", "folder", tmp_path / "images", "--out", bank, "--layout", layout
        patchbank(*run, *tiny(tiny_weights), check=0)
    shutil.copy(tmp_path / "images/photo_0000.jpg", tmp_path / "images/photo_0003.jpg")
    with Image.open(tmp_path / "images/photo_0002.jpg") as image:
        larger = image.resize((200, 100))
    larger.save(tmp_path / "images/photo_0002.jpg")
    for layout in ("ezhoi", "shards"):
        sample = "--images", tmp_path / "images", "--weights", tiny_weights
        done = patchbank("verify", tmp_path / layout, *sample, "--sample", 4, check=1)
        assert "differs from a fresh extraction\n  photo_0003.jpg: relative error" in done.stdout
        assert "photo_0002.jpg: the image is (200, 100), and was (120, 90)" in done.stdout
        patchbank("repair", tmp_path / layout, *sample, "--extract", check=0)
        assert open_bank(tmp_path / layout).size("photo_0002.jpg") == (200, 100)
        patchbank("verify", tmp_path / layout, "--images", tmp_path / "images", check=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "nowhere"), "There is no directory nowhere"),
        (("verify", "EMPTY"), "There is nothing to verify"),
        (("verify", "EMPTY", "--dataset", "coco"), "no dataset 'coco'"),
        (
            ("verify", "EMPTY", "--dataset", "vcoco", "--split", "test"),
            "There is no split 'test' of vcoco: train or val",
        ),
        (("verify", "EMPTY", "--dataset", "vcoco"), "Say which --split of vcoco: train or val"),
        (("verify", "EMPTY", "--dataset", "folder"), "--images"),
        (("verify", "EMPTY", "--root", "."), "Say which --dataset"),
        (("repair", "nowhere"), "nowhere is not a bank of patchbank"),
        (("repair", "EMPTY", "--extract"), "--extract needs the images"),
        (("convert", "nowhere", "x", "--layout", "shards"), "There is no bank nowhere"),
        (("convert", "EMPTY", "x", "--layout", "shards"), "is not a bank"),
        (("convert", "EMPTY", "x", "--layout", "shards", "--shard-size", "many"), "--shard-size: 'many' is no size"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "empty").mkdir()
    done = patchbank(*(str(tmp_path / "empty") if each == "EMPTY" else each for each in arguments), check=2)
    assert words in done.stderr


def test_an_invalid_size(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 1)
    run = "extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *tiny(tiny_weights)
    assert "'many' is no size in bytes" in patchbank(*run, "--shard-size", "many", check=2).stderr
    patchbank(*run, "--shard-size", "1.5 MiB", check=0)
    assert open_bank(tmp_path / "bank").manifest.part_size == 1_572_864 // 2176


def test_converting_as_a_user_does(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 5)
    (tmp_path / "images/broken.jpg").write_bytes(b"")
    run = "extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *tiny(tiny_weights)
    patchbank(*run, check=1)
    assert "layout shards" in patchbank("info", tmp_path / "bank", check=0).stdout
    done = patchbank("convert", tmp_path / "bank", tmp_path / "pickles", "--layout", "ezhoi", check=0)
    assert "5 features written" in done.stdout
    assert "1 failure carried over" in done.stdout
    result = json.loads(
        patchbank("convert", tmp_path / "bank", tmp_path / "pickles", "--layout", "ezhoi", "--json", check=0).stdout
    )
    assert (result["features"], result["already_done"], result["layout"]) == (0, 5, "ezhoi")
    shard = sorted((tmp_path / "bank").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    done = patchbank(
        "convert", tmp_path / "bank", tmp_path / "half", "--layout", "shards", "--dtype", "float16", check=1
    )
    assert "not converted: photo_0004.jpg" in done.stdout


def test_a_bank_of_fast_decoding_is_verified_and_repaired_as_one(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 4, size=(200, 150))
    bank, weights = tmp_path / "bank", ("--weights", tiny_weights)
    patchbank(
        *("extract", "folder", tmp_path / "images", "--out", bank, "--layout", "ezhoi", "--decode", "fast"),
        *("--model", "tiny", *weights),
        check=0,
    )
    feature = contents(bank)["photo_0001_clip.pkl"]
    given = ("--images", tmp_path / "images", *weights)
    patchbank("verify", bank, *given, "--sample", "4", check=0)
    (bank / "photo_0001_clip.pkl").unlink()
    patchbank("repair", bank, *given, "--extract", check=0)
    assert contents(bank)["photo_0001_clip.pkl"] == feature


def test_info_prints_how_complete_each_partition_is(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 10)
    (tmp_path / "images/broken.jpg").write_bytes(b"no picture")
    part = replace(tiny_config, partition=Partition(0, 3))
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", part)
    asked = ("info", tmp_path / "bank", "--images", tmp_path / "images", "--partitions", "3")
    done = patchbank(*asked, check=0)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[-3:] == [
        "part 0/3 2 of 3 images, 1 failed",
        "part 1/3 0 of 4 images, 4 left",
        "part 2/3 0 of 4 images, 4 left",
    ]
    [first, *_] = json.loads(patchbank(*asked, "--json", check=0).stdout)["partitions"]
    assert first == {"partition": "0/3", "listed": 3, "done": 2, "failed": 1, "left": 0}
    assert "Say which images" in patchbank("info", tmp_path / "bank", "--partitions", "2", check=2).stderr


def test_a_plan_notes_another_run_of_the_same_images(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 8)
    dataset, bank = load_dataset("folder", tmp_path / "images"), tmp_path / "bank"
    notes: dict[str, tuple[str, ...]] = {}

    def meanwhile(*_: object) -> None:
        for part in ("0/1", "1/4", "2/4"):
            notes[part] = make_plan(dataset, bank, replace(tiny_config, partition=Partition.parse(part))).notes

    extract(dataset, bank, replace(tiny_config, partition=Partition(1, 2)), on_progress=meanwhile)
    assert notes["1/4"] == () and notes["0/1"] == notes["2/4"]
    assert f"process {os.getpid()}" in notes["0/1"][0] and "part 1/2" in notes["0/1"][0]
    assert make_plan(dataset, bank, tiny_config).notes == ()
