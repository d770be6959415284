"""A detector's boxes, extracted: a box's feature is that of its crop; bad boxes fail alone; bytes depend on input."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from patchbank import Dataset, ExtractConfig, extract, load_boxes, load_dataset, open_bank
from patchbank.config import Partition
from patchbank.datasets.classes import COCO_91_TO_80
from patchbank.errors import BankError
from patchbank.extraction.plan import make_plan
from patchbank.features import POOLED
from tests.support import contents, no_leftovers, patchbank, photographs

NAN, INF = float("nan"), float("inf")
# Of images of 120 x 90 and 90 x 120 pixels; COCO's x, y, width, height.
GOOD = [(3, 4, 50, 60), (10.4, 20.5, 31, 17.3), (-5, -5, 40, 30), (60, 50, 500, 500)]
BAD = {
    (0, NAN, 10, 10): "not finite",
    (0, 0, INF, 10): "not finite",
    (30, 10, -20, 10): "swapped",
    (30, 10, 0, 10): "no area",
    (200, 10, 20, 20): "outside of the image",
    (20.1, 10, 0.2, 20): "narrower than half a pixel",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photographs(directory := tmp_path_factory.mktemp("images"), 6)
    (directory / "photo_0004.jpg").write_bytes(b"")
    return directory


@pytest.fixture(scope="module")
def detections(images: Path) -> Path:
    """Boxes of all images but the second, good and bad ones in turn."""
    bad = list(BAD)
    boxes = [box for pair in zip(GOOD + GOOD[:2], bad, strict=True) for box in pair]
    entries = [
        {"image_id": number, "category_id": list(COCO_91_TO_80)[place], "bbox": box, "score": 1 - place / 20}
        for place, box in enumerate(boxes)
        for number in (0, 2, 3, 4, 5)
    ]
    (path := images.parent / "detections.json").write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def dataset(images: Path, detections: Path) -> Dataset:
    return load_boxes(load_dataset("folder", images), detections, max_boxes=11)


@pytest.fixture(scope="module")
def config(tiny_config: ExtractConfig) -> ExtractConfig:
    """The tiny model in batches of four; a shard is for five boxes."""
    return replace(tiny_config, layout=None, shard_size=5 * 128)


@pytest.fixture(scope="module")
def bank(dataset: Dataset, config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extract(dataset, bank := tmp_path_factory.mktemp("banks") / "bank", config)
    return bank


def test_bad_boxes_fail_alone_with_their_reasons(dataset: Dataset, bank: Path) -> None:
    opened = open_bank(bank)
    assert opened.manifest.title == "boxes"
    assert (len(opened), len(opened.failures)) == (4 * 6, 4 * 5 + 11)
    for place, reason in enumerate(list(BAD.values())[:5]):
        for number in (0, 2, 3, 5):
            assert reason in opened.failures[f"photo_{number:04}.jpg#box-{2 * place + 1}"]
    assert {opened.failures[f"photo_0004.jpg#box-{place}"] for place in range(11)} == {"the file is empty"}
    assert {key: opened.region(key) for key in opened} == {
        each.key: each.region for each in dataset if each.key in opened
    }


@pytest.mark.parametrize("crop", ["pad", "squash", "context=1.5"])
def test_a_boxs_feature_is_that_of_its_crop(
    images: Path, detections: Path, config: ExtractConfig, tmp_path: Path, crop: str
) -> None:
    boxes = load_boxes(load_dataset("folder", images), detections, classes=[0, 2, 4])
    extract(boxes, tmp_path / "boxes", replace(config, crop=crop))
    found = open_bank(tmp_path / "boxes")
    (tmp_path / "crops").mkdir()
    for key in found:
        region, name = found.region(key), key.partition("#")[0]
        assert region is not None and region.box is not None
        x1, y1, x2, y2 = region.box
        if crop.startswith("context"):
            half = 0.75 * max(x2 - x1, y2 - y1)
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            x1, y1, x2, y2 = x - half, y - half, x + half, y + half
        with Image.open(images / name) as image:
            part = image.convert("RGB").crop((x1, y1, x2, y2))  # type: ignore[arg-type]
        if crop == "pad":
            square = Image.new("RGB", (max(part.size),) * 2)
            square.paste(part, ((square.width - part.width) // 2, (square.height - part.height) // 2))
            part = square
        part.save(tmp_path / "crops" / f"{key}.png")
    extract(
        load_dataset("folder", tmp_path / "crops"),
        tmp_path / "bank",
        replace(config, resize="squash", output=(POOLED,)),
    )
    expected = open_bank(tmp_path / "bank")
    assert len(found) == 4 * 3
    for key in found:
        assert torch.allclose(found[key], expected[f"{key}.png"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_leave_no_trace(
    dataset: Dataset, config: ExtractConfig, bank: Path, tmp_path: Path, workers: int
) -> None:
    extract(dataset, tmp_path / "bank", replace(config, workers=workers))
    assert contents(tmp_path / "bank") == contents(bank)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_partitions_leave_no_trace(
    dataset: Dataset, config: ExtractConfig, bank: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    for index in order:
        extract(dataset, tmp_path / "bank", replace(config, partition=Partition(index, 3)))
    assert contents(tmp_path / "bank") == contents(bank)
    assert no_leftovers(tmp_path / "bank")


def test_devices_leave_no_trace(dataset: Dataset, config: ExtractConfig, bank: Path, tmp_path: Path) -> None:
    extract(dataset, tmp_path / "bank", replace(config, device="cpu:0,1"))
    assert contents(tmp_path / "bank") == contents(bank)


def test_an_interrupted_run_is_continued(dataset: Dataset, config: ExtractConfig, bank: Path, tmp_path: Path) -> None:
    extract(dataset, tmp_path / "bank", replace(config, limit=13))
    plan = make_plan(dataset, tmp_path / "bank", config)
    assert plan.resumed and 0 < len(plan.todo) < len(plan.selected) == 55
    extract(dataset, tmp_path / "bank", config)
    assert contents(tmp_path / "bank") == contents(bank)


def test_a_bank_of_other_boxes_is_another_bank(
    images: Path, detections: Path, config: ExtractConfig, bank: Path
) -> None:
    fewer = load_boxes(load_dataset("folder", images), detections, max_boxes=10)
    with pytest.raises(BankError, match="regions"):
        make_plan(fewer, bank, config)


def test_a_plan_keeps_boxes_as_they_are_held(dataset: Dataset, config: ExtractConfig, tmp_path: Path) -> None:
    plan = make_plan(dataset, tmp_path / "bank", config)
    assert type(plan.todo) is type(plan.selected) is type(dataset.samples) is not tuple


def test_as_a_user_does(images: Path, detections: Path, tiny_weights: Path, bank: Path, tmp_path: Path) -> None:
    model = ("--model", "tiny", "--weights", tiny_weights, "--batch-size", 4)
    options = ("--boxes", detections, *model, "--out", tmp_path / "bank", "--shard-size", 640)
    done = patchbank("extract", "boxes", images, *options, "--max-boxes", 11, check=1)
    assert "photo_0000.jpg#box-3: the box (0, 0, inf, 10) holds a number that is not finite" in done.stdout
    assert contents(tmp_path / "bank") == contents(bank)

    done = patchbank("verify", tmp_path / "bank", check=1)
    assert "--dataset" not in done.stdout and "patchbank extract boxes IMAGES --boxes FILE" in done.stdout
    for line in (("repair", "--extract"), ("verify", "--sample", 3), ("verify", "--dataset", "folder")):
        done = patchbank(line[0], tmp_path / "bank", *line[1:], check=2)
        assert "holds features of a detector's boxes" in done.stderr


def test_options_of_the_command(images: Path, detections: Path, tiny_weights: Path, tmp_path: Path) -> None:
    (names := tmp_path / "names.json").write_text(
        json.dumps({"images": [{"id": n, "file_name": f"photo_{(n + 1) % 6:04}.jpg"} for n in range(6)]})
    )
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, ".")
    options = ("--boxes", detections, "--model", "tiny", "--weights", tiny_weights, "--out", tmp_path / "bank")
    chosen = ("--classes", "0,2", "--classes", 4, "--min-score", 0.85, "--annotations", names, "--crop", "squash")
    done = patchbank("extract", "boxes", tmp_path / "images.tar", *options, *chosen, check=1)
    assert open_bank(tmp_path / "bank").failures.keys() == {"photo_0004.jpg#box-0", "photo_0004.jpg#box-2"}
    opened = open_bank(tmp_path / "bank")
    assert set(opened) == {f"photo_{n:04}.jpg#box-{place}" for n in (0, 1, 3, 5) for place in (0, 2)}
    assert opened.manifest.input.cut == "squash"
    assert not done.stderr.count("Left out")
    done = patchbank("extract", "boxes", images, *options, "--classes", "cat", check=2)
    assert "--classes takes numbers, such as 0,17, not 'cat'" in done.stderr
    done = patchbank("extract", "boxes", images, images, *options, check=2)
    assert "Give one directory of images" in done.stderr


def test_a_bank_without_problems_is_not_said_to_be_complete(
    images: Path, detections: Path, tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    boxes = load_boxes(load_dataset("folder", images), {"photo_0000.jpg": {"boxes": [[1, 2, 30, 40]]}})
    extract(boxes, tmp_path / "bank", replace(tiny_config, layout=None))
    done = patchbank("verify", tmp_path / "bank", check=0)
    assert "No problems found; completeness not checked" in done.stdout
