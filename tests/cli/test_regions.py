"""Commands on a bank of annotated pairs: what they compare, complete, convert and refuse, and what they count."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchbank import ExtractConfig, RegionFeatures, extract, load_dataset, open_bank, open_regions
from patchbank.bank import patchbank_reader
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.datasets.boxes import annotated_pairs
from patchbank.regions import Region
from tests.bank.test_check import damage_numbers
from tests.support import pairs_root, parts_in, patchbank, patchbank_process, tiny_manifest

SHARD = 7 * 4 * 32 * 17  # bytes of seven regions' [CLS] and grid


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A root with pairs, and their bank, made by the command."""
    root = pairs_root(tmp_path_factory.mktemp("pairs"))
    options = ["--output", "cls", "--output", "patch_tokens", "--shard-size", SHARD, "--weights", tiny_weights]
    done = patchbank("extract", "pairs", "hicodet", "--root", root, "--out", root / "bank", "--model", "tiny", *options)
    assert "29 features written" in done.stdout and "regions/s for" in done.stdout
    assert "failed: b.jpg#object-0: the box (9, 9, 9, 30) has no area" in done.stdout
    assert "hicodet train, tiny: 31 regions to do" in done.stderr and "31/31 regions" in done.stderr
    assert (done.returncode, "images" in done.stdout.replace("images/", "")) == (1, False)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def same(one: RegionFeatures, other: RegionFeatures, tolerance: float = 0.0) -> bool:
    names = ("boxes", "labels", "visible", "verbs", "hois")
    return (
        (one.key, one.names, one.size, one.failures) == (other.key, other.names, other.size, other.failures)
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
        and all(
            torch.allclose(one.features[name].float(), value.float(), rtol=tolerance, atol=tolerance)
            for name, value in other.features.items()
        )
    )


def test_a_dry_run_and_info_count_regions(root: Path, tiny_weights: Path) -> None:
    options = ["--root", root, "--out", root / "new", "--model", "tiny", "--weights", tiny_weights]
    done = patchbank("extract", "pairs", "hicodet", *options, "--dry-run", check=0)
    assert "tiny, 31 regions, 0 done, 31 to do" in done.stdout
    done = patchbank("extract", "pairs", "hicodet", *options, "--report", check=2)
    assert "No such option: --report" in done.stderr
    done = patchbank("info", root / "bank", "--root", root, check=0)
    assert "of 4 images, cut out with pad; patchbank.open_regions reads them image by image" in done.stdout
    assert "coverage        29 of 31 regions, 2 failed" in done.stdout


def test_verify_compares_with_the_annotated_pairs(root: Path, tiny_weights: Path) -> None:
    list_ = root / "hicodet/trainval_hico.json"
    done = patchbank_process("verify", root / "bank", "--root", root, "--sample", 5, "--weights", tiny_weights, check=1)
    assert f"compared with the 31 regions that {list_} lists" in done.stdout
    assert "5 extracted again from their images: relative error at most" in done.stdout
    assert "2 of 31 have problems" in done.stdout and "Verifying bank: 29 regions to do" in done.stderr
    parts_in(root / "bank")[1].unlink()
    report = json.loads(patchbank("verify", root / "bank", "--root", root, "--json", check=1).stdout)
    assert report["counts"] == {"missing": 7, "failed": 1} and report["listed"] == 31
    assert {"z.jpg#human-2", "b.jpg#image"} <= {each["name"] for each in report["findings"]}
    # A bank in a checkout finds the list there.
    inside = root / "hicodet_shards/pairs"
    shutil.move(root / "bank", inside)
    assert "compared with the 31 regions" in patchbank("verify", inside, check=1).stdout


def test_repair_extracts_what_is_missing(made: Path, root: Path, tiny_weights: Path) -> None:
    first, second, *_ = parts_in(root / "bank")
    second.unlink()
    damage_numbers(first)
    done = patchbank("repair", root / "bank", "--root", root, check=1)
    assert "to extract: 9 regions" in done.stdout  # seven of a shard, a damaged one, and one that fails
    assert f"patchbank repair {root / 'bank'} --extract --split train --root {root}" in done.stdout
    options = ["--root", root, "--weights", tiny_weights]
    done = patchbank_process("repair", root / "bank", "--extract", *options, check=1)
    assert "7 features written" in done.stdout and "failed: a.jpg#object-1: the box" in done.stdout
    whole, expected = open_regions(root / "bank"), open_regions(made / "bank")
    assert list(whole) == ["z.jpg", "b.jpg", "m.jpg", "a.jpg"]
    assert all(same(whole[key], expected[key]) for key in expected)


