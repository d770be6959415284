"""FeatureDataset: features with their pairs, through real DataLoaders, from either layout."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from patchbank import (
    Dataset,
    ExtractConfig,
    FeatureDataset,
    RandomHorizontalFlip,
    collate,
    extract,
    horizontal_flip,
    load_dataset,
    open_bank,
    pool_regions,
    union_boxes,
)
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.datasets.example import write_sample
from patchbank.errors import BankError, ConfigError, DatasetError
from patchbank.features import CLS, GRID
from tests.support import tiny_manifest

LAYOUTS = ["ezhoi", "shards"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """The demo's EZ-HOI root, with squashed banks of the tiny model in both layouts."""
    root = tmp_path_factory.mktemp("root")
    write_sample(root / "root")
    for layout in LAYOUTS:
        for name, split in (("hicodet", "train"), ("hicodet", "test"), ("vcoco", "val")):
            config = ExtractConfig(
                model="tiny",
                weights=tiny_weights,
                layout=layout,  # type: ignore[arg-type]
                resize="squash",
                dtype="float32" if layout == "ezhoi" else "float16",
            )
            extract(load_dataset(name, root / "root", split), root / f"{layout}_{name}_{split}", config)
    return root


@pytest.fixture
def dataset(root: Path) -> Dataset:
    return load_dataset("hicodet", root / "root", "train")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_and_targets(root: Path, dataset: Dataset, layout: str) -> None:
    samples = FeatureDataset(root / f"{layout}_hicodet_train", dataset)
    assert len(samples) == len(dataset) == 7
    bank = open_bank(root / f"{layout}_hicodet_train")
    for index, sample in enumerate(dataset.samples):
        tokens, target = samples[index]
        assert tokens.dtype == torch.float32
        assert torch.equal(tokens, bank[sample.key].float())
        expected = dataset.target(sample.key)
        assert (target.key, target.size) == (sample.key, expected.size)
        assert torch.equal(target.boxes_o, expected.boxes_o)
        assert target.transform == bank.transform(sample.key)
        assert target.regions == {}
    assert FeatureDataset(bank, dataset, dtype=None)[0][0].dtype == bank[dataset.samples[0].key].dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_regions_are_pooled_by_name(root: Path, dataset: Dataset, layout: str) -> None:
    samples = FeatureDataset(root / f"{layout}_hicodet_train", dataset, "union, human")
    for tokens, target in (samples[index] for index in range(len(samples))):
        assert list(target.regions) == ["human", "union"]
        assert target.transform is not None
        union = union_boxes(target.boxes_h, target.boxes_o)
        assert torch.allclose(target.regions["human"], pool_regions(tokens, target.boxes_h, target.transform))
        assert torch.allclose(target.regions["union"], pool_regions(tokens, union, target.transform))
        assert target.regions["union"].shape == (len(target), 32)
    everything = FeatureDataset(root / f"{layout}_hicodet_train", dataset, ["human", "object", "union"])
    assert list(everything[1][1].regions) == ["human", "object", "union"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["fork", "spawn", None])
def test_data_loaders(root: Path, dataset: Dataset, layout: str, method: str | None) -> None:
    samples = FeatureDataset(root / f"{layout}_hicodet_train", dataset, "human,object,union")
    options: dict[str, Any] = {}
    if method:
        options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": method}
    loader = DataLoader(samples, batch_size=3, collate_fn=collate, **options)
    for _ in range(2 if method else 1):  # epochs
        seen = []
        for tokens, targets in loader:
            assert tokens.shape == (len(targets), 16, 32)
            for each, target in zip(tokens, targets, strict=True):
                alone = samples[len(seen)]
                assert torch.equal(each, alone[0])
                assert torch.equal(target.regions["object"], alone[1].regions["object"])
                seen.append(target.key)
        assert seen == [sample.key for sample in dataset.samples]


