"""Banks of one dataset made together: each image is opened once, and each bank is as if it were made alone."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pytest
import torch

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.config import Partition
from patchbank.datasets import Dataset, Sample
from patchbank.datasets.sources import Directory
from patchbank.errors import BankError, DatasetError
from patchbank.extraction.plan import ExtractPlan, make_plan
from patchbank.extraction.progress import Progress
from patchbank.extraction.run import ExtractSummary, _memory, execute_all, load_runner, passes
from tests import toy_family
from tests.faults.processes import Calls, Run, run
from tests.support import (
    OnBatch,
    SecondLook,
    contents,
    hico_root,
    no_leftovers,
    patchbank,
    photographs,
    toy_is_known,  # noqa: F401
)

BROKEN = {"photo_0003a.jpg", "photo_0007a.jpg"}


@dataclass(frozen=True)
class Counted(Directory):
    """Counts how often each image is opened."""

    opened: ClassVar[Counter[str]] = Counter()

    def content(self, sample: Sample) -> Path | BinaryIO:
        self.opened[sample.image] += 1
        return super().content(sample)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eleven photographs and two files that cannot be read."""
    images = tmp_path_factory.mktemp("images")
    photographs(images, 11)
    (images / "photo_0003a.jpg").write_bytes((images / "photo_0003.jpg").read_bytes()[:900])
    (images / "photo_0007a.jpg").write_bytes(b"")
    found = load_dataset("folder", images)
    return replace(found, samples=[each._replace(source=Counted(images)) for each in found.samples])


@pytest.fixture(scope="module")
def configs(tiny_config: ExtractConfig) -> dict[str, ExtractConfig]:
    """Batches, layouts, shards and inputs that differ."""
    return {
        "pickles": tiny_config,
        "shards": replace(tiny_config, batch_size=3, layout="shards", shard_size=5 * 2176, resize="pad"),
        "toy": ExtractConfig(model="toy/small", batch_size=5, layout="shards", shard_size=4000, decode="fast"),
    }