def test_another_list_is_not_the_banks(root: Path) -> None:
    listed = json.loads((root / "hicodet/trainval_hico.json").read_text())
    listed[2]["annotations"][5]["bbox"][0] += 1
    (root / "other.json").write_text(json.dumps(listed))
    options = ["--root", root, "--annotations", root / "other.json"]
    done = patchbank("verify", root / "bank", *options, check=2)
    assert "holds other regions than the annotated pairs in" in done.stderr and "other.json" in done.stderr
    inside = root / "hicodet_shards/pairs"
    shutil.move(root / "bank", inside)
    shutil.move(root / "other.json", root / "hicodet/trainval_hico.json")
    done = patchbank("verify", inside, check=1)
    assert "not compared with a list of regions" in done.stdout


def test_boxes_that_nothing_lists(tmp_path: Path) -> None:
    for cut, message in (
        ("pad", "--sample needs the images"),
        ("grid", "--sample encodes images, and .* was pooled from a bank of them. `patchbank extract regions`"),
    ):
        made = tiny_manifest("shards")
        made = replace(made, input=replace(made.input, cut=cut))
        with BankWriter(tmp_path / cut, made, ["a.jpg#box-0"]) as writer:
            values = {name: torch.randn(each.shape) for name, each in made.outputs.items()}
            writer.add([Feature("a.jpg#box-0", values, (9, 9), Region((0, 0, 9, 9), 3, 0.5))], [])
        assert "not compared with a list of regions" in patchbank("verify", tmp_path / cut, check=0).stdout
        done = patchbank("verify", tmp_path / cut, "--sample", 1, "--images", tmp_path, check=2)
        assert message.partition(".*")[0].strip() in done.stderr


def test_pictures_are_of_images(root: Path) -> None:
    for command in (["report", root / "bank"], ["show", root / "bank", "z.jpg#image"]):
        done = patchbank(*command, check=2)
        assert "bank holds features of regions, and pictures show whole images" in done.stderr
    bank = open_bank(root / "bank")
    assert bank.transform("z.jpg#image").width == 120
    with pytest.raises(Exception, match=r"'z.jpg#human-0' was cut out of its image"):
        bank.transform("z.jpg#human-0")


def test_conversions_keep_the_regions(root: Path) -> None:
    bank = root / "bank"
    expected = open_regions(bank)
    done = patchbank("convert", bank, root / "half", "--dtype", "float16", "--shard-size", 2 * SHARD, check=0)
    assert "29 features written" in done.stdout and "Converting bank: 31 regions to do" in done.stderr
    half = open_regions(root / "half")
    assert list(half) == list(expected) and all(same(half[key], expected[key], 1e-3) for key in expected)
    patchbank("convert", bank, root / "again", "--shard-size", SHARD, check=0)
    again = open_regions(root / "again")
    assert all(same(again[key], expected[key]) for key in expected)
    patchbank("convert", bank, root / "int8", "--dtype", "int8", "--output", "patch_tokens", check=0)
    int8 = open_regions(root / "int8")
    assert list(int8["z.jpg"].features) == ["patch_tokens"]
    assert torch.equal(int8["z.jpg"].features["patch_tokens"][3], int8.bank["z.jpg#union-0"])
    patchbank("convert", bank, root / "cls", "--output", "cls", check=0)
    patchbank("convert", root / "cls", root / "few", "--pca", 5, check=0)
    few = open_regions(root / "few")
    for key, value in expected.items():
        assert few[key].names == value.names
        projected = few.bank.project(value.features["cls"])
        assert torch.allclose(few[key].features["cls"], projected, atol=1e-5)
    done = patchbank("convert", bank, root / "pickles", "--layout", "ezhoi", check=2)
    assert "Pickles are EZ-HOI's, of whole images: use --layout shards for regions" in done.stderr
    assert not (root / "pickles").exists()


def test_the_reader_of_one_file(root: Path) -> None:
    bank, reader = open_bank(root / "bank"), patchbank_reader.open_bank(root / "bank")
    assert list(reader) == list(bank) and reader.failures == bank.failures
    for key in bank:
        assert torch.equal(reader.output(key, "cls"), bank.cls(key))
        region = bank.region(key)
        assert region is not None
        found = reader.region(key)
        assert found == {**region._asdict(), "box": list(region.box) if region.box else None}
        assert reader.size(key) == bank.size(key) == (120, 90)


def test_vcoco_has_no_hoi_classes(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    from patchbank.datasets.example import write_sample

    write_sample(tmp_path)
    dataset = load_dataset("vcoco", tmp_path, "val")
    extract(annotated_pairs(dataset), tmp_path / "bank", replace(tiny_config, layout=None))
    assert "compared with" in patchbank("verify", tmp_path / "bank", "--root", tmp_path, check=0).stdout
    for key, value in open_regions(tmp_path / "bank").items():
        assert (value.hois == -1).all()
        assert torch.equal(value.pair_classes()["verb"], dataset.target(key).verb)
    done = patchbank("stats", tmp_path / "bank", check=0)
    assert "verb:" in done.stdout and "of 24 classes" in done.stdout and "hoi" not in done.stdout
