"""`open_regions`: the regions of each image, against plain loops over the bank and the annotations."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from patchbank import ExtractConfig, RegionFeatures, extract, load_dataset, open_bank, open_regions
from patchbank.bank.convert import convert
from patchbank.bank.payload import Feature
from patchbank.bank.storage import ObjectStorage, Storage
from patchbank.bank.writer import BankWriter
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError, KeyNotInBank
from patchbank.locations import locate
from patchbank.regions import Region
from tests.support import PAIRS, pairs_root, tiny_manifest

SHARD = 7 * 4 * (32 + 16 * 32)  # bytes of seven regions: images lie in several shards


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> Path:
    """A root with pairs, and a bank of theirs with vectors and grids."""
    root = pairs_root(tmp_path_factory.mktemp("pairs"))
    config = replace(tiny_config, layout=None, shard_size=SHARD, output=("cls", "patch_tokens"))
    extract(annotated_pairs(load_dataset("hicodet", root, "train")), root / "bank", config)
    return root


def test_regions_are_those_of_the_bank_and_the_annotations(root: Path) -> None:
    bank, dataset = open_bank(root / "bank"), load_dataset("hicodet", root, "train")
    assert len(list((root / "bank").glob("shard-*"))) > 3
    regions = open_regions(root / "bank")
    assert list(regions) == ["z.jpg", "b.jpg", "m.jpg", "a.jpg"]  # the dataset's order; one has no pairs
    assert len(regions) == 4 and "none.jpg" not in regions
    planned = [each for each in annotated_pairs(dataset).samples if each.key in bank]
    found = [(key, row, value) for key, value in regions.items() for row in range(len(value))]
    assert len(found) == len(planned) == len(bank) == 4 + 3 * 9 - 2
    for (key, row, value), sample in zip(found, planned, strict=True):
        assert sample.key == f"{key}#{value.names[row]}" and sample.region is not None
        width, height = value.size
        box, label, score, verb, hoi = sample.region
        assert value.boxes[row].tolist() == list(box or (0, 0, width, height))
        classes = [-1 if each is None else each for each in (label, verb, hoi)]
        assert [int(each[row]) for each in (value.labels, value.verbs, value.hois)] == classes
        assert score is None and math.isnan(value.scores[row])
        beyond = {"m.jpg#object-0": 0.5, "m.jpg#union-0": (120 - 40.5) / (180 - 40.5)}
        assert value.visible[row] == pytest.approx(beyond.get(sample.key, 1))
        for name in ("cls", "patch_tokens"):
            assert torch.equal(value.features[name][row], bank.output(sample.key, name))
    assert [each.dtype for each in (value.boxes, value.scores, value.visible)] == [torch.float32] * 3
    assert [each.dtype for each in (value.labels, value.verbs, value.hois)] == [torch.int64] * 3


def test_pairs_line_up_with_the_targets(root: Path) -> None:
    bank, dataset = open_bank(root / "bank"), load_dataset("hicodet", root, "train")
    missing = set()
    for key, value in open_regions(bank, output="cls").items():
        assert list(value.features) == ["cls"]
        target, pairs, classes = dataset.target(key), value.pairs(), value.pair_classes()
        assert [len(each) for each in pairs] == [len(target)] * 3
        for number in range(len(target)):
            for kind in ("human", "object", "union"):
                feature, name = getattr(pairs, kind)[number], f"{key}#{kind}-{number}"
                if name in bank:
                    assert torch.equal(feature, bank.cls(name))
                else:
                    assert feature.isnan().all()
                    missing.add(name)
        assert torch.equal(classes["verb"], target.verb)
        assert torch.equal(classes["object"], target.object)
        assert target.hoi is not None and torch.equal(classes["hoi"], target.hoi)
    assert missing == set(bank.failures) == {"b.jpg#object-0", "a.jpg#object-1"}
    assert open_regions(bank)["a.jpg"].failures.keys() == {"object-1"}
    with pytest.raises(BankError, match=r"'cls' was not read. These were: patch_tokens"):
        open_regions(bank, output="patch_tokens")["a.jpg"].pairs("cls")


def test_a_pair_without_any_feature_is_a_row_all_the_same(tmp_path: Path) -> None:
    kinds = ("human", "object", "union")
    keys = ["a.jpg#image", *(f"a.jpg#{kind}-{number}" for number in range(3) for kind in kinds)]
    made = tiny_manifest("shards")
    made = replace(made.with_outputs(["cls"]), input=replace(made.input, cut="pad"))
    sound, failed = keys[:7], keys[7:]
    with BankWriter(tmp_path / "bank", made, keys) as writer:
        features = [Feature(key, {"cls": torch.ones(32)}, (9, 9), Region(None, 1, None, 2, 3)) for key in sound]
        writer.add(features, [Failure(key, "the box has no area") for key in failed])
    value = open_regions(tmp_path / "bank")["a.jpg"]
    for rows in value.pairs():
        assert rows.shape == (3, 32) and rows[2].isnan().all() and not rows[:2].isnan().any()
    assert {name: column.tolist() for name, column in value.pair_classes().items()} == {
        "object": [1, 1, -1],
        "verb": [2, 2, -1],
        "hoi": [3, 3, -1],
    }


def _together(values: Sequence[RegionFeatures]) -> list[RegionFeatures]:
    return list(values)


class _Images(torch.utils.data.Dataset[RegionFeatures]):
    def __init__(self, bank: Path) -> None:
        self.regions = open_regions(bank)
        self.keys = list(self.regions)
        _ = self.regions[self.keys[0]]  # open files do not prevent sending it

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> RegionFeatures:
        return self.regions[self.keys[index]]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_and_threads_read_the_same(root: Path, method: str) -> None:
    alone = _Images(root / "bank")
    loader = DataLoader(alone, 2, num_workers=2, collate_fn=_together, multiprocessing_context=method)
    found = [value for batch in loader for value in batch]
    with ThreadPoolExecutor(4) as threads:
        found += threads.map(alone.__getitem__, range(len(alone)))
    for one, other in zip(found, [alone[index] for index in range(len(alone))] * 2, strict=True):
        assert (one.key, one.names) == (other.key, other.names)
        assert all(torch.equal(one.features[name], other.features[name]) for name in other.features)
    assert len(pickle.dumps(alone.regions)) < (root / "bank").stat().st_size + 40_000  # no features


def test_an_image_is_read_with_few_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    whole = Storage.read

    def read(self: Storage, name: str, begin: int, end: int) -> bytes:
        asked.append((name, end - begin))
        return whole(self, name, begin, end)

    monkeypatch.setattr(Storage, "read", read)
    regions = open_regions(open_bank(root / "bank", mmap=False))
    asked.clear()
    value = regions["z.jpg"]
    assert len(value) == 10
    assert len(asked) == 2 * len({name for name, _ in asked}) == 4  # two outputs, two shards
    mapped = open_regions(root / "bank")["z.jpg"]
    assert all(torch.equal(value.features[name], mapped.features[name]) for name in mapped.features)


def test_a_store_is_asked_once_for_an_image_and_a_cache_keeps_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://patchbank/regions"
    convert(open_bank(root / "bank"), locate(url), "shards", shard_size=1 << 20)
    asked: list[int] = []
    whole = ObjectStorage.read
    monkeypatch.setattr(
        ObjectStorage, "read", lambda self, name, start, stop: asked.append(start) or whole(self, name, start, stop)
    )
    regions = open_regions(open_bank(url, cache=tmp_path), output="cls")
    asked.clear()
    first, again = regions["z.jpg"], regions["z.jpg"]
    assert len(asked) == 1
    kept = sorted(tmp_path.rglob("*.cls"))
    assert len(kept) == 8  # of ten, two boxes are equal
    kept[3].write_bytes(b"half")
    assert len(asked) == 1
    third = regions["z.jpg"]
    assert len(asked) == 2
    for value in (first, again, third):
        assert torch.equal(value.features["cls"], open_regions(root / "bank")["z.jpg"].features["cls"])
    assert torch.equal(regions.bank.cls("z.jpg#human-1"), first.features["cls"][4])  # by itself, from the cache
    assert len(asked) == 2


def test_rows_move_while_a_run_completes_the_bank(tmp_path: Path) -> None:
    keys = [f"a.jpg#box-{number}" for number in range(5)]
    made = tiny_manifest("shards")
    made = replace(made.with_outputs(["cls"]), input=replace(made.input, cut="pad"))
    features = [Feature(key, {"cls": torch.randn(32)}, (9, 9), Region((0, 0, 9, 9))) for key in keys]
    with BankWriter(tmp_path / "bank", made, keys) as writer:
        writer.add(features[1::2], [])
    bank = open_bank(tmp_path / "bank")  # rows 0 and 1, which become 1 and 3
    with BankWriter(tmp_path / "bank", made, keys) as writer:
        writer.add(features[::2], [])
    assert torch.equal(bank.batch(keys[1::2]), torch.stack([each.outputs["cls"] for each in features[1::2]]))
    assert bank.batch([]).shape == (0, 32)


def test_a_detectors_boxes(tmp_path: Path) -> None:
    """Labels, scores, a grid's visible fractions, and int8 grids."""
    made = tiny_manifest("shards", "int8")
    made = replace(made.with_outputs(["patch_tokens"]), input=replace(made.input, cut="grid"))
    wanted = {
        "b.jpg#box-0": Region((0.0, 10.0, 50.0, 60.0), 3, 0.5),
        "b.jpg#box-7": Region((50.0, 10.0, 100.0, 60.0), 0, 0.25),
        "a.jpg#image": Region(),
    }
    tokens = torch.randn(3, 16, 32)
    with BankWriter(tmp_path / "bank", made, list(wanted)) as writer:
        writer.add(
            [
                Feature(key, {"patch_tokens": tokens[row]}, (200, 100), region)
                for row, (key, region) in enumerate(wanted.items())
            ],
            [],
        )
    bank = open_bank(tmp_path / "bank")
    value, whole = open_regions(bank).values()
    assert value.names == ("box-0", "box-7") and whole.names == ("image",)
    assert value.labels.tolist() == [3, 0] and value.scores.tolist() == [0.5, 0.25]
    assert value.visible.tolist() == [0, 1]  # the middle of the image is cut out: 50 to 150
    assert whole.visible.tolist() == [0.5] and whole.boxes.tolist() == [[0, 0, 200, 100]]
    assert torch.equal(value.features["patch_tokens"][1], bank["b.jpg#box-7"])
    with pytest.raises(BankError, match="not those of annotated pairs: box-0, box-7"):
        value.pairs()


