"""Statistics by class: against plain loops and numpy, in the library and as a process."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from patchbank import ExtractConfig, extract, load_dataset, open_bank, region_statistics, statistics
from patchbank.bank.payload import Feature
from patchbank.bank.reader import Bank
from patchbank.bank.writer import BankWriter
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.classes import ACTIONS, OBJECTS, VERBS
from patchbank.errors import BankError, ConfigError
from patchbank.features import Output
from patchbank.regions import Region
from tests.support import pairs_root, patchbank, patchbank_process, tiny_manifest

SIZES = {"verb": 117, "object": 80, "hoi": 600}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> Path:
    root = pairs_root(tmp_path_factory.mktemp("pairs"))
    dataset = load_dataset("hicodet", root, "train")
    extract(annotated_pairs(dataset), root / "bank", replace(tiny_config, layout=None, output=("patch_tokens", "cls")))
    extract(dataset, root / "images", replace(tiny_config, layout="shards", output=("patch_tokens",)))
    return root


def many(place: Path, count: int = 400, dataset: str = "vcoco") -> Bank:
    """A bank of made-up pairs of five verbs, far from zero; two images each have several."""
    made = tiny_manifest("shards")
    outputs = {"cls": Output(shape=(6,), dtype="float32", block=2)}
    made = replace(made, dataset=dataset, split="train", outputs=outputs, input=replace(made.input, cut="pad"))
    generator = torch.Generator().manual_seed(3)
    features = []
    for number in range(count):
        image, pair = f"{number // 3}.jpg", number % 3
        verb = int(torch.randint(5, (), generator=generator)) * 4
        regions = {"human": Region(None, 0), "object": Region(None, 7), "union": Region(None, 7, None, verb)}
        for name, region in regions.items():
            values = torch.randn(6, generator=generator) * torch.arange(1, 7) + 100 + verb
            features.append(Feature(f"{image}#{name}-{pair}", {"cls": values}, (20, 10), region))
    with BankWriter(place, made, [each.key for each in features]) as writer:
        writer.add(features, [])
    return open_bank(place)


@pytest.mark.parametrize(
    "region", [Region(None, 7, None, 2**50), Region(None, 2**50, None, 1), Region(None, 7, None, 1, 4096)]
)
def test_numbers_that_are_no_classes_take_no_memory(tmp_path: Path, region: Region) -> None:
    old = many(tmp_path / "old", 3)
    with BankWriter(tmp_path / "new", old.manifest, ["a.jpg#union-0"]) as writer:
        writer.add([Feature("a.jpg#union-0", {"cls": torch.ones(6)}, (20, 10), region)], [])
    with pytest.raises(BankError, match=r"has pairs of class \d+: statistics are of 4,096 classes at most"):
        region_statistics(tmp_path / "new")


def rows_by_class(bank: Bank, kind: str, of: str) -> dict[int, np.ndarray]:  # type: ignore[type-arg]
    """The features of each class, by a plain loop over the unions."""
    found = defaultdict(list)
    for key in bank:
        image, _, name = key.rpartition("#")
        region = bank.region(key)
        wanted = f"{image}#{of}-{name.partition('-')[2]}"
        if name.startswith("union-") and wanted in bank and region is not None:
            number = {"verb": region.verb, "object": region.label, "hoi": region.hoi}[kind]
            if number is not None:
                found[number].append(bank.output(wanted, "cls").double().numpy())
    return {number: np.stack(rows) for number, rows in found.items()}


@pytest.mark.parametrize("of", [None, "human", "object", "union"])
def test_they_are_numpys(root: Path, of: str | None) -> None:
    bank = open_bank(root / "bank")
    made = region_statistics(root / "bank", of=of, covariance=True, output="cls")
    assert list(made) == ["verb", "object", "hoi"]
    for kind, found in made.items():
        assert found.of == (of or ("object" if kind == "object" else "union"))
        expected = rows_by_class(bank, kind, found.of)
        assert found.covariance is not None
        assert (found.count.dtype, found.mean.dtype, found.covariance.dtype) == (
            torch.int64,
            torch.float32,
            torch.float32,
        )
        assert found.mean.shape == (SIZES[kind], 32) and found.covariance.shape == (SIZES[kind], 32, 32)
        for number in range(SIZES[kind]):
            rows = expected.get(number, np.zeros((0, 32)))
            assert found.count[number] == len(rows)
            mean = rows.mean(0) if len(rows) else np.zeros(32)
            np.testing.assert_allclose(found.mean[number], mean, rtol=1e-6)
            covariance = np.cov(rows.T) if len(rows) > 1 else np.zeros((32, 32))
            np.testing.assert_allclose(found.covariance[number], covariance, rtol=1e-5, atol=1e-9)
    assert (int(made["verb"].count.sum()), made["verb"].names, made["object"].names) == (
        9 - 2 * (of == "object"),
        VERBS,
        OBJECTS,
    )
    assert made["hoi"].names[145] == "race motorcycle" and made["hoi"].names[0] == ""


@pytest.mark.parametrize("together", [1, 7, 16384])
def test_blocks_and_threads_change_nothing(tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_TOGETHER", together)
    bank, calls = many(tmp_path / "bank"), []
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            region_statistics(bank, "verb", covariance=True, progress=lambda *done: calls.append(done))["verb"]
        )
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    one, other = results
    assert one.covariance is not None and other.covariance is not None
    assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)
    assert calls[-1] == (134, 134)
    expected = rows_by_class(bank, "verb", "union")
    assert sorted(expected) == [0, 4, 8, 12, 16] and one.names == ACTIONS and len(one.count) == 24
    for number, rows in expected.items():
        np.testing.assert_allclose(one.mean[number], rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(one.covariance[number], np.cov(rows.T), rtol=1e-5, atol=1e-5)


def test_normalised(tmp_path: Path) -> None:
    bank = many(tmp_path / "bank", 60)
    found = region_statistics(bank, ["verb"], of="human", covariance=True, normalise=True)["verb"]
    assert found.covariance is not None
    for number, rows in rows_by_class(bank, "verb", "human").items():
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(found.mean[number], rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.covariance[number], np.cov(rows.T), rtol=1e-4, atol=1e-9)


def test_what_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = many(tmp_path / "bank", 9)
    assert list(region_statistics(bank)) == ["verb", "object"]  # V-COCO has no hoi classes
    with pytest.raises(BankError, match=r"have no hoi classes: leave hoi out"):
        region_statistics(bank, "hoi")
    with pytest.raises(ConfigError, match=r"no classes 'noun'. Choose from: verb, object, hoi"):
        region_statistics(bank, "noun")
    with pytest.raises(ConfigError, match=r"no region 'image'. Choose from: human, object, union"):
        region_statistics(bank, of="image")
    with pytest.raises(BankError, match=r"images stores patch_tokens"):
        region_statistics(root / "images")
    with pytest.raises(BankError, match=r"are of vectors, and .*bank stores patch_tokens, cls"):
        region_statistics(root / "bank", output="patch_tokens")
    monkeypatch.setattr(statistics, "_MOST", 8 * 32**2 * 700)
    with pytest.raises(ConfigError, match=r"covariances of verb, object, hoi take 6.5 MB, and at most 5.7 MB are"):
        region_statistics(root / "bank", covariance=True)
    assert region_statistics(root / "bank", ["hoi"], covariance=True)["hoi"].covariance is not None
    made = tiny_manifest("shards")
    with BankWriter(tmp_path / "boxes", replace(made, input=replace(made.input, cut="squash")), ["a#box-0"]) as writer:
        outputs = {name: torch.ones(each.shape) for name, each in made.outputs.items()}
        writer.add([Feature("a#box-0", outputs, (9, 9), Region(None, 3))], [])
    with pytest.raises(BankError, match=r"boxes holds no annotated pairs: `patchbank extract pairs`"):
        region_statistics(tmp_path / "boxes")


def test_the_command(root: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "a.pt")]
    for file in files:
        done = patchbank_process("stats", root / "bank", "--covariance", "--output", "cls", "-o", file, check=0)
        assert "verb: 9 pairs of 3 of 117 classes, by union" in done.stdout
    assert files[0].read_bytes() == files[1].read_bytes()
    expected = region_statistics(root / "bank", covariance=True, output="cls")
    loaded = torch.load(files[2], weights_only=True)
    with safe_open(files[0], "pt") as file:
        about = json.loads(file.metadata()["patchbank"])
        assert json.loads(loaded.pop("patchbank")) == about
        assert about["verb"] == {"of": "union", "names": list(VERBS)} and about["model"] == "tiny"
        assert sorted(file.keys()) == sorted(loaded)
        for kind, each in expected.items():
            for name in ("count", "mean", "covariance"):
                assert torch.equal(file.get_tensor(f"{kind}.{name}"), getattr(each, name))
                assert torch.equal(loaded[f"{kind}.{name}"], getattr(each, name))
    done = patchbank("stats", root / "bank", "--by", "object", "--of", "human", "--output", "cls", "--json", check=0)
    said = json.loads(done.stdout)
    assert said["file"] is None and list(said) == ["bank", "file", "object", "note"] and said["object"]["of"] == "human"
    assert (
        said["object"]["count"] == region_statistics(root / "bank", of="human", output="cls")["object"].count.tolist()
    )
    patchbank("stats", root / "bank", "--output", "cls", "-o", files[0], check=0)  # its own file is replaced
    (tmp_path / "other.pt").write_bytes(b"numbers")
    done = patchbank("stats", root / "bank", "-o", tmp_path / "other.pt", check=2)
    assert "other.pt is there, and is not a file of `patchbank stats`" in done.stderr
    done = patchbank("stats", root / "bank", "-o", tmp_path / "x.npz", check=2)
    assert "x.npz: the file must end in .safetensors or .pt" in done.stderr
    done = patchbank("stats", root / "images", check=2)
    assert "error: Statistics are of vectors" in done.stderr