def whole(tokens: torch.Tensor, samples: Any) -> bool:
    """Whether a batch's tokens are the memory that its samples' lie in."""
    return tokens.untyped_storage().data_ptr() == samples[0][0].untyped_storage().data_ptr()


def test_collate_copies_only_what_is_not_a_whole_batch(root: Path, dataset: Dataset) -> None:
    samples = FeatureDataset(root / "shards_hicodet_train", dataset).__getitems__([5, 0, 3])
    tokens, targets = collate(samples)
    assert whole(tokens, samples) and [target.key[-5] for target in targets] == ["6", "1", "4"]  # type: ignore[union-attr]
    others = {
        "turned": samples[::-1],
        "some": samples[:2],
        "twice": [samples[0], samples[0], samples[2]],
        "fewer tokens": [(tokens[:5], target) for tokens, target in samples],
        "transposed": [(tokens[:16, :16].T, target) for tokens, target in samples],
        "other numbers": [(tokens.view(torch.int32), target) for tokens, target in samples],
        "one changed": [(samples[0][0] + 1, samples[0][1]), *samples[1:]],
        "last changed": [*samples[:2], (samples[2][0] * 2, samples[2][1])],
    }
    for name, each in others.items():
        batch = collate(each)[0]
        assert not whole(batch, samples), name
        assert torch.equal(batch, torch.stack([tokens for tokens, _ in each])), name


def keep(samples: Any) -> Any:
    return [(tokens.clone(), target) for tokens, target in samples]


class Doubled(FeatureDataset):
    def __getitem__(self, index: int) -> Any:
        tokens, target = super().__getitem__(index)
        return 2 * tokens, target


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaders_read_what_samples_are(root: Path, dataset: Dataset, layout: str, workers: int) -> None:
    bank = root / f"{layout}_hicodet_train"
    for made in (
        FeatureDataset(bank),
        FeatureDataset(bank, dataset, dtype=torch.bfloat16),
        FeatureDataset(bank, dataset, "union", transform=RandomHorizontalFlip(1)),
        FeatureDataset(bank, dataset, "human", transform=horizontal_flip, dtype=None),
        Doubled(bank, dataset, "object"),  # whose own way to get a sample counts
    ):
        for function in (collate, keep):
            seen = 0
            for batch in DataLoader(made, 3, num_workers=workers, collate_fn=function):
                for tokens, target in zip(*batch, strict=True) if function is collate else batch:
                    alone, wanted = made[seen]
                    assert tokens.dtype == alone.dtype and torch.equal(tokens, alone)
                    if isinstance(wanted, str):
                        assert target == wanted
                    else:
                        assert target.key == wanted.key and target.transform == wanted.transform
                        assert torch.equal(target.boxes_h, wanted.boxes_h)
                        assert target.regions.keys() == wanted.regions.keys()
                        for name, features in wanted.regions.items():
                            assert torch.allclose(target.regions[name], features, atol=1e-6)
                    seen += 1
            assert seen == len(made)


def shares(samples: Any) -> tuple[bool, bool]:
    tokens, _ = collate(samples)
    return whole(tokens, samples), tokens.is_shared()


def test_a_worker_reads_into_shared_memory(root: Path, dataset: Dataset) -> None:
    made = FeatureDataset(root / "shards_hicodet_train", dataset, "union")
    assert list(DataLoader(made, 3, num_workers=1, collate_fn=shares)) == [(True, True)] * 3
    assert list(DataLoader(made, 3, collate_fn=shares)) == [(True, False)] * 3


class Cached(FeatureDataset):
    """One that reads samples by themselves, as does user code that keeps them."""

    def __getitems__(self, indices: Any) -> Any:
        return [self[index] for index in indices]


def are_shared(batch: Any) -> list[bool]:
    return [row.is_shared() for row, _ in batch]


