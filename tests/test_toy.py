"""A second family goes the whole way, through an input that is not square: nothing on it is CLIP's."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from patchbank import (
    Dataset,
    ExtractConfig,
    FeatureDataset,
    extract,
    horizontal_flip,
    load_dataset,
    load_encoder,
    open_bank,
    pool_regions,
)
from patchbank.bank.check import Report, compare_with_pixels, verify
from patchbank.bank.convert import convert
from patchbank.bank.reader import Bank
from patchbank.bank.runs import read_runs
from patchbank.config import Layout, ResizeMode
from patchbank.datasets.example import write_sample
from patchbank.errors import BankError, WeightsError
from patchbank.extraction.recompute import recompute, runner_of
from patchbank.features import CLS, GRID
from patchbank.show.page import write_report
from tests.reference import regions as reference
from tests.support import REPOSITORY, SecondLook, contents, patchbank, photographs, relative_error, toy_is_known  # noqa: F401
from tests.toy_family import Toy, toy

LAYOUTS: list[Layout] = ["ezhoi", "shards"]
SIZES = [(120, 90), (90, 120), (200, 31)]
BOUND = 2e-6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Nine photographs: wide, upright, and wider than the input."""
    images = tmp_path_factory.mktemp("toy") / "images"
    for size in SIZES:
        photographs(images, 3, size, prefix=f"{size[0]}x{size[1]}")
    return load_dataset("folder", images)


@pytest.fixture(scope="module")
def config() -> ExtractConfig:
    """Batches of two; shards of four images."""
    return ExtractConfig(model="toy/small", batch_size=2, shard_size=4 * (15 * 6 + 6) * 4)