@pytest.fixture(scope="module")
def expected(
    dataset: Dataset, configs: dict[str, ExtractConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """The bytes of each bank made alone."""
    place = tmp_path_factory.mktemp("expected")
    for name, config in configs.items():
        extract(dataset, place / name, config)
    return {name: contents(place / name) for name in configs}


def planned(dataset: Dataset, place: Path, configs: dict[str, ExtractConfig], **changes: Any) -> list[ExtractPlan]:
    return [make_plan(dataset, place / name, replace(config, **changes)) for name, config in configs.items()]


def carry_out(plans: Sequence[ExtractPlan], **options: Any) -> list[ExtractSummary]:
    return execute_all(plans, [load_runner(plan) for plan in plans], **options)


def made(place: Path, configs: dict[str, ExtractConfig]) -> dict[str, dict[str, str]]:
    return {name: contents(place / name) for name in configs}


def test_each_image_is_opened_once_and_each_bank_is_as_alone(
    dataset: Dataset, configs: dict[str, ExtractConfig], expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    Counted.opened.clear()
    totals: list[int] = []
    progress = OnBatch(lambda count, failed: totals.append(count + len(failed)))
    progress.start = totals.append  # type: ignore[method-assign]
    summaries = carry_out(planned(dataset, tmp_path, configs), progress=progress)
    assert made(tmp_path, configs) == expected
    assert totals[0] == sum(totals[1:]) == 3 * 13
    sound = {sample.key for sample in dataset.samples} - BROKEN
    assert {Counted.opened[key] for key in sound} == {1}
    for summary in summaries:
        assert (summary.images, summary.failures.keys(), summary.remaining) == (11, BROKEN, 0)
        assert summary.times.decode == summaries[0].times.decode > 0 and summary.times.encode > 0
        assert summary.bound == summaries[0].bound
    # Afterwards there is nothing to do but the failures.
    assert [summary.images for summary in carry_out(planned(dataset, tmp_path, configs))] == [0, 0, 0]
    assert made(tmp_path, configs) == expected


@pytest.mark.parametrize("count", [2, 3])
def test_parts_and_what_is_done_may_differ(
    dataset: Dataset, configs: dict[str, ExtractConfig], expected: dict[str, dict[str, str]], tmp_path: Path, count: int
) -> None:
    """Parts are cut along each bank's own shards; the toy's bank has its second half already."""
    later = replace(dataset, samples=dataset.samples[7:])
    extract(later, tmp_path / "toy", configs["toy"])
    for index in range(count):
        Counted.opened.clear()
        carry_out(planned(dataset, tmp_path, configs, partition=Partition(index, count)))
        assert all(Counted.opened[key] <= 1 for key in Counted.opened.keys() - BROKEN)
    assert made(tmp_path, configs) == expected


def test_a_stop_commits_every_bank(
    dataset: Dataset, configs: dict[str, ExtractConfig], expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    for _ in range(2):
        assert sum(each.images for each in carry_out(planned(dataset, tmp_path, configs), stop=SecondLook())) > 0
        assert all(no_leftovers(tmp_path / name) for name in configs)
    assert all(each.remaining == 0 for each in carry_out(planned(dataset, tmp_path, configs)))
    assert made(tmp_path, configs) == expected


def test_a_bank_that_fails_ends_the_run(
    dataset: Dataset, configs: dict[str, ExtractConfig], expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """What the others have is committed, shards that are not full too."""

    def spoil(*_: object) -> None:
        if (bank := tmp_path / "toy").is_dir():
            bank.rename(tmp_path / "moved")
            bank.write_bytes(b"")

    with pytest.raises(BankError, match=r"toy.* cannot be written"):
        carry_out(planned(dataset, tmp_path, configs), progress=OnBatch(spoil))
    kept = contents(tmp_path / "pickles").items() & expected["pickles"].items()
    assert any(name.endswith("_clip.pkl") for name, _ in kept)
    assert len(open_bank(tmp_path / "shards")) and no_leftovers(tmp_path / "shards")
    (tmp_path / "toy").unlink()
    carry_out(planned(dataset, tmp_path, configs))
    assert made(tmp_path, configs) == expected


def test_images_that_are_gone_end_the_run(configs: dict[str, ExtractConfig], tmp_path: Path) -> None:
    photographs(tmp_path / "images", 40)
    dataset = load_dataset("folder", tmp_path / "images")

    def remove(*_: object) -> None:
        if (tmp_path / "images").exists():
            (tmp_path / "images").rename(tmp_path / "away")

    plans = planned(dataset, tmp_path, configs, workers=1)
    with pytest.raises(DatasetError, match="is gone"):
        carry_out(plans, progress=OnBatch(remove))
    (tmp_path / "away").rename(tmp_path / "images")
    assert 0 < len(open_bank(tmp_path / "pickles")) < 40  # the first batch is this bank's
    assert not open_bank(tmp_path / "pickles").failures
    plans = planned(dataset, tmp_path, configs)
    assert [plan.failed_before for plan in plans] == [0, 0, 0]
    assert all(not each.failures and each.settled == 40 for each in carry_out(plans))


# The command line: two models of HICO-DET's test split, in shards of three images and batches of two.


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = hico_root(tmp_path_factory.mktemp("root"), 11)
    images = root / "hicodet/hico_20160224_det/images/test2015"
    (sorted(images.iterdir())[4]).write_bytes(b"")
    return root


BOTH = ("--model", "toy/small", "--model", "toy/other")


def line(root: Path, out: Path, *options: object) -> tuple[object, ...]:
    given = "--layout", "shards", "--shard-size", "1kB", "--batch-size", 2
    return "extract", "hicodet", "--root", root, "--out", out, *given, *options


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The four banks, each made by a command of its own."""
    out = tmp_path_factory.mktemp("alone")
    for model in BOTH[1::2]:
        for split, code in (("train", 0), ("test", 1)):
            patchbank(*line(root, out, "--split", split, "--model", model), check=code)
    return all_contents(out)


def all_contents(out: Path) -> dict[str, str]:
    return {name: each for name, each in contents(out).items() if "/runs/" not in name}


def test_two_models_of_two_splits(
    root: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[Path] = Counter()
    content = Directory.content

    def counted(self: Directory, sample: Sample) -> Path | BinaryIO:
        opened[sample.path] += 1
        return content(self, sample)

    monkeypatch.setattr(Directory, "content", counted)
    done = patchbank(*line(root, tmp_path, *BOTH), check=1)
    assert all_contents(tmp_path) == alone
    assert set(opened.values()) == {1} and len(opened) == 22
    assert "banks 1-2 of 4, hicodet train, toy/small, toy/other: 22 features to do" in done.stderr
    assert "banks 3-4 of 4, hicodet test, " in done.stderr
    assert done.stdout.count("features written") == 4
    again = json.loads(patchbank(*line(root, tmp_path, *BOTH, "--json"), check=1).stdout)
    assert [(each["split"], each["model"]) for each in again] == [
        (split, model) for split in ("train", "test") for model in BOTH[1::2]
    ]
    assert [each["remaining"] for each in again] == [0] * 4


def test_banks_that_are_complete_need_no_encoder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patchbank(*line(root, tmp_path, "--split", "train", "--model", "toy/other"), check=0)
    loaded: list[str] = []
    load = toy_family.ToySpec.load
    monkeypatch.setattr(
        toy_family.ToySpec, "load", lambda self, *others: loaded.append(self.name) or load(self, *others)
    )
    patchbank(*line(root, tmp_path, "--split", "train", *BOTH), check=0)
    assert loaded == ["toy/small"]


def test_models_that_do_not_fit_into_memory_together(
    root: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their banks are made one after the other, and each model is loaded once more."""
    loaded: list[str] = []
    load = toy_family.ToySpec.load

    def load_one(self: toy_family.ToySpec, *others: Any) -> Any:
        loaded.append(self.name)
        if loaded == ["toy/small", "toy/other"]:
            raise torch.OutOfMemoryError
        return load(self, *others)

    monkeypatch.setattr(toy_family.ToySpec, "load", load_one)
    done = patchbank(*line(root, tmp_path, *BOTH), check=1)
    assert loaded == ["toy/small", "toy/other"] * 2
    assert all_contents(tmp_path) == alone
    assert "bank 4 of 4, hicodet test, toy/other: 11 images to do" in done.stderr


def test_models_that_a_pass_has_no_memory_for_together(
    root: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are not halved, which could change numbers: the banks are made one after the other."""
    sizes: list[int] = []
    call = toy_family.Toy.forward

    def one(self: toy_family.Toy, *others: Any) -> Any:
        sizes.append(len(others[0]))
        if len(sizes) == 3:
            raise torch.OutOfMemoryError
        return call(self, *others)

    monkeypatch.setattr(toy_family.Toy, "forward", one)
    done = patchbank(*line(root, tmp_path, *BOTH), check=1)
    assert all_contents(tmp_path) == alone
    assert "one image of" not in done.stderr and "images at a time" not in done.stderr + done.stdout
    assert "bank 4 of 4, hicodet test, toy/other: 11 images to do" in done.stderr


def test_a_pass_takes_as_many_models_as_memory_holds(
    dataset: Dataset, configs: dict[str, ExtractConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = planned(dataset, tmp_path, configs)
    assert passes(plans) == [plans]
    assert passes(plans, together=False) == [[plans[0]], [plans[1]], [plans[2]]]
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2 * min(map(_memory, plans)))
    assert passes(plans) == [[plan] for plan in plans]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("batches", [1, 4, 7, 10])
def test_interrupted_after_any_lanes_batch(
    root: Path, alone: dict[str, str], tmp_path: Path, number: signal.Signals, batches: int
) -> None:
    """A real process; one bank had its first images before, and one signal may find the banks in different states."""
    out, printed = tmp_path / "out", tmp_path / "printed"
    run(printed, *line(root, out, "--split", "test", "--model", "toy/other", "--limit", 3), check=0)
    process = Run(printed, *line(root, out, "--split", "test", *BOTH), pause_after=Calls(batches)).paused()
    process.send(number)
    process.send(signal.SIGCONT)
    assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGTERM:
        assert all(no_leftovers(bank) for bank in out.iterdir())
        assert all(len(open_bank(bank)) for bank in out.iterdir())
    run(printed, *line(root, out, *BOTH), check=1)
    assert all_contents(out) == alone


def test_progress_of_several_plans_is_one(dataset: Dataset, configs: dict[str, ExtractConfig], tmp_path: Path) -> None:
    class Stages(Progress):
        said: ClassVar[list[str]] = []

        def stage(self, text: str) -> None:
            self.said.append(text)

    carry_out(planned(dataset, tmp_path, configs), progress=Stages())
    assert Stages.said == ["opening the banks", "finishing the banks"]