def test_a_sample_read_by_itself_holds_no_file_open(root: Path, dataset: Dataset) -> None:
    made = Cached(root / "shards_hicodet_train", dataset, "union")
    found = list(DataLoader(made, 3, num_workers=1, collate_fn=are_shared))
    assert found == [[False] * 3, [False] * 3, [False]]


def test_regions_are_of_the_samples_that_have_pairs(root: Path, dataset: Dataset) -> None:
    def some(tokens: Any, target: Any) -> Any:
        number = int(target.key[-5])
        if number == 3:
            return horizontal_flip(tokens.double(), target)
        return (tokens, target) if number % 2 else ({"tokens": tokens}, target.key)

    bank = open_bank(root / "shards_hicodet_train")
    plain = FeatureDataset(bank, dataset, "union")
    made = FeatureDataset(bank, dataset, "union", transform=some)
    assert plain.__getitems__([]) == made.__getitems__([]) == []
    for number, (tokens, target) in enumerate(made.__getitems__(range(len(made))), 1):  # type: ignore[arg-type]
        row, wanted = plain[number - 1]
        if number % 2:
            assert target.regions["union"].dtype == tokens.dtype == (torch.float64 if number == 3 else torch.float32)
            if number != 3:
                assert torch.allclose(target.regions["union"], wanted.regions["union"], atol=1e-6)
        else:
            assert target == wanted.key and torch.equal(tokens["tokens"], row)


def test_collate_takes_what_default_collate_takes() -> None:
    base = torch.arange(6.0).view(2, 3)
    for rows in (
        [base[0].numpy(), base[1].numpy()],
        [{"a": base[0]}, {"a": base[1]}],
        [torch.tensor(1.0).expand(3), torch.tensor(2.0).expand(3)],
        [1.5, 2.5],
    ):
        made = collate([(row, "key") for row in rows])  # type: ignore[misc]
        expected = default_collate(rows)
        assert made[1] == ["key", "key"] and type(made[0]) is type(expected)
        one, other = (each["a"] if isinstance(each, dict) else each for each in (made[0], expected))
        assert torch.equal(one, other)


def test_ranks_share_the_images(root: Path, dataset: Dataset) -> None:
    samples = FeatureDataset(root / "shards_hicodet_train", dataset)
    seen: list[str] = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(samples, num_replicas=2, rank=rank, shuffle=True)
        for _, targets in DataLoader(samples, 2, sampler=sampler, collate_fn=collate):
            seen += [target.key for target in targets]
    assert len(seen) == 8 and set(seen) == {sample.key for sample in dataset.samples}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for CUDA devices")
def test_pinned_memory(root: Path, dataset: Dataset) -> None:
    samples = FeatureDataset(root / "shards_hicodet_train", dataset, "human")
    for tokens, targets in DataLoader(samples, 2, collate_fn=collate, pin_memory=True):
        assert tokens.is_pinned() and targets[0].boxes_h.is_pinned()
        moved = targets[0].to("cuda", non_blocking=True)
        assert moved.regions["human"].is_cuda


def test_a_bank_of_another_split_is_refused(root: Path, dataset: Dataset) -> None:
    with pytest.raises(DatasetError, match=r"shards_hicodet_test is of hicodet test, .* is hicodet train"):
        FeatureDataset(root / "shards_hicodet_test", dataset)
    with pytest.raises(DatasetError, match=r"is of vcoco val, and the dataset is hicodet train"):
        FeatureDataset(root / "ezhoi_vcoco_val", dataset)
    with pytest.raises(BankError, match="no bank"):
        FeatureDataset(root / "nowhere", dataset)
    with pytest.raises(TypeError, match=r"what load_dataset returns, not 'annotations\.json'"):
        FeatureDataset(root / "shards_hicodet_train", "annotations.json")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="slice"):
        FeatureDataset(root / "shards_hicodet_train")[:2]  # type: ignore[index]
    with pytest.raises(ConfigError, match="no region 'humans'"):
        FeatureDataset(root / "shards_hicodet_train", dataset, "humans")
    with pytest.raises(ConfigError, match="missing is raise or skip, not 'ignore'"):
        FeatureDataset(root / "shards_hicodet_train", dataset, missing="ignore")  # type: ignore[arg-type]


