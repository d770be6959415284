"""FeatureDataset over a bank of annotated pairs: crops beside the targets that they belong to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from patchbank import (
    Dataset,
    ExtractConfig,
    FeatureDataset,
    HOITarget,
    RandomHorizontalFlip,
    collate,
    extract,
    horizontal_flip,
    load_dataset,
    open_bank,
)
from patchbank.datasets.boxes import annotated_pairs
from patchbank.errors import BankError, ConfigError, DatasetError
from tests.support import pairs_root

KINDS = ("human", "object", "union")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> Path:
    root = pairs_root(tmp_path_factory.mktemp("pairs"))
    dataset = load_dataset("hicodet", root, "train")
    extract(annotated_pairs(dataset), root / "bank", replace(tiny_config, layout=None, output=("cls", "patch_tokens")))
    extract(dataset, root / "images", tiny_config)
    return root


@pytest.fixture
def dataset(root: Path) -> Dataset:
    return load_dataset("hicodet", root, "train")


def crops(root: Path, dataset: Dataset | None, **options: Any) -> FeatureDataset:
    return FeatureDataset(root / "bank", dataset, features="crops", **{"output": "cls", **options})


def test_every_pair_has_its_crops(root: Path, dataset: Dataset) -> None:
    bank = open_bank(root / "bank")
    samples = crops(root, dataset, missing="skip")
    assert samples.keys == ["z.jpg", "b.jpg", "m.jpg", "a.jpg"]
    kept = {"z.jpg": [0, 1, 2], "b.jpg": [1, 2], "m.jpg": [0], "a.jpg": [0]}  # without the two boxes of no area
    for index, key in enumerate(samples.keys):
        feature, target = samples[index]
        assert isinstance(target, HOITarget)
        assert torch.equal(feature, bank.cls(f"{key}#image"))
        whole = dataset.target(key)
        assert torch.equal(target.boxes_o, whole.boxes_o[kept[key]]) and torch.equal(target.verb, whole.verb[kept[key]])
        assert (target.size, target.transform, list(target.regions)) == ((120, 90), None, list(KINDS))
        for kind in KINDS:
            expected = [bank.cls(f"{key}#{kind}-{number}") for number in kept[key]]
            assert torch.equal(target.regions[kind], torch.stack(expected))
    union = crops(root, dataset, missing="skip", regions="union", output="patch_tokens", dtype=torch.float64)
    feature, target = union[1]
    assert isinstance(target, HOITarget) and list(target.regions) == ["union"]
    assert len(target) == 3  # the union of a box without area exists
    assert target.regions["union"].shape == (3, 16, 32) and target.regions["union"].dtype == torch.float64


def test_pairs_of_some_classes_keep_their_crops(root: Path, dataset: Dataset) -> None:
    bank = open_bank(root / "bank")
    some = dataset.without_hois([145]).without_hois([9])  # of verbs 72 and 4
    samples = crops(root, some, missing="skip")
    assert samples.keys == ["b.jpg"] or samples.keys == ["b.jpg", "m.jpg"]
    for index, key in enumerate(samples.keys):
        _, target = samples[index]
        assert isinstance(target, HOITarget)
        assert target.verb.tolist() == [8]
        number = {"b.jpg": 2, "m.jpg": 0}[key]
        assert torch.equal(target.regions["human"][0], bank.cls(f"{key}#human-{number}"))


def test_a_bank_of_some_pairs(root: Path, dataset: Dataset, tmp_path: Path, tiny_config: ExtractConfig) -> None:
    some = dataset.without_hois([145])
    extract(annotated_pairs(some), tmp_path / "bank", replace(tiny_config, layout=None))
    bank = open_bank(tmp_path / "bank")
    assert "b.jpg#union-2" in bank and "b.jpg#union-1" not in bank
    samples = FeatureDataset(bank, some, features="crops", missing="skip")
    _, target = samples[samples.keys.index("b.jpg")]
    assert isinstance(target, HOITarget) and torch.equal(target.regions["union"][0], bank["b.jpg#union-2"])
    with pytest.raises(DatasetError, match=r"lacks 14 of the 31 crops of hicodet train, z.jpg#human-0 for one"):
        FeatureDataset(bank, dataset, features="crops")


@pytest.mark.parametrize("method", ["fork", "spawn", None])
def test_data_loaders(root: Path, dataset: Dataset, method: str | None) -> None:
    samples = crops(root, dataset, missing="skip")
    options: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": method} if method else {}
    seen: list[str] = []
    for features, targets in DataLoader(samples, 3, collate_fn=collate, **options):
        assert features.shape == (len(targets), 32)
        for feature, target in zip(features, targets, strict=True):
            alone, expected = samples[len(seen)]
            assert torch.equal(feature, alone) and isinstance(expected, HOITarget)
            assert all(torch.equal(target.regions[kind], expected.regions[kind]) for kind in KINDS)
            seen.append(target.key)
    assert seen == samples.keys


def test_what_is_refused(root: Path, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"lacks 2 of the 31 crops of hicodet train, b.jpg#object-0 \(the box"):
        crops(root, dataset)
    with pytest.raises(BankError, match=r"images holds features of whole images, and not of regions"):
        FeatureDataset(root / "images", dataset, features="crops")
    with pytest.raises(ConfigError, match=r'bank holds features of regions: pass features="crops"'):
        FeatureDataset(root / "bank", dataset)
    with pytest.raises(ConfigError, match=r"crops are the boxes of annotated pairs: give a dataset"):
        crops(root, None)
    with pytest.raises(ConfigError, match=r"features is image or crops, not 'boxes'"):
        FeatureDataset(root / "bank", dataset, features="boxes")  # type: ignore[arg-type]
    for flip in (horizontal_flip, RandomHorizontalFlip()):
        with pytest.raises(ConfigError, match=r"crops cannot be flipped"):
            crops(root, dataset, transform=flip)
    wrapped = crops(root, dataset, missing="skip", transform=lambda *sample: horizontal_flip(*sample))
    with pytest.raises(ValueError, match="has no transform, without which its boxes cannot be flipped"):
        wrapped[0]
    listed = json.loads((root / "hicodet/trainval_hico.json").read_text())
    listed[2]["annotations"][5]["bbox"][0] += 1
    (tmp_path / "list.json").write_text(json.dumps(listed))
    other = load_dataset("hicodet", root, "train", annotations=tmp_path / "list.json")
    with pytest.raises(DatasetError, match=r"bank holds other pairs than .*list.json lists: m.jpg#object-0 is Region"):
        crops(root, other, missing="skip")
    apart = load_dataset("hicodet", root, "train").of([])
    assert len(crops(root, apart, missing="skip")) == 0
