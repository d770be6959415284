"""Other outputs than patch tokens, other sizes of the input, pooled grids: through banks and all that uses them."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchbank import (
    Dataset,
    ExtractConfig,
    FeatureDataset,
    extract,
    horizontal_flip,
    load_dataset,
    open_bank,
    pool_regions,
    show_features,
    write_report,
)
from patchbank.bank import patchbank_reader
from patchbank.bank.check import compare_with_pixels, verify
from patchbank.bank.convert import convert
from patchbank.bank.pickles import pickle_name
from patchbank.bank.repair import repair
from patchbank.datasets.example import write_sample
from patchbank.encoders.runner import Runner
from patchbank.errors import BankError, ConfigError
from patchbank.extraction.recompute import config_of, recompute, runner_of
from patchbank.features import CLS, GRID, POOLED, REGISTERS
from patchbank.preprocess import preprocess
from tests.reference import regions as reference
from tests.support import SecondLook, contents, patchbank, photographs, relative_error, toy_is_known  # noqa: F401
from tests.toy_family import Toy, toy

EVERY = ("block:1", CLS, GRID, "block:2", REGISTERS, "block:1:raw", POOLED)
SHAPES = {CLS: (6,), REGISTERS: (4, 6), POOLED: (4,)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six photographs, wide and upright."""
    images = tmp_path_factory.mktemp("outputs") / "images"
    for size in ((120, 90), (90, 120)):
        photographs(images, 3, size, prefix=f"{size[0]}x{size[1]}")
    return load_dataset("folder", images)


def config(*outputs: str, **options: Any) -> ExtractConfig:
    return ExtractConfig(model="toy/small", device="cpu", batch_size=2, shard_size=1500, output=outputs, **options)