def test_what_the_bank_lacks(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "root")
    dataset = load_dataset("hicodet", tmp_path / "root", "train")
    dataset.samples[2].path.write_bytes(b"no picture")
    config = ExtractConfig(model="tiny", weights=tiny_weights, layout="shards")
    extract(dataset, tmp_path / "bank", config)
    with pytest.raises(DatasetError, match=r"lacks 1 of the 7 images of hicodet train, HICO_train2015_00000003.jpg \("):
        FeatureDataset(tmp_path / "bank", dataset)
    samples = FeatureDataset(tmp_path / "bank", dataset, missing="skip")
    assert [samples[index][1].key[-6:-4] for index in range(len(samples))] == ["01", "02", "04", "05", "06", "07"]
    assert len(FeatureDataset(tmp_path / "bank", dataset.with_pairs())) == 4


def test_a_bank_of_a_folder_serves_any_data_set(
    root: Path, dataset: Dataset, tiny_weights: Path, tmp_path: Path
) -> None:
    config = ExtractConfig(model="tiny", weights=tiny_weights)
    extract(load_dataset("folder", dataset.images), tmp_path / "bank", config)
    assert len(FeatureDataset(tmp_path / "bank", dataset)) == 7


def test_boxes_of_another_image_size_are_not_pooled(root: Path, tmp_path: Path) -> None:
    names = [sample.key for sample in load_dataset("hicodet", root / "root", "test").samples]
    pair = {"boxes_h": [[1, 1, 5, 5]], "boxes_o": [[1, 1, 9, 9]], "hoi": [0], "object": [0], "verb": [0]}
    content = {
        "filenames": names,
        "annotation": [pair] * len(names),
        "size": [[1, 2]] * len(names),
        "objects": ["person"],
        "verbs": ["see"],
        "correspondence": [[0, 0, 0]],
    }
    (tmp_path / "upt.json").write_text(json.dumps(content))
    dataset = load_dataset("hicodet", root / "root", "test", annotations=tmp_path / "upt.json")
    bank = open_bank(root / "shards_hicodet_test")
    with pytest.raises(
        DatasetError, match=r"(?s)would be misplaced\. Correct .*2015_00000001.jpg: \(1, 2\), the bank"
    ) as error:
        FeatureDataset(bank, dataset)
    assert all(name in str(error.value) for name in names)
    content["size"] = [list(bank.size(name) or ())[::-1] for name in names]
    (tmp_path / "turned.json").write_text(json.dumps(content))
    dataset = load_dataset("hicodet", root / "root", "test", annotations=tmp_path / "turned.json")  # one is square
    with pytest.raises(DatasetError, match=rf"{len(names) - 1} of these are turned by EXIF"):
        FeatureDataset(bank, dataset)


def test_without_an_images_size_there_are_tokens_but_no_regions(dataset: Dataset, tmp_path: Path) -> None:
    keys = [sample.key for sample in dataset.samples]
    with BankWriter(tmp_path / "bank", tiny_manifest("shards"), keys) as writer:
        writer.add([Feature(key, {GRID: torch.randn(16, 32), CLS: torch.randn(32)}, None) for key in keys], [])
    tokens, target = FeatureDataset(tmp_path / "bank", dataset)[1]
    assert tokens.shape == (16, 32) and target.transform is None and target.size is None
    with pytest.raises(BankError, match=r"The size of .* is not known"):
        _ = FeatureDataset(tmp_path / "bank", dataset, "union")[1]


