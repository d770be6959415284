"""Units of work: no shard or batch is split, and no sample is left out."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from patchbank import extract, load_dataset
from patchbank.config import ExtractConfig, Partition
from patchbank.extraction import work
from patchbank.extraction.plan import make_plan
from patchbank.extraction.work import units_of
from tests.support import contents, photographs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many") / "images"
    photographs(directory, 30)
    return directory


@pytest.fixture
def config(tiny_config: ExtractConfig, request: pytest.FixtureRequest) -> ExtractConfig:
    return replace(tiny_config, layout=request.param, shard_size=7 * 2200)  # seven images a shard


BOTH = pytest.mark.parametrize("config", ["ezhoi", "shards"], indirect=True)


@BOTH
def test_units_are_whole_shards_or_batches_and_hold_every_image_once(
    config: ExtractConfig, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_UNIT", 8)
    plan = make_plan(load_dataset("folder", images), tmp_path / "bank", config)
    units = units_of(plan, 1)
    assert [sample for unit in units for sample in unit.todo] == list(plan.dataset.samples)
    atom = plan.manifest.part_size if config.layout == "shards" else 4
    assert atom == (4 if config.layout == "ezhoi" else 7)
    of_atom = [{sample.position // atom for sample in unit.samples} for unit in units]
    assert len(units) > 3 and all(not a & b for a, b in pairwise(of_atom))
    assert len(pickle.dumps(units[0])) < 2000


@BOTH
def test_few_images_are_cut_for_all_workers(config: ExtractConfig, images: Path, tmp_path: Path) -> None:
    """With units of a thousand, a few hundred images would keep one GPU of eight busy."""
    plan = make_plan(load_dataset("folder", images), tmp_path / "bank", config)
    atom = plan.manifest.part_size if config.layout == "shards" else 4
    for workers in (1, 2, 8):
        units = units_of(plan, workers)
        assert len(units) >= min(4 * workers, -(-30 // atom))
        assert sum(len(unit.todo) for unit in units) == 30


def test_what_is_scattered_is_gathered(tiny_config: ExtractConfig, images: Path, tmp_path: Path) -> None:
    """A unit of scattered pickles is as large as any other: each unit costs a wait for the disk."""
    config = replace(tiny_config, layout="ezhoi")
    dataset = load_dataset("folder", images)
    plan = make_plan(dataset, tmp_path / "bank", config)
    scattered = replace(plan, todo=[sample for sample in plan.todo if sample.position % 5 == 0])
    units = units_of(scattered, 1)
    assert [sample.position for unit in units for sample in unit.todo] == [0, 5, 10, 15, 20, 25]
    assert len(units) == 6  # as few images as there are, in at least four units a worker
    (unit,) = units_of(replace(plan, todo=scattered.todo[:1]), 1)
    assert len(unit.samples) == 1


@BOTH
def test_only_what_is_left_is_cut_with_what_is_known_of_it(
    config: ExtractConfig, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_UNIT", 4)
    dataset, bank = load_dataset("folder", images), tmp_path / "bank"
    extract(dataset, bank, replace(config, limit=10))
    before = contents(bank)
    units = units_of(make_plan(dataset, bank, config), 1)
    assert [sample.position for unit in units for sample in unit.todo] == list(range(10, 30))
    known = units[0].known
    if config.layout == "shards":  # the second shard was begun: its unit has all of its images, and the shard
        assert [sample.position for sample in units[0].samples] == list(range(7, 14))
        assert known.done == {sample.key for sample in units[0].samples[:3]}
        assert [part.number for part in known.parts] == [1]
    assert contents(bank) == before


@BOTH
def test_a_part_has_the_units_of_its_part(config: ExtractConfig, images: Path, tmp_path: Path) -> None:
    dataset = load_dataset("folder", images)
    found = []
    for index in range(3):
        plan = make_plan(dataset, tmp_path / "bank", replace(config, partition=Partition(index, 3)))
        found += [sample.position for unit in units_of(plan, 1) for sample in unit.todo]
    assert found == list(range(30))
