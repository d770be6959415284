"""Features of boxes pooled from a bank's grids: those of `pool_regions`, box by box."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchbank import load_dataset, open_bank, pool_regions
from patchbank.bank.regions import regions_by_image
from patchbank.config import ExtractConfig
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.samples import Sample, image_size
from patchbank.errors import BankError
from patchbank.extraction.regions import pool_into
from patchbank.extraction.run import extract
from patchbank.regions import Box, Region
from tests.faults.processes import Calls, Run
from tests.support import contents, no_leftovers, patchbank, photographs, relative_error
from tests.test_pairs import hicodet_root

IMAGES = "hicodet/hico_20160224_det/images/train2015"


def _is_wide(image: Sample) -> bool:
    width, height = image_size(image.path) or (0, 0)
    return width > height


@pytest.fixture
def root(tmp_path: Path) -> Path:
    photographs(tmp_path / IMAGES, 8, size=(160, 120))
    hicodet_root(tmp_path, sorted(path.name for path in (tmp_path / IMAGES).iterdir()))
    return tmp_path


def extracted(root: Path, weights: Path, *options: object) -> Path:
    common = ("extract", "hicodet", "--root", root, "--split", "train", "--model", "tiny", "--weights", weights)
    patchbank(*common, "--out", root / "banks", "--layout", "shards", *options, check=0)
    [bank] = (root / "banks").iterdir()
    return bank


@pytest.mark.parametrize("options", [(), ("--dtype", "int8"), ("--output", "block:1", "--output", "patch_tokens")])
def test_they_are_pool_regions(options: tuple[str, ...], root: Path, tiny_weights: Path) -> None:
    source = extracted(root, tiny_weights, "--resize", "squash", *options)
    patchbank("extract", "regions", source, "--pairs", "--root", root, "--out", root / "regions", check=0)
    images, bank = open_bank(source), open_bank(root / "regions")
    dataset = annotated_pairs(load_dataset("hicodet", root, "train"))
    assert list(bank.in_order()) == [sample.key for sample in dataset.samples]
    assert [bank.region(key) for key in bank.in_order()] == [sample.region for sample in dataset.samples]
    assert list(bank.manifest.outputs) == images.manifest.grids
    for sample in dataset.samples:
        transform = images.transform(sample.image)
        whole = (0, 0, transform.width, transform.height)
        box = torch.tensor([(sample.region and sample.region.box) or whole])
        for name in images.manifest.grids:
            expected = pool_regions(images.output(sample.image, name).float(), box, transform)[0]
            bound = 1e-3 if bank.manifest.dtype == "float16" else 2e-6
            assert relative_error(bank.output(sample.key, name).float(), expected) <= bound
    assert bank.manifest.rounded == (("int8",) if "int8" in options else ())


def test_boxes_without_a_feature_are_failures(root: Path, tiny_weights: Path) -> None:
    """Of an image that the bank lacks; outside of the image; and what was cropped away."""
    (root / IMAGES / "photo_0001.jpg").write_bytes(b"no picture")
    common = ("extract", "folder", root / IMAGES, "--model", "tiny", "--weights", tiny_weights)
    patchbank(*common, "--out", root / "bank", check=1)
    images = load_dataset("folder", root / IMAGES)
    boxes: list[Box] = [(60, 50, 90, 80), (0, 0, 10, 100), (200, 0, 300, 50), (30, 30, 30, 60), (9, 9, 5, 40)]
    samples = [
        Sample(f"{image.key}#box-{number}", image.source, 5 * image.position + number, None, Region(box))
        for image in images
        for number, box in enumerate(boxes)
    ]
    done = pool_into(open_bank(root / "bank"), images.of(samples), root / "regions", shard_size=1000)
    bank = open_bank(root / "regions")
    upright = [image.key for image in images if image.key in open_bank(root / "bank") and not _is_wide(image)]
    seen = {f"{key}#box-0" for key in open_bank(root / "bank")} | {f"{key}#box-1" for key in upright}
    assert {*bank} == seen and upright
    assert (done.features, done.failures, done.damaged) == (len(seen), 40 - len(seen), {})
    wide = next(image.key for image in images if _is_wide(image) and f"{image.key}#box-0" in bank)
    reasons = [bank.failures[f"{wide}#box-{number}"] for number in range(1, 5)]
    words = ("did not see it", "outside of the image of 160 x 120", "no area", "corners")
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))
    assert "identify" in bank.failures["photo_0001.jpg#box-0"]


def test_a_detectors_boxes(root: Path, tiny_weights: Path) -> None:
    """Those of images that the bank lacks are left out, with a word; the images themselves are not needed."""
    source = extracted(root, tiny_weights, "--resize", "squash")
    boxes = [[1.5, 2, 50, 60], [0, 0, 20, 20], [5, 5, 80, 90.25]]
    names = [*open_bank(source)][:3]
    lines = [{"file_name": name, "boxes": boxes, "labels": [0, 4, 16], "scores": [0.9, 0.1, 0.5]} for name in names]
    lines.append({"file_name": "nowhere.jpg", "boxes": boxes})
    (root / "found.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shutil.rmtree(root / IMAGES)
    command = ("extract", "regions", source, "--boxes", root / "found.jsonl", "--min-score", 0.2, "--out", root / "out")
    done = patchbank(*command, check=0)
    assert "the boxes of 1 image that" in done.stderr
    bank = open_bank(root / "out")
    assert [*bank.in_order()] == [f"{name}#box-{number}" for name in names for number in (0, 2)]
    assert bank.region(f"{names[1]}#box-2") == Region((5, 5, 80, 90.25), 16, 0.5)
    again = patchbank(
        "extract", "regions", root / "out", "--boxes", root / "found.jsonl", "--out", root / "no", check=2
    )
    assert "whole images" in again.stderr
    both = patchbank(*command, "--pairs", check=2)
    assert "--pairs" in both.stderr


def test_killed_it_goes_on(root: Path, tiny_weights: Path) -> None:
    source = extracted(root, tiny_weights)
    command = ("extract", "regions", source, "--pairs", "--root", root, "--shard-size", "1kB", "--out")
    code = Run(root / "printed", *command, root / "whole").wait()
    killed = Run(root / "printed", *command, root / "killed", pause_after=Calls(1)).paused()
    killed.send(signal.SIGKILL)
    killed.wait()
    again = Run(root / "printed", *command, root / "killed")
    assert again.wait() == code
    assert contents(root / "killed") == contents(root / "whole")
    assert no_leftovers(root / "killed")


def test_what_it_cannot_do(root: Path, tiny_weights: Path, tiny_config: ExtractConfig) -> None:
    source = extracted(root, tiny_weights)
    out = ("--out", root / "regions")
    assert "--pairs" in patchbank("extract", "regions", source, *out, check=2).stderr
    moved = source.rename(root / "elsewhere")
    assert "--root" in patchbank("extract", "regions", moved, "--pairs", *out, check=2).stderr
    dataset = annotated_pairs(load_dataset("hicodet", root, "train"))
    extract(dataset, root / "crops", replace(tiny_config, layout="shards"))
    with pytest.raises(BankError, match="whole images"):
        pool_into(open_bank(root / "crops"), dataset, root / "regions", shard_size=1000)
    assert not (root / "regions").exists()
    assert regions_by_image(open_bank(root / "crops"))