@pytest.fixture(scope="module")
def every(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of every output."""
    place = tmp_path_factory.mktemp("every") / "bank"
    assert extract(dataset, place, config(*EVERY)).failures == {}
    return place


def expected(dataset: Dataset, key: str, **options: Any) -> dict[str, torch.Tensor]:
    """The outputs of one image, from the encoder alone: patches are not yet merged."""
    spec = toy(**options)
    with Image.open(dataset.images / key) as image, torch.no_grad():
        outputs = Toy(spec)(torch.from_numpy(preprocess(image, spec.input).copy())[None])
    return {name: value[0] for name, value in outputs.items()}


# --- what a bank holds


def test_a_bank_holds_exactly_the_outputs_asked_for(dataset: Dataset, every: Path) -> None:
    bank = open_bank(every)
    made = bank.manifest
    assert tuple(made.outputs) == EVERY and made.main == GRID
    assert made.grids == ["block:1", GRID, "block:2", "block:1:raw"]
    other = patchbank_reader.open_bank(every)
    for key in bank:
        wanted = expected(dataset, key, output=EVERY)
        for name in EVERY:
            assert tuple(bank.output(key, name).shape) == made.outputs[name].shape == SHAPES.get(name, (15, 6))
            assert relative_error(bank.output(key, name), wanted[name]) <= 2e-6
            assert torch.equal(other.output(key, name), bank.output(key, name))
        assert torch.equal(bank[key], wanted[GRID]) or relative_error(bank[key], wanted[GRID]) <= 2e-6
        for name in made.grids:
            assert torch.equal(bank.grid(key, name), bank.output(key, name).view(3, 5, 6))
            assert torch.equal(other.grid(key, name), bank.grid(key, name))
        assert torch.equal(bank.cls(key), bank.output(key, CLS))
    for name in (CLS, REGISTERS):
        with pytest.raises(
            BankError, match=f"output {name} of .* is no grid of patches. It stores block:1, patch_tokens"
        ):
            bank.grid(key, name)
        with pytest.raises(patchbank_reader.BankError, match="is no grid"):
            other.grid(key, name)
    with pytest.raises(BankError, match=r"does not store the output 'maskclip'\. It stores block:1, cls"):
        bank.output(key, "maskclip")
    assert "block:1:raw (15, 6) float32" in repr(bank) and "pooled (4,) float32" in bank._repr_html_()


@pytest.mark.parametrize("outputs", [(CLS,), ("block:1", CLS), (REGISTERS,), (POOLED, "block:2:raw")])
def test_a_bank_without_patch_tokens(dataset: Dataset, outputs: tuple[str, ...], tmp_path: Path) -> None:
    """It is stopped and resumed, verified, damaged, repaired and completed, converted, and read by each reader."""
    asked, place = config(*outputs), tmp_path / "bank"
    assert extract(dataset, place, asked, stop=SecondLook()).remaining
    extract(dataset, place, asked)
    bank = open_bank(place)
    key = next(iter(bank))
    assert bank.manifest.main == outputs[0] and list(bank.manifest.outputs) == list(outputs)
    assert torch.equal(bank[key], bank.output(key, outputs[0]))
    assert torch.equal(patchbank_reader.open_bank(place)[key], bank[key])
    before = {each: {name: bank.output(each, name) for name in outputs} for each in bank}
    part = bank.file(key)
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    assert {each.kind for each in verify(place).problems} == {"checksum"}
    assert repair(place).to_extract
    extract(dataset, place, asked)
    assert verify(place, [sample.key for sample in dataset.samples]).problems == []
    again = open_bank(place)
    assert all(torch.equal(again.output(each, name), before[each][name]) for each in before for name in outputs)
    convert(again, tmp_path / "half", "shards", "int8", shard_size=1500)
    half = open_bank(tmp_path / "half")
    assert all(relative_error(half[each].float(), again[each]) < 1e-2 for each in again)
    with pytest.raises(ConfigError, match=f"Pickles store patch_tokens alone, and not {', '.join(outputs)}"):
        convert(again, tmp_path / "pickles", "ezhoi", shard_size=1500)
    assert len(FeatureDataset(place)) == 6


def test_the_order_and_the_set_of_outputs_are_the_banks(dataset: Dataset, every: Path, tmp_path: Path) -> None:
    place = tmp_path / "bank"
    extract(dataset, place, config(CLS, GRID, limit=2))
    for other in ((GRID, CLS), (GRID,), (CLS, GRID, "block:1")):
        with pytest.raises(BankError, match=r"outputs: the bank has cls, patch_tokens.*\n.*output cls, output patch_"):
            extract(dataset, place, config(*other))
    assert extract(dataset, place, config()).already_done == 2  # asks for no other ones
    with pytest.raises(BankError, match="output block:1, output cls"):
        extract(dataset, every, config())
    with pytest.raises(ConfigError, match=r"a pickle holds the patch_tokens alone. Add layout shards"):
        extract(dataset, tmp_path / "pickles", config(CLS, layout="ezhoi"))
    extract(dataset, tmp_path / "pickles", config(GRID, layout="ezhoi"))
    assert list(open_bank(tmp_path / "pickles").manifest.outputs) == [GRID]


def test_every_output_is_compared_with_its_image(dataset: Dataset, every: Path) -> None:
    report = verify(every)
    assert report.manifest is not None
    again = recompute(dataset, runner_of(report.manifest, ExtractConfig(device="cpu"), None), report.manifest.input)
    keys = [sample.key for sample in dataset.samples]
    compare_with_pixels(report, keys, 6, again)
    assert len(report.sample) == 6 and report.problems == []
    for name in EVERY:

        def other(key: str, name: str = name) -> dict[str, torch.Tensor]:
            outputs = again(key)
            assert outputs is not None
            return {**outputs, name: outputs[name] * 1.001}

        report = verify(every)
        compare_with_pixels(report, keys, 1, other)
        assert [(each.kind, each.detail) for each in report.problems] == [
            ("pixels", f"relative error 1.0e-03 of {name}")
        ]


def test_conversion_keeps_chosen_outputs(every: Path, tmp_path: Path) -> None:
    patchbank(
        "convert", every, tmp_path / "bank", "--layout", "shards", "--output", REGISTERS, "--output", "block:1", check=0
    )
    bank, source = open_bank(tmp_path / "bank"), open_bank(every)
    assert list(bank.manifest.outputs) == [REGISTERS, "block:1"]
    assert all(
        torch.equal(bank.output(key, name), source.output(key, name)) for key in bank for name in bank.manifest.outputs
    )
    done = patchbank("convert", every, tmp_path / "no", "--layout", "shards", "--output", "sclip", check=2)
    assert "does not store the output 'sclip'" in done.stderr
    assert not (tmp_path / "no").exists()


def test_int8_of_several_outputs_is_of_unrounded_numbers(dataset: Dataset, tmp_path: Path) -> None:
    """The first output is a vector, stored as float16; the tokens' scales are computed from float32 all the same."""
    extract(dataset, tmp_path / "one", config(CLS, "block:1"))
    extract(dataset, tmp_path / "two", config(CLS, "block:1", dtype="int8"))
    convert(open_bank(tmp_path / "one"), tmp_path / "converted", "shards", "int8", shard_size=1500)
    first, second = open_bank(tmp_path / "two"), open_bank(tmp_path / "converted")
    assert all(first.checksum(key) == second.checksum(key) for key in first)
    convert(second, tmp_path / "again", "shards", shard_size=1500)
    assert open_bank(tmp_path / "again").manifest.outputs == first.manifest.outputs
    assert extract(dataset, tmp_path / "two", config_of(first.manifest, config())).already_done == 6


# --- what uses them


def test_info_names_every_output(every: Path) -> None:
    text = patchbank("info", every, check=0).stdout
    for line in (
        r"patch_tokens +\(15, 6\) float32, block 2, norm\n",
        r"block:1:raw +\(15, 6\) float32, block 1\n",
        r"pooled +\(4,\) float32, block 2, head\n",
        r"input +24x40 \(height x width\), patch 8, grid 3 x 5, center-crop",
    ):
        assert re.search(line, text)


def test_pictures_pages_and_training_take_an_output(dataset: Dataset, every: Path, tmp_path: Path) -> None:
    bank = open_bank(every)
    key = next(iter(bank))
    patchbank("show", every, key, "--output", "block:1", "--out", tmp_path / "one.png", check=0)
    patchbank("show", every, key, "--out", tmp_path / "main.png", check=0)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "main.png").read_bytes()
    patchbank("report", every, "--output", "block:2", "-o", tmp_path / "two.html", check=0)
    write_report(bank, tmp_path / "main.html", dataset)
    write_report(bank, tmp_path / "one.html", dataset, output="block:1")
    pages = {name: (tmp_path / f"{name}.html").read_text() for name in ("main", "one", "two")}
    assert ["This page shows <code>block:1</code>" in text for text in pages.values()] == [False, True, False]
    data = {
        name: json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])[0]["levels"]
        for name, text in pages.items()
    }
    assert data["one"] != data["main"] == data["two"]  # block 2 with its norm is what patch tokens are
    for name in EVERY:
        given = FeatureDataset(bank, output=name)
        assert torch.equal(given[0][0], bank.output(given.keys[0], name)) and name in repr(given)


