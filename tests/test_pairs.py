"""Crops of annotated pairs: the numbers are those of plain Pillow and OpenAI's package, to 2e-6, box by box."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.regions import regions_by_image
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.example import write_sample
from patchbank.datasets.samples import image_size
from patchbank.encoders.openai.registry import MODELS
from patchbank.errors import ConfigError
from tests.faults.processes import Run, run
from tests.reference.original import Original
from tests.support import (
    REPOSITORY,
    contents,
    every_kind,
    no_leftovers,
    patchbank,
    photographs,
    relative_error,
    write_json,
)

BOUND = 2e-6
Pair = tuple[Sequence[float], Sequence[float]]
# Parts of the image's sides: a person, a thing within it, one that reaches beyond the image, one that is high and thin.
PARTS = [(0.1, 0.2, 0.63, 0.9), (0.3, 0.35, 0.55, 0.61), (0.5, 0.4, 1.07, 1.03), (-0.04, -0.01, 0.21, 0.97)]


def boxes_of(path: Path) -> list[list[float]]:
    with Image.open(path) as image:
        width, height = image.size
    return [[x1 * width, y1 * height, x2 * width, y2 * height] for x1, y1, x2, y2 in PARTS]


def hicodet_root(root: Path, names: Sequence[str]) -> Path:
    """Annotations of pictures: of each three pairs, but of every fourth none."""
    images = root / "hicodet/hico_20160224_det/images/train2015"
    entries = [
        {
            "file_name": name,
            "annotations": [
                {"bbox": box, "category_id": category}
                for box, category in zip(boxes_of(images / name), (1, 4, 18, 1), strict=True)
            ],
            "hoi_annotation": [
                {"subject_id": subject, "object_id": target, "category_id": 73, "hoi_category_id": 153}
                for subject, target in ((0, 1), (0, 2), (3, 1))
            ]
            * (number % 4 != 3),
        }
        for number, name in enumerate(names)
    ]
    write_json(root / "hicodet/trainval_hico.json", entries)
    return images


def expected(original: Original, picture: Image.Image, box: Sequence[float] | None, side: int) -> Tensor:
    """As ADA-CM's maker computes it: cut out, on a black square, CLIP's own preprocessing; the whole image squashed."""
    picture = picture.convert("RGB")
    if box is None:
        x = original.preprocess(picture.resize((side, side), Image.Resampling.BICUBIC))
    else:
        part = picture.crop(box)
        width, height = part.size
        longer = max(width, height)
        square = Image.new("RGB", (longer, longer), (0, 0, 0))
        square.paste(part, ((longer - width) // 2, 0) if height > width else (0, (longer - height) // 2))
        x = original.preprocess(square)
    with torch.no_grad():
        return original._model.encode_image(x[None])[0].float()


def regions_of(pairs: Sequence[Pair]) -> Iterator[tuple[str, Sequence[float] | None]]:
    yield "image", None
    for number, (human, thing) in enumerate(pairs):
        yield f"human-{number}", human
        yield f"object-{number}", thing
        first, last = np.minimum(human, thing), np.maximum(human, thing)
        yield f"union-{number}", [*first[:2].tolist(), *last[2:].tolist()]


def same(boxes: Sequence[float]) -> list[float]:
    return np.float32(boxes).tolist()  # as UPT reads them


@pytest.mark.parametrize("model", ["tiny", pytest.param("ViT-B/16", marks=pytest.mark.full)])
def test_hicodets_crops_are_openais_image_features(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    weights = request.getfixturevalue("tiny_weights" if model == "tiny" else "full_size_weights")
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    names = [name for name in every_kind(images) if min(image_size(images / name) or (0, 0)) > 100]
    names = names if model == "tiny" else names[:4]
    hicodet_root(tmp_path, names)
    run = ("extract", "pairs", "hicodet", "--root", tmp_path, "--model", model, "--weights", weights)
    patchbank(*run, "--out", tmp_path / "bank", check=0)

    bank, original, side = open_bank(tmp_path / "bank"), Original(weights), MODELS[model].input_size
    found = regions_by_image(bank)
    assert list(found) == [name for number, name in enumerate(names) if number % 4 != 3]
    for name, keys in found.items():
        human, inside, beyond, thin = map(same, boxes_of(images / name))
        wanted = dict(regions_of([(human, inside), (human, beyond), (thin, inside)]))
        assert list(keys) == list(wanted)
        with Image.open(images / name) as picture:
            for region, box in wanted.items():
                known = bank.region(keys[region])
                assert known is not None and (box is None or known.box == tuple(box))
                feature = expected(original, picture, box, side)
                assert relative_error(bank[keys[region]], feature) <= BOUND, keys[region]
                assert bank.size(keys[region]) == picture.size
        classes = [bank.region(keys[f"{region}-1"])[1:] for region in ("human", "object", "union")]  # type: ignore[index]
        assert classes == [(0, None, None, None), (16, None, None, None), (16, None, 72, 152)]


def test_vcocos_crops_are_too(tmp_path: Path, tiny_weights: Path) -> None:
    images = tmp_path / "vcoco/mscoco2014/train2014"
    names = photographs(images, 3, size=(400, 290), prefix="COCO_train2014")
    entries = []
    for number, name in enumerate(names):
        human, inside, beyond, thin = boxes_of(images / name)
        pairs = [(human, inside, 3, 5), (thin, beyond, 0, 0), (thin, beyond, 1, 2)] * (number != 1)
        columns = zip(*pairs, strict=True) if pairs else ([], [], [], [])
        entries.append(dict(zip(("boxes_h", "boxes_o", "objects", "actions"), map(list, columns), strict=True)))
        entries[-1]["file_name"] = name
    write_json(tmp_path / "vcoco/instances_vcoco_trainval.json", {"annotations": entries, "classes": [], "objects": []})
    run = ("extract", "pairs", "vcoco", "--root", tmp_path, "--model", "tiny", "--weights", tiny_weights)
    patchbank(*run, "--out", tmp_path / "bank", check=0)
    bank, original = open_bank(tmp_path / "bank"), Original(tiny_weights)
    found = regions_by_image(bank)
    assert list(found) == [names[0], names[2]]
    for name, keys in found.items():
        human, inside, beyond, thin = map(same, boxes_of(images / name))
        wanted = dict(regions_of([(human, inside), (thin, beyond)]))  # theirs is 0 for an action without an object
        assert list(keys) == list(wanted)
        with Image.open(images / name) as picture:
            for region, box in wanted.items():
                feature = expected(original, picture, box, MODELS["tiny"].input_size)
                assert relative_error(bank[keys[region]], feature) <= BOUND, keys[region]


def test_other_cuts(tmp_path: Path, tiny_weights: Path) -> None:
    """Squashed; and the square around the box, half as long again, with what the image shows there."""
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    names = photographs(images, 2, size=(300, 200))
    hicodet_root(tmp_path, names)
    dataset = annotated_pairs(load_dataset("hicodet", tmp_path, "train"))
    original, side = Original(tiny_weights), MODELS["tiny"].input_size
    for crop in ("squash", "context=1.5"):
        config = ExtractConfig(model="tiny", weights=tiny_weights, crop=crop)
        extract(dataset, tmp_path / crop, config)
        bank = open_bank(tmp_path / crop)
        assert bank.manifest.input.cut == crop
        for name in names:
            with Image.open(images / name) as picture:
                box = bank.region(f"{name}#object-0").box  # type: ignore[union-attr]
                assert box is not None
                x1, y1, x2, y2 = box
                if crop != "squash":
                    x, y, half = (x1 + x2) / 2, (y1 + y2) / 2, 0.75 * max(x2 - x1, y2 - y1)
                    x1, y1, x2, y2 = x - half, y - half, x + half, y + half
                part = picture.crop((x1, y1, x2, y2))
                feature = expected(original, part, None, side)
                assert relative_error(bank[f"{name}#object-0"], feature) <= BOUND


def test_its_bytes_are_the_same_however_it_is_run(tmp_path: Path, tiny_weights: Path) -> None:
    """Killed while it writes, in parts, with other threads, from the start: images lie across batches and shards."""
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    hicodet_root(tmp_path, photographs(images, 12, size=(160, 120)))
    common: tuple[object, ...] = (
        "extract",
        "pairs",
        "hicodet",
        "--root",
        tmp_path,
        "--model",
        "tiny",
        "--weights",
        tiny_weights,
    )
    common += ("--batch-size", "4", "--shard-size", "1kB")
    run(tmp_path / "printed", *common, "--out", tmp_path / "whole", check=0)
    whole = contents(tmp_path / "whole")
    assert len(whole) > 3
    run(tmp_path / "printed", *common, "--out", tmp_path / "threads", "--workers", 3, check=0)
    for part in ("1/3", "0/3", "2/3"):
        run(tmp_path / "printed", *common, "--out", tmp_path / "parts", "--partition", part, check=0)
    for batches in (2, 7):
        process = Run(tmp_path / "printed", *common, "--out", tmp_path / "killed", pause_after=batches).paused()
        process.send(signal.SIGKILL)
        process.wait()
    run(tmp_path / "printed", *common, "--out", tmp_path / "killed", check=0)
    for name in ("threads", "parts", "killed"):
        assert contents(tmp_path / name) == whole, name
        assert no_leftovers(tmp_path / name)


def test_boxes_that_cannot_be_used_are_failures(tmp_path: Path, tiny_weights: Path) -> None:
    """The rest is extracted, and goes on with its own numbers."""
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    names = photographs(images, 2, size=(160, 120))
    hicodet_root(tmp_path, names)
    entries = json.loads((tmp_path / "hicodet/trainval_hico.json").read_text())
    width, _ = image_size(images / names[1]) or (0, 0)
    wrong = {
        1: ([90, 20, 30, 60], "corners of the box (90, 20, 30, 60) are swapped"),
        2: ([float("nan"), 1, 30, 60], "not finite"),
    }
    for number, (box, _) in wrong.items():
        entries[0]["annotations"][number]["bbox"] = box
    entries[1]["annotations"][1]["bbox"] = [width - 0.5, 10, width + 30, 50]  # rounds to what lies beside it
    write_json(tmp_path / "hicodet/trainval_hico.json", entries)
    run = ("extract", "pairs", "hicodet", "--root", tmp_path, "--model", "tiny", "--weights", tiny_weights)
    patchbank(*run, "--out", tmp_path / "bank", check=1)
    bank = open_bank(tmp_path / "bank")
    assert f"{names[0]}#human-0" in bank and len(bank) + len(bank.failures) == 20
    assert wrong[1][1] in bank.failures[f"{names[0]}#object-0"]
    assert wrong[2][1] in bank.failures[f"{names[0]}#object-1"]
    assert wrong[2][1] in bank.failures[f"{names[0]}#union-1"]
    beside = [key for key in bank.failures if key.startswith(names[1])]
    assert beside == [f"{names[1]}#object-0", f"{names[1]}#object-2"]


def test_a_limit_counts_images(tmp_path: Path, tiny_weights: Path) -> None:
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    names = photographs(images, 3)
    hicodet_root(tmp_path, names)
    run = ("extract", "pairs", "hicodet", "--root", tmp_path, "--model", "tiny", "--weights", tiny_weights)
    patchbank(*run, "--out", tmp_path / "bank", "--limit", 2, check=0)
    assert list(regions_by_image(open_bank(tmp_path / "bank"))) == names[:2]
    assert len(open_bank(tmp_path / "bank")) == 20
    counted = patchbank("stats", tmp_path / "bank", "--by", "verb", check=1)
    assert "6 pairs" in counted.stdout and "lacks regions of its dataset" in counted.stderr
    named = patchbank("convert", tmp_path / "bank", tmp_path / "pairs.p", check=2).stderr
    assert "--layout ada-cm" in named
    entries = json.loads((tmp_path / "hicodet/trainval_hico.json").read_text())
    write_json(tmp_path / "hicodet/trainval_hico.json", [{**entry, "hoi_annotation": []} for entry in entries])
    assert "no pair with both boxes" in patchbank(*run, "--out", tmp_path / "none", check=2).stderr


def test_other_boxes_are_another_bank(tmp_path: Path, tiny_weights: Path) -> None:
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    names = photographs(images, 2)
    hicodet_root(tmp_path, names)
    common: tuple[object, ...] = (
        "extract",
        "pairs",
        "hicodet",
        "--root",
        tmp_path,
        "--model",
        "tiny",
        "--weights",
        tiny_weights,
    )
    common += ("--out", tmp_path / "bank")
    patchbank(*common, check=0)
    before = contents(tmp_path / "bank")
    hicodet_root(tmp_path, names[:1])
    assert "has other boxes" in patchbank(*common, check=2).stderr
    assert contents(tmp_path / "bank") == before


def test_what_does_not_go_together(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    hicodet_root(tmp_path, photographs(images, 2))
    whole = load_dataset("hicodet", tmp_path, "train")
    with pytest.raises(ConfigError, match="crop cuts out boxes"):
        extract(whole, tmp_path / "bank", ExtractConfig(**{**vars(tiny_config), "crop": "pad"}))
    with pytest.raises(ConfigError, match="resize is for whole images"):
        extract(annotated_pairs(whole), tmp_path / "bank", ExtractConfig(**{**vars(tiny_config), "resize": "pad"}))
    with pytest.raises(ConfigError, match="crop: pad, squash or context"):
        ExtractConfig(crop="around")
    assert not (tmp_path / "bank").exists()


@pytest.mark.full
def test_the_example_draws_the_nearest_pairs(tmp_path: Path, tiny_weights: Path) -> None:
    write_sample(tmp_path)
    for dataset, split, count in (("hicodet", "test", 4), ("vcoco", "train", 2)):
        bank, sheet = tmp_path / f"{dataset}-pairs", tmp_path / f"{dataset}.png"
        run = ("extract", "pairs", dataset, "--split", split, "--root", tmp_path, "--model", "tiny")
        patchbank(*run, "--weights", tiny_weights, "--out", bank, check=0)
        command = [sys.executable, "-W", "error", REPOSITORY / "examples/find_pairs.py", bank, "--root", tmp_path]
        done = subprocess.run([*map(str, command), "--out", str(sheet)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = [line for line in done.stdout.splitlines() if ", pair " in line]
        assert len(rows) == count and rows[0].lstrip().startswith("+1.000")
        with Image.open(sheet) as picture:
            assert picture.width > picture.height > 300
    command.insert(command.index(bank) + 1, "nowhere.jpg")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "has no pair 0 of nowhere.jpg" in done.stderr
