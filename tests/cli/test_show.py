"""`patchbank show` as a process: what it draws, from where it takes the image, and what it says of wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchbank import extract, load_dataset
from patchbank.config import ExtractConfig
from tests.support import hico_root, patchbank

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
    assert done.stdout.split() == [str(tmp_path / "a.png")] and "not at hand" not in done.stderr
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
    assert "the image is not at hand" in " ".join(done.stderr.split())
    done = patchbank("show", bank, KEY, "--image", images / KEY, "-o", tmp_path / "own.png", check=0)
    assert "not at hand" not in done.stderr
    done = patchbank(
        "show", bank, KEY, "--dataset", "hicodet", "--split", "train", "--root", root, "-o", tmp_path / "x.png"
    )
    assert done.returncode == 0 and "not at hand" not in done.stderr
    Image.new("RGB", (10, 20)).save(tmp_path / "other.png")
    done = patchbank("show", bank, KEY, "--image", tmp_path / "other.png", "-o", tmp_path / "y.png", check=2)
    assert "it is another image" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jpg"], "has no 'none.jpg'"),
        ([KEY, "--at", "10"], "--at takes X,Y in pixels"),
        ([KEY, "--at", "1,1"], "is not in what the model saw of the image: x 14 to 106"),
        ([KEY, "--box", "50,5,40,30"], "X2 must be more than X1"),
        ([KEY, "--box", "0,0,5,5"], "the model saw nothing of it"),
        ([KEY, "--image", "none.png"], "none.png cannot be opened: No such file or directory"),
        ([KEY, "-o", "out.txt"], "pictures are written as .png"),
        ([KEY, "--text", "a dog"], "give it with --weights"),
        ([KEY, "-o", "/proc/none/x.png"], "/proc/none"),
    ],
)
def test_wrong_input_is_one_message(arguments: list[str], words: str, root: Path) -> None:
    bank = root / "hicodet_pkl_files" / "cliptiny_img_hicodet_train"
    done = patchbank("show", bank, *arguments, check=2)
    assert words in " ".join(done.stderr.split())