def test_what_needs_a_grid_says_that_there_is_none(dataset: Dataset, tmp_path: Path) -> None:
    extract(dataset, tmp_path / "cls", config(CLS, REGISTERS))
    key = dataset.samples[0].key
    for command in (("show", tmp_path / "cls", key), ("report", tmp_path / "cls")):
        done = patchbank(*command, check=2)
        assert re.fullmatch(
            r"error: The output cls of .* is no grid of patches\. It stores no grid: extract patch_tokens too\.\n",
            done.stderr.replace("\n  ", " "),
        )
    done = patchbank(
        "extract",
        "folder",
        dataset.images,
        "--model",
        "toy/small",
        "--output",
        CLS,
        "--report",
        "--out",
        tmp_path / "no",
        check=2,
    )
    assert "--report shows a grid of patches: add --output patch_tokens" in done.stderr
    assert not (tmp_path / "no").exists()
    write_sample(tmp_path / "root")
    pairs = load_dataset("hicodet", tmp_path / "root", "train")
    extract(pairs, tmp_path / "pairs", config(CLS, "block:1", layout="shards"))
    with pytest.raises(BankError, match=r"cls of .* is no grid"):
        FeatureDataset(tmp_path / "pairs", pairs, "union")
    given = FeatureDataset(tmp_path / "pairs", pairs, "union", output="block:1")
    assert given[0][1].regions["union"].shape[1] == 6  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"patch tokens \(15, D\) can be flipped, not \(6,\)"):
        horizontal_flip(*FeatureDataset(tmp_path / "pairs", pairs)[0])  # type: ignore[arg-type]