@pytest.fixture(scope="module")
def banks(dataset: Dataset, config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bank of each layout, made in one go."""
    places = {layout: tmp_path_factory.mktemp("banks") / layout for layout in LAYOUTS}
    for layout, place in places.items():
        summary = extract(dataset, place, replace(config, layout=layout))
        assert (summary.images, summary.failures, summary.notes) == (9, {}, [])
    return places


def expected(dataset: Dataset, key: str) -> dict[str, torch.Tensor]:
    """The outputs of one image, its pixels made by torchvision."""
    image = Image.open(dataset.images / key)
    width, height = image.size
    ratio = min(width / 40, height / 24)
    sizes = [round(height / ratio), round(width / ratio)]
    seen = F.center_crop(F.resize(image, sizes, InterpolationMode.BILINEAR), [24, 40])
    with torch.no_grad():
        outputs = Toy(toy())(torch.from_numpy(np.array(seen))[None])
    return {name: value[0] for name, value in outputs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bank_holds_what_the_encoder_gives(dataset: Dataset, banks: dict[str, Path], layout: Layout) -> None:
    bank = open_bank(banks[layout])
    made = bank.manifest
    assert (made.grid, made.shape, made.model) == ((3, 5), (15, 6), "toy/small")
    assert "msgspec" in made.versions and read_runs(bank.path)[0].versions == made.versions
    assert (made.input, made.identity) == (toy().input, toy().identity)
    assert len(bank) == 9
    for key in bank:
        outputs = expected(dataset, key)
        assert relative_error(bank[key], outputs[GRID]) <= BOUND
        assert torch.equal(bank.output(key, GRID), bank[key])
        assert torch.equal(bank.grid(key), bank[key].view(3, 5, 6))
        if layout == "shards":
            assert relative_error(bank.cls(key), outputs[CLS]) <= BOUND
            assert torch.equal(bank.output(key, CLS), bank.cls(key))
        else:
            with pytest.raises(BankError, match=r"does not store the output 'cls'\. It stores patch_tokens"):
                bank.cls(key)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_run_ends_in_the_same_bytes(
    dataset: Dataset, config: ExtractConfig, banks: dict[str, Path], layout: Layout, tmp_path: Path
) -> None:
    config = replace(config, layout=layout)
    assert extract(dataset, tmp_path, config, stop=SecondLook()).remaining
    assert 0 < len(open_bank(tmp_path)) < 9
    assert extract(dataset, tmp_path, config).already_done
    assert contents(tmp_path) == contents(banks[layout])
    with pytest.raises(BankError, match=r"model: the bank has toy/small, this run toy/other"):
        extract(dataset, tmp_path, replace(config, model="toy/other"))


def compared(bank: Path, dataset: Dataset) -> Report:
    """A bank verified, all of its features compared with the images."""
    keys = [sample.key for sample in dataset.samples]
    report = verify(bank, keys)
    assert report.manifest is not None
    runner = runner_of(report.manifest, ExtractConfig(device="cpu"), dataset.root)
    assert runner.spec == toy(output=tuple(report.manifest.outputs))
    compare_with_pixels(report, keys, len(keys), recompute(dataset, runner, report.manifest.input))
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_verified_by_its_own_encoder(dataset: Dataset, banks: dict[str, Path], layout: Layout) -> None:
    report = compared(banks[layout], dataset)
    assert report.problems == []
    assert len(report.sample) == 9 and max(report.sample.values()) <= BOUND


def test_other_pixels_are_found(dataset: Dataset, config: ExtractConfig, tmp_path: Path) -> None:
    extract(dataset, tmp_path / "bank", config)
    (tmp_path / "images").mkdir()
    for sample in dataset.samples:
        Image.open(sample.path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "images" / sample.key)
    report = compared(tmp_path / "bank", load_dataset("folder", tmp_path / "images"))
    assert {finding.kind for finding in report.problems} == {"pixels"}
    assert len(report.problems) == 9


def test_other_weights_are_refused(banks: dict[str, Path]) -> None:
    made = open_bank(banks["shards"]).manifest
    other = replace(made, identity={**made.identity, "weights": "seed 7"})
    with pytest.raises(WeightsError, match="made with other weights"):
        runner_of(other, ExtractConfig(), None)


def test_conversions_and_back(dataset: Dataset, config: ExtractConfig, banks: dict[str, Path], tmp_path: Path) -> None:
    size = config.shard_size
    pickles, shards = (open_bank(banks[layout]) for layout in LAYOUTS)
    convert(shards, tmp_path / "pickles", "ezhoi", shard_size=size)
    assert (
        contents(tmp_path / "pickles").items()
        >= {name: value for name, value in contents(banks["ezhoi"]).items() if name.endswith(".pkl")}.items()
    )
    convert(pickles, tmp_path / "shards", "shards", shard_size=size)
    convert(open_bank(tmp_path / "shards"), tmp_path / "again", "ezhoi", shard_size=size)
    assert contents(tmp_path / "again") == contents(banks["ezhoi"])
    convert(shards, tmp_path / "int8", "shards", "int8", shard_size=size)
    small = open_bank(tmp_path / "int8")
    assert list(open_bank(tmp_path / "shards").manifest.outputs) == [GRID]
    assert small.manifest.outputs[GRID].dtype == "int8" and small.manifest.outputs[CLS].dtype == "float16"
    for key in shards:
        assert 0 < relative_error(small[key], shards[key]) < 1e-2
        assert relative_error(small.cls(key).float(), shards.cls(key)) < 1e-3
        assert small.transform(key) == shards.transform(key)
    assert compared(tmp_path / "int8", dataset).problems == []


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
def test_regions_are_pooled_where_nested_loops_pool_them(
    dataset: Dataset, config: ExtractConfig, mode: ResizeMode, tmp_path: Path
) -> None:
    extract(dataset, tmp_path, replace(config, resize=mode))
    bank = open_bank(tmp_path)
    for key in bank:
        transform, grid = bank.transform(key), bank.grid(key).double().numpy()
        width, height = transform.width, transform.height
        boxes = torch.tensor([[5.0, 4, 60, 25], [-9, -9, width + 9, height + 9], [30, 2, 33, 30], [70, 10, 90, 31]])
        for bins in (7, 2):
            loops = np.stack([reference.pooled(grid, box, transform, bins) for box in boxes.double().numpy()])
            assert np.abs(pool_regions(bank[key], boxes, transform, bins, None).numpy() - loops).max() <= 1e-5
            assert np.abs(pool_regions(bank[key], boxes, transform, bins).numpy() - loops.mean((2, 3))).max() <= 1e-5


def test_training_code_gets_regions_and_turns_the_grid(config: ExtractConfig, tmp_path: Path) -> None:
    write_sample(tmp_path / "root")
    dataset = load_dataset("hicodet", tmp_path / "root", "train")
    extract(dataset, tmp_path / "bank", config)
    plain = FeatureDataset(tmp_path / "bank", dataset, "union")
    turned = FeatureDataset(tmp_path / "bank", dataset, "union", transform=horizontal_flip)
    for (tokens, target), (flipped, mirrored) in ((plain[index], turned[index]) for index in range(len(plain))):
        assert torch.equal(flipped.view(3, 5, 6), tokens.view(3, 5, 6).flip(1))
        assert torch.allclose(mirrored.regions["union"], target.regions["union"], atol=1e-5)


def test_two_processes_make_the_same_bytes(
    dataset: Dataset, config: ExtractConfig, banks: dict[str, Path], tmp_path: Path
) -> None:
    """They have not registered the family: its spec travels to them."""
    extract(dataset, tmp_path, replace(config, device="cpu:0,1"))
    assert contents(tmp_path) == contents(banks["shards"])


def test_an_encoder_by_name(dataset: Dataset, banks: dict[str, Path]) -> None:
    runner = load_encoder("toy/small", device="cpu")
    key = dataset.samples[0].key
    found = runner.encode([Image.open(dataset.images / key)])
    assert {name: tuple(value.shape) for name, value in found.items()} == {GRID: (1, 15, 6), CLS: (1, 6)}
    assert relative_error(found[GRID][0], open_bank(banks["shards"])[key]) <= BOUND


def frame_of(bank: Bank, key: str) -> list[float]:
    """What the input covers of the image: xyxy in its pixels."""
    transform = bank.transform(key)
    (scale_x, scale_y), (x, y) = transform.scale, transform.offset
    return [-x / scale_x, -y / scale_y, (40 - x) / scale_x, (24 - y) / scale_y]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_page_has_its_grid_where_it_lies(
    dataset: Dataset, banks: dict[str, Path], layout: Layout, tmp_path: Path
) -> None:
    bank = open_bank(banks[layout])
    written = write_report(bank, tmp_path / "page.html", dataset, sample=9)
    assert (written.images, written.defects) == (9, 0)
    text = (tmp_path / "page.html").read_text()
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    for image in json.loads(data):
        assert image["grid"] == [3, 5]
        assert image["frame"] == pytest.approx(frame_of(bank, image["key"]), abs=1e-3)
        assert image["valid"] == [0, 3, 0, 5]
        assert image["picture"] and image["error"] < 0.05
    assert "<dd>24x40 (height x width)</dd>" in text and "<dd>3 x 5</dd>" in text and "toy/small" in text


@pytest.mark.parametrize("size", SIZES)
def test_the_figure_has_its_grid_where_it_lies(
    dataset: Dataset,
    banks: dict[str, Path],
    size: tuple[int, int],
    tmp_path: Path,
) -> None:
    bank = open_bank(banks["shards"])
    key = next(key for key in bank if bank.size(key) == size)
    x, y = (size[0] / 2, size[1] / 2)
    place = tmp_path / "picture.png"
    asked = ("--at", f"{x},{y}", "--box", f"{x - 9},{y - 9},{x + 20},{y + 5}")
    patchbank("show", bank.path, key, "--image", dataset.images / key, *asked, "--out", place, check=0)
    with Image.open(place) as picture:
        assert picture.width > 500
    box = (x - 9, y - 9, x + 20, y + 5)
    found = bank.show(key, at=[(x, y)], boxes=[box], image=dataset.images / key)
    maps = [
        image
        for axes in found.figure.axes
        for image in axes.images
        if np.asarray(image.get_array()).shape[:2] == (3, 5)
    ]
    assert len(maps) == 3  # the components, and a similarity each
    x1, y1, x2, y2 = frame_of(bank, key)
    for image in maps:
        assert image.get_extent() == pytest.approx([x1, x2, y2, y1])
    done = patchbank("show", bank.path, key, "--text", "a dog", "--out", tmp_path / "other.png", check=2)
    assert "--text needs a model with a text tower" in done.stderr
    assert not (tmp_path / "other.png").exists()


def test_the_commands_take_its_name(
    dataset: Dataset, config: ExtractConfig, banks: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--model", "toy/small", "--batch-size", 2, "--device", "cpu")
    images = dataset.images
    patchbank(
        *("extract", "folder", images, *options, "--shard-size", config.shard_size, "--out", tmp_path / "bank"), check=0
    )
    assert contents(tmp_path / "bank") == contents(banks["shards"])
    verified = patchbank("verify", tmp_path / "bank", "--images", images, "--sample", 9, "--json", check=0)
    assert len(json.loads(verified.stdout)["sample"]) == 9
    write_sample(tmp_path / "root")
    patchbank("extract", "hicodet", "--root", tmp_path / "root", "--split", "train", *options, check=0)
    assert len(open_bank(tmp_path / "root/hicodet_pkl_files/toy-small_img_hicodet_train")) == 7
    found = patchbank("doctor", "--root", tmp_path / "root", *options, "--json", check=0)
    findings = {each["what"]: each["data"] for each in json.loads(found.stdout)["findings"]}
    assert findings["toy-small_img_hicodet_train"]["done"] == 7


def test_the_page_of_architecture_shows_it() -> None:
    page = (REPOSITORY / "docs/why/architecture.md").read_text()
    shown = re.search(r"### A new family.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert shown
    assert set(shown[1].splitlines()) <= set((REPOSITORY / "tests/toy_family.py").read_text().splitlines())


def test_it_is_measured(dataset: Dataset) -> None:
    options = ("--model", "toy/small", "--images", dataset.images, "--limit", 2, "--device", "cpu", "--json")
    measures = json.loads(patchbank("bench", *options, check=0).stdout)["measures"]
    assert {each["stage"] for each in measures} == {"decode", "encode", "write", "read", "end to end"}
    assert all(each["limit"] is None for each in measures)  # it does not count its products