def test_a_flip_turns_grid_and_boxes_together(root: Path, dataset: Dataset) -> None:
    bank = root / "shards_hicodet_train"
    plain = FeatureDataset(bank, dataset, "human,object,union")
    flipped = FeatureDataset(bank, dataset, "human,object,union", transform=horizontal_flip)
    for index in range(len(plain)):
        (tokens, target), (turned, mirrored) = plain[index], flipped[index]
        assert torch.equal(turned.view(4, 4, -1), tokens.view(4, 4, -1).flip(1))
        assert target.size is not None
        assert torch.equal(mirrored.boxes_h[:, 0], target.size[0] - target.boxes_h[:, 2])
        for name, features in target.regions.items():
            assert torch.allclose(mirrored.regions[name], features, atol=1e-5)
        back, again = horizontal_flip(turned, mirrored)
        assert torch.equal(back, tokens) and torch.equal(again.boxes_o, target.boxes_o)
    with pytest.raises(ValueError, match="cannot be flipped"):
        horizontal_flip(tokens, replace(target, transform=None))


def test_random_flips_follow_torchs_seed(root: Path, dataset: Dataset) -> None:
    samples = FeatureDataset(root / "shards_hicodet_train", dataset, transform=RandomHorizontalFlip())
    torch.manual_seed(3)
    first = [samples[1][1].transform.mirrored for _ in range(40)]  # type: ignore[union-attr]
    torch.manual_seed(3)
    assert first == [samples[1][1].transform.mirrored for _ in range(40)]  # type: ignore[union-attr]
    assert 8 < sum(first) < 32
    assert not RandomHorizontalFlip(0.0)(*samples[0])[1].transform.mirrored  # type: ignore[union-attr]
    assert len(pickle.dumps(samples)) < 100_000


def test_zero_shot_training_sees_no_unseen_class(root: Path, dataset: Dataset) -> None:
    seen = FeatureDataset(root / "shards_hicodet_train", dataset.without_hois([147, 298]))
    assert sorted(int(hoi) for _, target in (seen[0], seen[1]) for hoi in target.hoi) == [85, 304]  # type: ignore[union-attr]
    assert len(seen) == 2


def test_a_trainer_imports_neither_the_encoder_nor_the_command_line(root: Path) -> None:
    program = f"""
import sys, patchbank
samples = patchbank.FeatureDataset({str(root / "shards_hicodet_train")!r},
    patchbank.load_dataset("hicodet", {str(root / "root")!r}, "train"), "human,object,union")
samples[1]
wrong = ("patchbank.encoders", "patchbank.cli", "patchbank.extraction", "typer", "ray.", "open_clip")
assert not [name for name in sys.modules if name.startswith(wrong)]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_annotations_there_are_tokens_and_keys(root: Path, dataset: Dataset) -> None:
    bank = open_bank(root / "shards_hicodet_train")
    samples = FeatureDataset(bank)
    assert len(samples) == 7 and samples.keys == list(bank)
    tokens, key = samples[3]
    assert key == samples.keys[3] and torch.equal(tokens, bank[key].float())
    tokens, keys = next(iter(DataLoader(samples, 3, collate_fn=collate)))
    assert tokens.shape == (3, 16, 32) and keys == samples.keys[:3]
    folder = load_dataset("folder", dataset.images)
    chosen = FeatureDataset(bank, folder[2:5], transform=lambda tokens, key: (tokens * 2, key.upper()))
    assert [chosen[index][1] for index in range(3)] == [sample.key.upper() for sample in folder[2:5]]
    with pytest.raises(ConfigError, match="give a dataset with annotations"):
        FeatureDataset(bank, folder, "human")
    with pytest.raises(ValueError, match="has no transform"):
        RandomHorizontalFlip(1)(tokens[0], keys[0])
    assert repr(samples) == f"<FeatureDataset keys: 7 x patch_tokens (16, 32) float32, from {bank.path}>"
    paired = FeatureDataset(bank, dataset, "union", dtype=None)
    assert (
        repr(paired)
        == f"<FeatureDataset hicodet train: 7 x patch_tokens (16, 32) float16, regions union, from {bank.path}>"
    )