# --- other sizes, and pooled grids


@pytest.fixture(scope="module", params=[{"input_size": (48, 32)}, {"pool_grid": 2, "input_size": (64, 96)}])
def sized(request: pytest.FixtureRequest) -> dict[str, Any]:
    options: dict[str, Any] = request.param
    return options


def grid_of(options: dict[str, Any]) -> tuple[int, int]:
    h, w = options["input_size"]
    side = 8 * options.get("pool_grid", 1)
    return h // side, w // side


def test_sizes_and_pooled_grids_in_a_bank(dataset: Dataset, sized: dict[str, Any], tmp_path: Path) -> None:
    place, (rows, columns) = tmp_path / "bank", grid_of(sized)
    extract(dataset, place, config(CLS, GRID, "block:1:raw", **sized))
    bank = open_bank(place)
    assert bank.manifest.grid == (rows, columns) and bank.manifest.shape == (rows * columns, 6)
    side = sized.get("pool_grid", 1)
    for key in bank:
        wanted = expected(dataset, key, output=(CLS, GRID, "block:1:raw"), **sized)
        assert relative_error(bank.cls(key), wanted[CLS]) <= 2e-6
        for name in (GRID, "block:1:raw"):
            patches = wanted[name].view(rows * side, columns * side, 6)
            means = [  # of each square
                patches[row : row + side, column : column + side].flatten(0, 1).double().mean(0)
                for row in range(0, rows * side, side)
                for column in range(0, columns * side, side)
            ]
            assert relative_error(bank.output(key, name).double(), torch.stack(means)) <= 2e-6
        assert patchbank_reader.open_bank(place).grid(key).shape == bank.grid(key).shape == (rows, columns, 6)
        assert bank.transform(key).grid == (rows, columns)
    options = ["--input-size", "{}x{}".format(*sized["input_size"])]
    with pytest.raises(BankError, match=f"(?s)input size: the bank has .*input_size {options[1]}"):
        extract(dataset, place, config(CLS, GRID, "block:1:raw"))
    if side > 1:
        with pytest.raises(BankError, match=r"input pool: the bank has 2, this run 1(.*\n)+.*pool_grid 2"):
            extract(dataset, place, config(CLS, GRID, "block:1:raw", input_size=sized["input_size"]))
        options += ["--pool-grid", str(side)]
    done = patchbank("verify", place, "--images", dataset.images, "--sample", 6, "--json", check=0)
    assert len(json.loads(done.stdout)["sample"]) == 6
    command = ("extract", "folder", dataset.images, "--model", "toy/small", "--batch-size", 2, "--shard-size", 1500)
    outputs = [word for name in (CLS, GRID, "block:1:raw") for word in ("--output", name)]
    patchbank(*command, *options, *outputs, "--device", "cpu", "--out", tmp_path / "again", check=0)
    assert contents(tmp_path / "again") == contents(place)
    assert f"grid {rows} x {columns}" in patchbank("info", place, check=0).stdout


