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
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.config import ExtractConfig, Partition
from patchbank.datasets.samples import Failure
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.extraction.plan import make_plan
from patchbank.features import CLS, GRID
from tests.reference.original import Original
from tests.support import (
    REPOSITORY,
    TINY,
    TINY_VOCABULARY,
    OnBatch,
    contents,
    hico_root,
    patchbank,
    photographs,
    relative_error,
    tiny_manifest,
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
        "12 of 14 have problems",
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
    assert "Verifying" not in done.stderr and not done.stdout  # before the bank is read
    assert "give the file with --weights" in patchbank(*sample, check=2).stderr
    before = contents(tmp_path / "bank")
    repair = "repair", tmp_path / "bank", "--extract", "--images", root / "hicodet"
    assert "give the file with --weights" in patchbank(*repair, check=2).stderr
    assert contents(tmp_path / "bank") == before


def test_an_import_ends_with_the_command_that_completes_the_bank(root: Path, tiny_weights: Path) -> None:
    """First the one that imports again and compares, and then the one that extracts."""
    new, listed = root / "new", ("--dataset", "hicodet", "--split", "test", "--root", root)
    model = "--model", "tiny", "--weights", tiny_weights
    done = patchbank("import", root / BANK, new, *model, *listed, check=1)
    assert "without the images' extensions" not in done.stderr
    command = done.stdout.splitlines()[-1].split()
    assert command[:2] == ["patchbank", "import"] and command[-3:] == ["--sample", "20", "--overwrite"]
    # Until then the bank is refused, before anything changes; and `--sample` cannot be added without --overwrite.
    os.truncate(next(new.glob("*_clip.pkl")), 9)  # which `repair` would put in quarantine
    before = contents(new)
    for arguments in (("repair", new, "--extract", *listed, *model[2:]), tuple(command[1:-1])):
        assert "--sample 20 --overwrite" in patchbank(*arguments, check=2).stderr
    assert contents(new) == before
    done = patchbank(*command[1:], check=1)
    command = done.stdout.splitlines()[-1].split()
    assert command[:2] == ["patchbank", "repair"]
    assert "made on" not in patchbank("info", new, check=0).stdout
    done = patchbank(*command[1:], check=0)
    assert "7 features written" in done.stdout and "begun on" not in done.stderr
    assert open_bank(new).manifest.batch_size > 1  # as `extract` would choose on this machine
    patchbank("verify", new, *listed, check=0)
    shutil.copytree(root / BANK, root / "elsewhere")  # where nothing says what they are of
    done = patchbank("import", root / "elsewhere", root / "nameless", *model, check=1)
    assert "without the images' extensions" in done.stderr and "--images DIR" in done.stderr


def test_a_bank_is_not_a_directory_of_banks(root: Path, tiny_weights: Path) -> None:
    extract = "extract", "hicodet", "--root", root, "--split", "test", "--model", "tiny", "--weights", tiny_weights
    done = patchbank(*extract, "--out", root / BANK, check=2)
    assert f"Did you mean --out {root / BANK}".rpartition("/")[0] in done.stderr
    shutil.rmtree(root / BANK)
    patchbank(*extract, check=0)
    assert "is a bank itself" in patchbank(*extract, "--out", root / BANK, check=2).stderr
    # Pickles in a subdirectory belong to the bank there.
    patchbank("extract", "folder", root / "hicodet", "--out", root / BANK.split("/")[0], *tiny(tiny_weights), check=0)


def test_failed_images_are_not_to_be_put_in_quarantine(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 5)
    (tmp_path / "images/broken.jpg").write_bytes(b"")
    run = "extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *tiny(tiny_weights)
    done = patchbank(*run, "--partition", "0/1", "--limit", 4, check=1)
    assert "the bank has 3 of 6 features; 1 image failed" in done.stdout
    images = "--images", tmp_path / "images"
    (tmp_path / "images/photo_0004.jpg").unlink()
    (tmp_path / "images/photo_0003.jpg").unlink()
    done = patchbank("verify", tmp_path / "bank", *images, check=1)
    assert "1 of 4 has problems.\nExtract again what failed, after replacing images that cannot be read:" in done.stdout
    command = f"patchbank repair {tmp_path / 'bank'} --extract --images {tmp_path / 'images'} --weights FILE"
    assert command in done.stdout
    done = patchbank("repair", tmp_path / "bank", *images, check=1)
    assert command in done.stdout and "\nfailed\n  broken.jpg: the file is empty\n" in done.stdout
    images = "--images", tmp_path / "nowhere"
    done = patchbank("verify", tmp_path / "bank", *images, "--sample", 1, "--weights", tiny_weights, check=2)
    assert "nowhere" in done.stderr and not done.stdout


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


def test_a_bank_of_an_unknown_dataset_has_no_list(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(replace(dataset, name="mine"), tmp_path / "bank", tiny_config)
    done = patchbank("verify", tmp_path / "bank", check=0)
    assert "mine" in done.stdout and "completeness not checked" in done.stdout


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


def test_texts_of_a_bank_do_not_control_the_terminal(tmp_path: Path) -> None:
    title, forged = "\x1b]0;owned\x07", "a\nNo problems found.\u202eb.jpg"
    made = replace(tiny_manifest(), dataset="folder", identity={"family": title, "model": forged, "weights": "unknown"})
    with BankWriter(tmp_path / "bank", made, [forged, "b.jpg"]) as bank:
        features = {GRID: torch.ones(16, 32)}
        bank.add([Feature("b.jpg", features, None)], [Failure(forged, title)])
    for arguments in (["info"], ["info", "--failures"], ["info", "--keys"], ["verify"], ["convert"]):
        more = [tmp_path / "other"] if arguments == ["convert"] else []
        done = patchbank(arguments[0], tmp_path / "bank", *arguments[1:], *more)
        for text in (done.stdout, done.stderr):
            assert not {"\x1b", "\x07", "\u202e"} & set(text)
            assert not any(line.startswith("No problems found.\\u202e") for line in text.splitlines())
    assert json.loads(patchbank("info", tmp_path / "bank", "--json").stdout)["identity"]["family"] == title


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
    assert "part 1/2" in patchbank("info", tmp_path / "bank", "--partitions", "2", check=0).stdout
    (tmp_path / "images").rename(tmp_path / "moved")
    assert "Say which images" in patchbank("info", tmp_path / "bank", "--partitions", "2", check=2).stderr


def test_a_plan_notes_another_run_of_the_same_images(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 8)
    dataset, bank = load_dataset("folder", tmp_path / "images"), tmp_path / "bank"
    notes: dict[str, tuple[str, ...]] = {}

    def meanwhile(*_: object) -> None:
        for part in ("0/1", "1/4", "2/4"):
            notes[part] = make_plan(dataset, bank, replace(tiny_config, partition=Partition.parse(part))).notes

    extract(dataset, bank, replace(tiny_config, partition=Partition(1, 2)), progress=OnBatch(meanwhile))
    assert notes["1/4"] == () and notes["0/1"] == notes["2/4"]
    assert f"process {os.getpid()}" in notes["0/1"][0] and "part 1/2" in notes["0/1"][0]
    assert make_plan(dataset, bank, tiny_config).notes == ()
