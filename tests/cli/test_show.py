"""`patchbank show` as a process: what it draws, from where it takes the image, and what it says of wrong input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from patchbank import extract, load_dataset, open_bank
from patchbank.config import ExtractConfig
from tests.support import hico_root, patchbank, photographs

KEY = "HICO_train2015_0001.jpg"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> Path:
    """An EZ-HOI root with a bank of the tiny model."""
    root = hico_root(tmp_path_factory.mktemp("show"), 4, splits=["train"])
    extract(
        load_dataset("hicodet", root, "train"), root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train", tiny_config
    )
    return root


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).copy()


def test_an_image_with_its_boxes_and_similarities(root: Path, tmp_path: Path) -> None:
    bank = root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train"
    done = patchbank("show", bank, KEY, "-o", tmp_path / "a.png", check=0)
    assert done.stdout.split() == [str(tmp_path / "a.png")] and "not available" not in done.stderr
    asked = ("--at", "60,45", "--box", "20,10,100,80", "-o", tmp_path / "b.png")
    patchbank("show", bank, KEY, *asked, check=0)
    first, second = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png")
    for pixels in (first, second):
        assert min(pixels.shape[:2]) > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    assert first.shape != second.shape or (first != second).any()
    patchbank("show", bank, KEY, "--at", "60,45", "-o", tmp_path / "c.svg", check=0)
    text = (tmp_path / "c.svg").read_text()
    assert text.startswith("<?xml") and "</svg>" in text


def test_where_the_image_comes_from(root: Path, tmp_path: Path) -> None:
    bank = tmp_path / "elsewhere"
    shutil.copytree(root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train", bank)
    images = root / "hicodet/hico_20160224_det/images/train2015"
    done = patchbank("show", bank, KEY, "-o", tmp_path / "none.png", check=0)
    assert "the image is not available" in " ".join(done.stderr.split())
    done = patchbank("show", bank, KEY, "--image", images / KEY, "-o", tmp_path / "own.png", check=0)
    assert "not available" not in done.stderr
    done = patchbank(
        "show", bank, KEY, "--dataset", "hicodet", "--split", "train", "--root", root, "-o", tmp_path / "x.png"
    )
    assert done.returncode == 0 and "not available" not in done.stderr
    Image.new("RGB", (10, 20)).save(tmp_path / "other.png")
    done = patchbank("show", bank, KEY, "--image", tmp_path / "other.png", "-o", tmp_path / "y.png", check=2)
    assert "is another image" in " ".join(done.stderr.split())


def test_nothing_of_others_is_written_over(root: Path, tmp_path: Path) -> None:
    """Neither an image, nor what a link leads to; a picture of an earlier run is, and so is an empty file."""
    bank = root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train"
    (tmp_path / "links").mkdir()
    for format in ("png", "pdf", "svg"):
        photo = tmp_path / f"photo.{format}"
        Image.new("RGB", (10, 20)).save(photo, "PNG")
        (tmp_path / f"links/a.{format}").symlink_to(photo)
        before = photo.read_bytes()
        for target in (photo, tmp_path / f"links/a.{format}"):
            done = patchbank("show", bank, KEY, "-o", target, check=2)
            assert "is there, and is not a picture of `patchbank show`" in " ".join(done.stderr.split())
            assert photo.read_bytes() == before
        (tmp_path / f"empty.{format}").touch()
        (tmp_path / f"link.{format}").symlink_to(tmp_path / f"own.{format}")
        for name in ("own", "own", "empty", "link"):
            patchbank("show", bank, KEY, "-o", tmp_path / f"{name}.{format}", check=0)
        assert (tmp_path / f"link.{format}").is_symlink()
    assert not list(tmp_path.glob(".*"))
    assert patchbank("show", bank, KEY, "-o", tmp_path / "photo.png" / "x.png", check=2).stderr


def test_what_cannot_be_drawn_is_said(tmp_path: Path, tiny_weights: Path) -> None:
    """Names that no font has, and that are no text; numbers that are not finite."""
    names = ["\U00013000 hieroglyph.jpg", "control\x07.jpg", os.fsdecode(b"bad\xff.jpg")]
    for name, photo in zip(names, photographs(tmp_path / "images", 3), strict=True):
        (tmp_path / "images" / photo).rename(tmp_path / "images" / name)
    run = ("--model", "tiny", "--weights", tiny_weights, "--out", tmp_path / "bank")
    patchbank("extract", "folder", tmp_path / "images", *run, check=0)
    listed = patchbank("info", tmp_path / "bank", "--keys", "--json", check=0)
    assert json.loads(listed.stdout) == sorted(names)
    for number, name in enumerate(names):
        out = tmp_path / f"{number}.svg"
        done = patchbank("show", tmp_path / "bank", name, "--images", tmp_path / "images", "-o", out, check=0)
        assert ("no installed font" in done.stderr) == (number == 0) and "Warning" not in done.stderr
        ElementTree.parse(out)
    [shard] = (tmp_path / "bank").glob("shard-*")
    row = open_bank(tmp_path / "bank")[names[1]].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(row[:4], b"\xff\xff\xff\x7f"))
    done = patchbank("show", tmp_path / "bank", names[1], "-o", tmp_path / "nan.png", check=0)
    assert "1 of 16 tokens have values that are not finite" in " ".join(done.stderr.split())
    patchbank("show", tmp_path / "bank", names[1], "--at", "60,45", "-o", tmp_path / "nan.png", check=0)


def test_of_many_pairs_the_first_are_drawn(root: Path, tmp_path: Path) -> None:
    bank = root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train"
    content = json.loads((root / "hicodet/trainval_hico.json").read_text())
    content[1]["hoi_annotation"] = [content[1]["hoi_annotation"][0] | {"category_id": verb} for verb in range(1, 11)]
    (tmp_path / "list.json").write_text(json.dumps(content))
    options = ("--annotations", tmp_path / "list.json", "--dataset", "hicodet", "--split", "train", "--root", root)
    done = patchbank("show", bank, KEY, *options, "-o", tmp_path / "a.svg", check=0)
    assert "8 of 10 annotated pairs are drawn; --all-pairs draws all" in " ".join(done.stderr.split())
    done = patchbank("show", bank, KEY, *options, "--all-pairs", "-o", tmp_path / "a.svg", check=0)
    assert "annotated pairs are drawn" not in done.stderr


def test_a_pair_that_was_not_seen_is_named(root: Path, tmp_path: Path) -> None:
    """The first pair's human is at the left edge of a broad image; the model saw the middle."""
    bank = root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train"
    done = patchbank("show", bank, KEY, "-o", tmp_path / "a.png", check=0)
    assert "no map for" not in done.stderr
    content = json.loads((root / "hicodet/trainval_hico.json").read_text())
    content[1]["annotations"][0]["bbox"] = [1, 2, 10, 40]
    (tmp_path / "list.json").write_text(json.dumps(content))
    options = ("--annotations", tmp_path / "list.json", "--dataset", "hicodet", "--split", "train", "--root", root)
    done = patchbank("show", bank, KEY, *options, "-o", tmp_path / "b.png", check=0)
    assert "no map for the pair's human" in " ".join(done.stderr.split())
    content[1]["annotations"][1]["bbox"] = [2, 3, 11, 50]  # nothing of the whole pair: the middle patch is drawn
    (tmp_path / "list.json").write_text(json.dumps(content))
    done = patchbank("show", bank, KEY, *options, "-o", tmp_path / "c.svg", check=0)
    assert "human and object and union" in " ".join(done.stderr.split())
    assert drawn(tmp_path / "b.png").size > 0 and (tmp_path / "c.svg").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jpg"], "has no 'none.jpg'"),
        ([KEY, "--at", "10"], "--at takes X,Y in original pixels"),
        ([KEY, "--at", "1,1"], "is outside the part that the model saw: x 14 to 106"),
        ([KEY, "--box", "50,5,40,30"], "X2 must be greater than X1"),
        ([KEY, "--box", "0,0,5,5"], "is outside the part that the model saw"),
        ([KEY, "--image", "none.png"], "none.png cannot be opened: No such file or directory"),
        ([KEY, "-o", "out.txt"], "the file must end in .png"),
        ([KEY, "-o", "out.jpg"], "the file must end in .png"),
        (["hico_train2015_0001"], f"Did you mean '{KEY}'?"),
        (["deeper/HICO_train2015_0001.png"], f"Did you mean '{KEY}'?"),
        (["HICO_train2015_001.jpg"], "Did you mean 'HICO_train2015_0001.jpg'?"),
        ([KEY, "--annotations", "/dev/null"], "annotation"),
        ([KEY, "--text", "a dog"], "give the file with --weights"),
        ([KEY, "-o", "/proc/none/x.png"], "/proc/none"),
    ],
)
def test_wrong_input_is_one_message(arguments: list[str], words: str, root: Path) -> None:
    bank = root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train"
    done = patchbank("show", bank, *arguments, check=2)
    assert words in " ".join(done.stderr.split())