def test_pickles_of_other_sizes_are_imported(dataset: Dataset, sized: dict[str, Any], tmp_path: Path) -> None:
    """Of a grid that is not square, with [CLS] left in."""
    extract(dataset, tmp_path / "bank", config(**sized, layout="ezhoi"))
    bank, pickles = open_bank(tmp_path / "bank"), tmp_path / "pickles"
    pickles.mkdir()
    for key in bank:
        torch_pickle = torch.cat([torch.zeros(1, 6) + 3, bank[key]])
        (pickles / pickle_name(key)).write_bytes(pickle.dumps(torch_pickle))
    size = "{}x{}".format(*sized["input_size"])
    options = ("--model", "toy/small", "--images", dataset.images, "--device", "cpu", "--sample", 3)
    patchbank("import", pickles, tmp_path / "no", *options, check=2)
    options += ("--input-size", size, "--pool-grid", sized.get("pool_grid", 1))
    patchbank("import", pickles, tmp_path / "new", *options, check=0)
    imported = open_bank(tmp_path / "new")
    assert imported.manifest.input == bank.manifest.input
    assert all(torch.equal(imported[key], bank[key]) for key in bank)


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
def test_regions_of_such_grids_are_where_nested_loops_pool_them(
    dataset: Dataset, sized: dict[str, Any], mode: Any, tmp_path: Path
) -> None:
    extract(dataset, tmp_path, config(**sized, resize=mode))
    bank = open_bank(tmp_path)
    for key in bank:
        transform, grid = bank.transform(key), bank.grid(key).double().numpy()
        boxes = torch.tensor([[5.0, 4, 60, 25], [-9, -9, 200, 200], [30, 2, 33, 30], [70, 10, 90, 31]])
        loops = np.stack([reference.pooled(grid, box, transform, 7) for box in boxes.double().numpy()])
        assert np.abs(pool_regions(bank[key], boxes, transform).numpy() - loops.mean((2, 3))).max() <= 1e-5
        height, width = sized["input_size"]
        corner = transform.points_from_grid([bank.manifest.grid[1], bank.manifest.grid[0]])
        assert transform.points_to_input(corner).tolist() == pytest.approx([width, height])


def test_pictures_pages_and_training_of_such_grids(sized: dict[str, Any], tmp_path: Path) -> None:
    rows, columns = grid_of(sized)
    write_sample(tmp_path / "root")
    dataset = load_dataset("hicodet", tmp_path / "root", "train")
    extract(dataset, tmp_path / "bank", config(**sized))
    bank = open_bank(tmp_path / "bank")
    key = next(key for key in bank if len(dataset.target(key)))
    transform = bank.transform(key)
    x1, y1, x2, y2 = transform.boxes_from_grid([0, 0, columns, rows]).tolist()
    figure = show_features(bank, key, dataset=dataset).figure
    maps = [image for axes in figure.axes for image in axes.images if image.get_array().shape[:2] == (rows, columns)]
    assert len(maps) >= 2
    assert all(image.get_extent() == pytest.approx([x1, x2, y2, y1]) for image in maps)
    write_report(bank, tmp_path / "page.html", dataset)
    [data] = re.findall(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(), re.DOTALL)
    for image in json.loads(data):
        assert image["grid"] == [rows, columns] and image["boxError"] < 0.1 if "boxError" in image else True
    assert f"<dd>{rows} x {columns}" in (tmp_path / "page.html").read_text()
    plain = FeatureDataset(bank, dataset, "union")
    turned = FeatureDataset(bank, dataset, "union", transform=horizontal_flip)
    for (tokens, target), (flipped, mirrored) in ((plain[index], turned[index]) for index in range(len(plain))):
        assert torch.equal(flipped.view(rows, columns, 6), tokens.view(rows, columns, 6).flip(1))
        assert torch.allclose(mirrored.regions["union"], target.regions["union"], atol=1e-5)  # type: ignore[union-attr]