def test_what_is_not_there(root: Path, tmp_path: Path, tiny_config: ExtractConfig) -> None:
    regions = open_regions(root / "bank")
    with pytest.raises(KeyNotInBank, match=r"no regions of 'none.jpg'. Its images look like 'z.jpg'"):
        _ = regions["none.jpg"]
    with pytest.raises(BankError, match="does not store the output 'pooled'"):
        open_regions(root / "bank", output="pooled")
    extract(load_dataset("hicodet", root, "train"), tmp_path / "images", tiny_config)
    with pytest.raises(BankError, match=r"whole images, and not of regions: .patchbank extract pairs"):
        open_regions(tmp_path / "images")
    other = pairs_root(tmp_path / "root")
    (other / "hicodet/hico_20160224_det/images/train2015/m.jpg").write_bytes(b"")
    config = replace(tiny_config, layout=None)
    extract(annotated_pairs(load_dataset("hicodet", other, "train")), tmp_path / "bank", config)
    regions = open_regions(tmp_path / "bank")
    assert list(regions) == ["z.jpg", "b.jpg", "a.jpg"] == [name for name in PAIRS if name in regions]
    with pytest.raises(KeyNotInBank, match=r"No region of 'm.jpg' could be extracted: the file is empty"):
        _ = regions["m.jpg"]