def test_names_plans_and_measures_of_such_grids(sized: dict[str, Any], tmp_path: Path) -> None:
    write_sample(tmp_path / "root")
    options = ["--model", "toy/small", "--batch-size", 2, "--device", "cpu"]
    options += ["--input-size", "{}x{}".format(*sized["input_size"]), "--pool-grid", sized.get("pool_grid", 1)]
    run = ("extract", "hicodet", "--root", tmp_path / "root", "--split", "train", *options)
    patchbank(*run, check=0)
    [place] = (tmp_path / "root/hicodet_pkl_files").iterdir()
    pool = "_pool2" if "pool_grid" in sized else ""
    assert place.name == "toy-small_img_hicodet_train_{}x{}".format(*sized["input_size"]) + pool
    assert open_bank(place).manifest.shape == (np.prod(grid_of(sized)), 6)
    found = patchbank("doctor", "--root", tmp_path / "root", *options, "--json", check=0)
    assert (
        next(each for each in json.loads(found.stdout)["findings"] if each["what"] == place.name)["data"]["done"] == 7
    )
    images = tmp_path / "root/hicodet/hico_20160224_det/images/train2015"
    measured = patchbank("bench", *options, "--images", images, "--limit", 2, "--json", check=0)
    assert {each["stage"] for each in json.loads(measured.stdout)["measures"]} >= {"encode", "end to end"}
    assert ExtractConfig(input_size=(448, 448), dtype="float16").variant == "_448_float16"


def test_pooled_tokens_take_no_larger_batches(dataset: Dataset) -> None:
    """The encoder computes every patch; only what it gives is pooled."""
    spec = toy(input_size=(64, 96), pool_grid=2)
    assert spec.input.patches == (8, 12) and spec.input.grid == (4, 6)
    runner = Runner(spec, torch.device("cpu"))
    found = runner(torch.zeros(3, 64, 96, 3, dtype=torch.uint8))
    assert {name: tuple(value.shape) for name, value in found.items()} == {CLS: (3, 6), GRID: (3, 24, 6)}


# --- OpenAI's family


def test_a_dense_variant_alone_of_clip(
    dataset: Dataset, tiny_config: ExtractConfig, tiny_weights: Path, tmp_path: Path
) -> None:
    """A variant is the main output, in the space of [CLS]; with another size of the input, and a pooled grid."""
    asked = ("maskclip", CLS, "block:1:raw")
    made = replace(tiny_config, output=asked, input_size=(48, 32), pool_grid=2, layout="shards")
    extract(dataset, tmp_path / "bank", made)
    bank = open_bank(tmp_path / "bank")
    assert bank.manifest.main == "maskclip" and bank.manifest.grids == ["maskclip", "block:1:raw"]
    assert bank.manifest.shape == (6, 32) and bank.manifest.outputs["block:1:raw"].shape == (6, 64)
    named = ("--images", dataset.images, "--weights", tiny_weights)
    done = patchbank("verify", bank.path, *named, "--sample", 6, "--json", check=0)
    assert max(json.loads(done.stdout)["sample"].values()) <= 2e-6
    convert(bank, tmp_path / "reduced", "shards", shard_size=2000, components=8)
    reduced = open_bank(tmp_path / "reduced")
    assert reduced.manifest.reduction is not None and reduced.manifest.reduction.outputs == ("maskclip", CLS)
    for each in (bank.path, reduced.path):
        patchbank("show", each, next(iter(bank)), "--images", dataset.images, "--out", tmp_path / "one.png", check=0)
        patchbank("report", each, "--images", dataset.images, "-o", tmp_path / "page.html", check=0)
        assert "This page shows <code>maskclip</code>" in (tmp_path / "page.html").read_text()
        text = patchbank("info", each, check=0).stdout
        assert re.search(r"maskclip +\((6, 32|6, 8)\) float32, block 2, ln_post, proj, maskclip\n", text)
        assert re.search(r"input +48x32 \(height x width\), patch 8, the mean of each 2 x 2 of them, grid 3 x 2", text)
    done = patchbank("verify", reduced.path, *named, "--sample", 6, "--json", check=0)
    assert max(json.loads(done.stdout)["sample"].values()) <= 2e-6
