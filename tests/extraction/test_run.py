"""`extract`: the bank's bytes depend on the input alone; runs complete each other; a wrong setup writes nothing."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank import parts
from patchbank.config import Partition
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.errors import BankError, ConfigError, DatasetError, PatchbankError, WeightsError
from patchbank.extraction.plan import check_disk, make_plan
from patchbank.extraction.recompute import recompute
from patchbank.extraction.run import execute, load_runner
from patchbank.features import GRID
from tests.reference.original import Original
from tests.support import (
    REPOSITORY,
    TINY,
    TINY_VOCABULARY,
    OnBatch,
    SecondLook,
    contents,
    hico_root,
    no_leftovers,
    parts_in,
    photographs,
    relative_error,
)
from tests.test_preprocess import broken_files


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven photographs and two files that cannot be read."""
    directory = tmp_path_factory.mktemp("images")
    photographs(directory, 11)
    (directory / "photo_0003a.jpg").write_bytes((directory / "photo_0003.jpg").read_bytes()[:900])
    (directory / "photo_0007a.jpg").write_bytes(b"")
    return directory


@pytest.fixture(scope="module", params=["ezhoi", "shards"])
def config(tiny_config: ExtractConfig, request: pytest.FixtureRequest) -> ExtractConfig:
    """The tiny model in batches of four; the shards are for five images each."""
    return replace(tiny_config, layout=request.param, shard_size=5 * 2176)


@pytest.fixture(scope="module")
def expected(images: Path, config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of the bank made in one go."""
    bank = tmp_path_factory.mktemp("expected") / "bank"
    extract(load_dataset("folder", images), bank, config)
    return contents(bank)


@pytest.fixture(scope="module")
def expected_pickles(
    images: Path, tiny_config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same in pickles."""
    bank = tmp_path_factory.mktemp("expected") / "bank"
    extract(load_dataset("folder", images), bank, tiny_config)
    return contents(bank)


def test_one_run(images: Path, config: ExtractConfig, tmp_path: Path) -> None:
    committed: list[int] = []
    summary = extract(
        load_dataset("folder", images),
        tmp_path / "bank",
        config,
        progress=OnBatch(lambda count, _: committed.append(count)),
    )
    assert summary.images == sum(committed) == 11
    assert (
        summary.failures
        == {
            "photo_0003a.jpg": "image file is truncated (0 bytes not processed)",
            "photo_0007a.jpg": "the file is empty",
        }
        or "truncated" in summary.failures["photo_0003a.jpg"]
    )
    assert (summary.remaining, summary.already_done) == (0, 0)
    bank = open_bank(tmp_path / "bank")
    assert len(bank) == 11
    assert bank.failures == summary.failures
    original = Original(config.weights or Path())
    for key in bank:
        assert relative_error(bank[key], original(images / key)) <= 2e-6
    assert no_leftovers(tmp_path / "bank")


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_leaves_no_trace(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str], workers: int
) -> None:
    extract(load_dataset("folder", images), tmp_path, replace(config, workers=workers))
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("count", [2, 3, 20])
def test_partitions_leave_no_trace(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str], count: int
) -> None:
    dataset = load_dataset("folder", images)
    shares = []
    for index in reversed(range(count)):
        summary = extract(dataset, tmp_path, replace(config, partition=Partition(index, count)))
        shares.append(summary.images + len(summary.failures))
    assert sum(shares) == len(dataset)
    assert max(shares) - min(shares) <= (1 if config.layout == "ezhoi" else 5)  # no shard is cut in two
    assert contents(tmp_path) == expected


def test_a_limit_and_then_the_rest(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str]
) -> None:
    dataset = load_dataset("folder", images)
    first = extract(dataset, tmp_path, replace(config, limit=5))
    assert first.images + len(first.failures) == 5
    second = extract(dataset, tmp_path, config)
    assert second.already_done == first.images
    assert contents(tmp_path) == expected


def test_weights_are_looked_for_in_the_datasets_root(tiny_weights: Path, tmp_path: Path) -> None:
    """By default; a file there that is not the official one is refused."""
    hico_root(tmp_path, 2, splits=["test"])
    checkpoints = tmp_path / "checkpoints/pretrained_CLIP"
    checkpoints.mkdir(parents=True)
    shutil.copy(tiny_weights, checkpoints / "tiny.pt")
    with pytest.raises(WeightsError, match="is not OpenAI's tiny"):
        extract(load_dataset("hicodet", tmp_path, "test"), tmp_path / "bank", ExtractConfig(model="tiny"))


def test_another_models_weights_are_refused_by_the_plan(tiny_weights: Path, tmp_path: Path) -> None:
    """Of EZ-HOI's datasets too, where weights are rounded."""
    hico_root(tmp_path, 2, splits=["test"])
    config = ExtractConfig(model="ViT-B/16", weights=tiny_weights)
    with pytest.raises(WeightsError, match="is not a ViT-B/16"):
        make_plan(load_dataset("hicodet", tmp_path, "test"), tmp_path / "bank", config)


def test_a_stopped_run_goes_on(images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str]) -> None:

    class SecondBatch(Event):
        """Set when the pipeline asks for the second time."""

        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 1

    dataset = load_dataset("folder", images)
    for _ in range(2):
        assert extract(dataset, tmp_path, config, stop=SecondBatch()).remaining
        assert no_leftovers(tmp_path)
    assert 0 < len(open_bank(tmp_path)) < 11
    assert not extract(dataset, tmp_path, config).remaining
    assert contents(tmp_path) == expected


def test_a_finished_bank_is_left_as_it_is(images: Path, tiny_config: ExtractConfig, tmp_path: Path) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path, tiny_config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_clip.pkl")}
    summary = extract(dataset, tmp_path, tiny_config)
    assert (summary.images, summary.already_done, len(summary.failures)) == (0, 11, 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_clip.pkl")} == before


def test_fixed_images_are_extracted_by_the_next_run(images: Path, config: ExtractConfig, tmp_path: Path) -> None:
    fixed = shutil.copytree(images, tmp_path / "images")
    extract(load_dataset("folder", fixed), tmp_path / "bank", config)
    photographs(fixed, 1, size=(70, 70), prefix="new")
    for name in ("photo_0003a.jpg", "photo_0007a.jpg"):
        shutil.copy(fixed / "new_0000.jpg", fixed / name)
    (fixed / "new_0000.jpg").unlink()
    summary = extract(load_dataset("folder", fixed), tmp_path / "bank", config)
    assert (summary.images, summary.already_done, summary.failures) == (2, 11, {})
    extract(load_dataset("folder", fixed), tmp_path / "fresh", config)
    assert contents(tmp_path / "bank") == contents(tmp_path / "fresh")


def test_new_images_join_a_bank(images: Path, config: ExtractConfig, tmp_path: Path) -> None:
    grown = shutil.copytree(images, tmp_path / "images")
    extract(load_dataset("folder", grown), tmp_path / "bank", config)
    photographs(grown, 3, prefix="a_new")  # before all others: every image gets another place in its batch
    summary = extract(load_dataset("folder", grown), tmp_path / "bank", config)
    assert (summary.images, summary.already_done) == (3, 11)
    assert len(open_bank(tmp_path / "bank")) == 14


def test_deleted_features_are_made_again(
    images: Path, tiny_config: ExtractConfig, tmp_path: Path, expected_pickles: dict[str, str]
) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path, tiny_config)
    (tmp_path / "photo_0002_clip.pkl").unlink()
    feature = tmp_path / "photo_0005_clip.pkl"
    feature.write_bytes(feature.read_bytes()[:-1])  # a truncated feature counts as missing
    assert extract(dataset, tmp_path, tiny_config).images == 2
    assert contents(tmp_path) == expected_pickles
    # ... and if the image has gone too, the bank no longer claims the feature.
    thinned = shutil.copytree(images, tmp_path.parent / "thinned")
    (tmp_path / "photo_0002_clip.pkl").unlink()
    dataset = load_dataset("folder", thinned)
    (thinned / "photo_0002.jpg").unlink()
    extract(dataset, tmp_path, tiny_config)
    assert "missing" in open_bank(tmp_path).failures["photo_0002.jpg"]


def test_a_resumed_run_takes_the_banks_batch_size(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str]
) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path, replace(config, limit=4))
    summary = extract(dataset, tmp_path, replace(config, batch_size=3))
    assert any("batch_size 4" in note for note in summary.notes)
    assert contents(tmp_path) == expected


def test_a_path_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dataset is what load_dataset returns, not 'photos'"):
        extract("photos", tmp_path / "bank")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float16"}, "dtype: the bank has float32, this run float16"),
        ({"precision": "bf16"}, "precision: the bank has fp32, this run bf16"),
        ({"precision": "bf16", "resize": "squash"}, "it was made with (precision fp32, resize center-crop)."),
        ({"resize": "squash"}, "input resize: the bank has center-crop, this run squash"),
        ({"weights": None}, "weights: the bank has"),
        ({"weights": None}, "it was made with (model tiny, weights FILE)."),
    ],
)
def test_a_bank_of_other_features_is_refused(
    images: Path, config: ExtractConfig, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path / "bank", config)
    before = contents(tmp_path / "bank")
    if "weights" in change:
        change = {"weights": tmp_path / "other.pt"}
        write_untrained(TINY, tmp_path / "other.pt", seed=2, vocabulary=TINY_VOCABULARY)
    other = replace(config, **change)
    with pytest.raises(BankError, match="different configuration") as caught:
        extract(dataset, tmp_path / "bank", other)
    assert words in str(caught.value)
    assert "overwrite" in str(caught.value)
    assert not re.search(r"None|\(\)|'|[0-9a-f]{13}", str(caught.value).replace(str(tmp_path), ""))
    assert contents(tmp_path / "bank") == before
    summary = extract(dataset, tmp_path / "bank", replace(other, overwrite=True))
    assert summary.images == 11
    extract(dataset, tmp_path / "fresh", other)
    assert contents(tmp_path / "bank") == contents(tmp_path / "fresh")


def test_third_party_pickles_are_refused_and_overwriting_spares_what_is_no_feature(
    images: Path, tiny_config: ExtractConfig, tmp_path: Path, expected_pickles: dict[str, str]
) -> None:
    bank = tmp_path / "bank"
    (bank / "other_bank").mkdir(parents=True)
    (bank / "gone_clip.pkl").write_bytes(pickle.dumps(torch.ones(2)))
    (bank / "other_bank/a_clip.pkl").write_bytes(b"not ours")
    (bank / "notes.txt").write_text("mine")
    dataset = load_dataset("folder", images)
    with pytest.raises(BankError, match="holds pickles without an index"):
        extract(dataset, bank, tiny_config)
    extract(dataset, bank, replace(tiny_config, overwrite=True))
    assert (bank / "notes.txt").read_text() == "mine"
    assert (bank / "other_bank/a_clip.pkl").read_bytes() == b"not ours"
    shutil.rmtree(bank / "other_bank")
    (bank / "notes.txt").unlink()
    assert contents(bank) == expected_pickles


def test_names_that_share_a_pickle_stop_the_run(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    [name] = photographs(tmp_path / "images", 1)
    for twin in ("a.b.jpg", "a.c.jpg"):
        shutil.copy(tmp_path / "images" / name, tmp_path / "images" / twin)
    with pytest.raises(BankError, match=r"'a\.b\.jpg' and 'a\.c\.jpg' would share one pickle, a_clip\.pkl"):
        extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    assert not (tmp_path / "bank").exists()


def test_names_that_share_a_pickle_with_an_interrupted_replacement_stop_the_run(
    tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    """Else the bank would list the first names with the second ones' pickles."""
    photographs(tmp_path / "images", 12)
    config = replace(tiny_config, overwrite=True)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config, stop=SecondLook())
    for path in list((tmp_path / "images").iterdir()):
        path.rename(path.with_suffix(".jpeg"))
    with pytest.raises(BankError, match="would share one pickle"):
        extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)


def test_a_name_that_no_pickle_can_have_stops_the_run(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    [name] = photographs(tmp_path / "images", 1)
    long = "ü" * 125
    for directory, key in (("images", f"{long}.jpg"), ("fits", f"{'n' * (255 - len('_clip.pkl'))}.jpg")):
        (tmp_path / directory).mkdir(exist_ok=True)
        shutil.copy(tmp_path / "images" / name, tmp_path / directory / key)
    dataset = load_dataset("folder", tmp_path / "images")
    with pytest.raises(BankError, match=f"'{long}.jpg' would have a pickle whose name is longer than the 255 bytes"):
        extract(dataset, tmp_path / "bank", tiny_config)
    assert not (tmp_path / "bank").exists()
    assert extract(dataset, tmp_path / "bank", replace(tiny_config, layout="shards")).images == 2
    assert extract(load_dataset("folder", tmp_path / "fits"), tmp_path / "pickles", tiny_config).images == 1


def test_names_that_differ_by_case_alone_on_a_disk_that_ignores_it(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    [name] = photographs(tmp_path / "images", 1)
    shutil.copy(tmp_path / "images" / name, tmp_path / "images/PHOTO_0000.jpg")
    (tmp_path / "disk").mkdir()
    (tmp_path / "DISK").symlink_to("disk")  # as on such a disk, both names are one directory's
    dataset = load_dataset("folder", tmp_path / "images")
    with pytest.raises(BankError, match=r"'PHOTO_0000\.jpg' and 'photo_0000\.jpg' .*A and a for the same"):
        extract(dataset, tmp_path / "disk/bank", tiny_config)
    assert extract(dataset, tmp_path / "bank", tiny_config).images == 2


def test_a_name_that_shares_a_pickle_with_one_in_the_bank_stops_the_run(
    tiny_config: ExtractConfig, tmp_path: Path
) -> None:
    [name] = photographs(tmp_path / "images", 1)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    before = contents(tmp_path / "bank")
    (tmp_path / "images" / name).rename(tmp_path / "images/photo_0000.v2.jpg")
    with pytest.raises(BankError, match=r"photo_0000\.v2\.jpg' and 'photo_0000\.jpg' would share"):
        extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    assert contents(tmp_path / "bank") == before


def test_nested_folders_keep_their_directories(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    for directory in ("x.y/one", "x.z"):
        photographs(tmp_path / "images" / directory, 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    bank = open_bank(tmp_path / "bank")
    assert list(bank) == [f"{place}/photo_000{n}.jpg" for place in ("x.y/one", "x.z") for n in (0, 1)]
    assert (tmp_path / "bank/x.y/one/photo_0000_clip.pkl").is_file()


def _no_images(plan: dict[str, object], tmp_path: Path) -> None:
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")


def _full_disk(plan: dict[str, object], tmp_path: Path) -> None:
    plan["monkeypatch"].setattr("patchbank.bank.writer.free_bytes", lambda _: 1_000)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "ViT-B/17"}, ConfigError, "no model 'ViT-B/17'. Did you mean ViT-B"),
        ({"model": "ViT-B/16"}, WeightsError, "is not a ViT-B/16"),
        ({"weights": Path("nowhere.pt")}, WeightsError, "no checkpoint nowhere.pt"),
        ({"precision": "fp16"}, ConfigError, "needs CUDA"),
        ({"device": "cuda:7"}, ConfigError, "device cuda:7"),
        ({"device": "tpu"}, ConfigError, "no device 'tpu'"),
        (_no_images, DatasetError, "None of the 3 listed images"),
        (_full_disk, BankError, "Not enough disk"),
    ],
)
def test_a_wrong_setup_writes_nothing(
    config: ExtractConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object] | Callable[[dict[str, object], Path], None],
    error: type[PatchbankError],
    words: str,
) -> None:
    photographs(tmp_path / "images", 3)
    dataset = load_dataset("folder", tmp_path / "images")
    if callable(change):
        change({"monkeypatch": monkeypatch}, tmp_path)
    else:
        config = replace(config, **change)
    with pytest.raises(error, match=words):
        extract(dataset, tmp_path / "banks/bank", config)
    assert not (tmp_path / "banks").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp8"},
        {"dtype": "int4"},
        {"resize": "stretch"},
        {"batch_size": 0},
        {"workers": -1},
        {"limit": 0},
        {"overwrite": True, "partition": Partition(0, 2)},
    ],
)
def test_options_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ExtractConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", "²/3"])
def test_partitions_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        Partition.parse(text)


def test_a_bank_of_a_later_format_is_refused(images: Path, tiny_config: ExtractConfig, tmp_path: Path) -> None:
    extract(load_dataset("folder", images), tmp_path, tiny_config)
    [path] = parts_in(tmp_path)
    content = json.loads(path.read_text())

    def replaced(text: str) -> None:
        """Replace the part by another document, under its proper name."""
        [now] = parts_in(tmp_path)
        now.unlink()
        (now.parent / f"index-00000-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json").write_text(text)

    for change, words in (({"version": 3}, "format version 3"), ({"format": "zarr"}, "its format is 'zarr'")):
        replaced(json.dumps(content | change))
        with pytest.raises(BankError, match=words):
            open_bank(tmp_path)
    del content["manifest"]["input"]
    for damaged in (json.dumps(content), "{", "[]"):
        replaced(damaged)
        with pytest.raises(BankError, match="damaged"):
            open_bank(tmp_path)


def test_two_runs_at_once_are_harmless(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str]
) -> None:
    """The second starts, does everything and ends during the first."""
    dataset = load_dataset("folder", images)
    plan = make_plan(dataset, tmp_path, config)
    runner = load_runner(plan)
    began = False

    def meanwhile(*_: object) -> None:
        nonlocal began
        if not began:
            began = True
            extract(dataset, tmp_path, config)

    execute(plan, runner, progress=OnBatch(meanwhile))
    assert began
    assert contents(tmp_path) == expected


def test_failures_by_their_kind(config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 2)
    words = broken_files(tmp_path / "images")
    summary = extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    assert summary.images == 2
    assert summary.failures.keys() == words.keys()
    assert open_bank(tmp_path / "bank").failures == dict(sorted(summary.failures.items()))


def test_banks_must_fit_on_the_disk_together(
    tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs(tmp_path / "images", 3)
    dataset = load_dataset("folder", tmp_path / "images")
    one = make_plan(dataset, tmp_path / "one", tiny_config)
    other = make_plan(dataset, tmp_path / "other", tiny_config)
    assert one.bytes_needed >= 3 * 4096
    monkeypatch.setattr("patchbank.bank.writer.free_bytes", lambda _: one.bytes_needed)
    check_disk([one])
    check_disk([other])
    with pytest.raises(BankError, match="Not enough disk"):
        check_disk([one, other])

    # The old bank stays until the new one is complete.
    extract(dataset, tmp_path / "one", tiny_config)
    again = make_plan(dataset, tmp_path / "one", replace(tiny_config, overwrite=True))
    assert again.bytes_freed == 3 * (tmp_path / "one/photo_0000_clip.pkl").stat().st_size
    check_disk([again])
    monkeypatch.setattr("patchbank.bank.writer.free_bytes", lambda _: again.bytes_needed - 1)
    with pytest.raises(BankError, match=r"beside the old bank .*Free some space \(the old bank's"):
        check_disk([again])


def test_a_first_image_that_is_missing_is_one_failure(config: ExtractConfig, tmp_path: Path) -> None:
    hico_root(tmp_path, 3, splits=["test"])
    dataset = load_dataset("hicodet", tmp_path, "test")
    dataset.samples[0].path.unlink()
    summary = extract(dataset, tmp_path / "bank", config)
    assert summary.images == 2
    assert list(summary.failures) == [dataset.samples[0].key]


def test_a_resumed_run_reads_the_bank_once(
    images: Path, tiny_config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part once, except for the one with the manifest."""
    monkeypatch.setattr("patchbank.bank.parts.PART_SIZE", 2)
    dataset, config = load_dataset("folder", images), replace(tiny_config, limit=9)
    extract(dataset, tmp_path, config)
    read: list[str] = []
    read_part = parts.read_part
    monkeypatch.setattr(parts, "read_part", lambda payload, name: read.append(name) or read_part(payload, name))
    extract(dataset, tmp_path, config)
    first, *others = [path.name for path in parts_in(tmp_path)]
    assert len(others) == 4
    assert [name for name in read if name != first] == others


def test_what_another_run_commits_after_the_plan_is_not_made_again(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str]
) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path / "bank", replace(config, limit=5))
    plan = make_plan(dataset, tmp_path / "bank", config)
    extract(dataset, tmp_path / "bank", config)
    assert execute(plan, load_runner(plan)).images == 0
    assert contents(tmp_path / "bank") == expected


def test_fast_decoding_is_another_input_and_is_verified_by_itself(
    images: Path, config: ExtractConfig, tmp_path: Path
) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path / "bank", replace(config, decode="fast"))
    with pytest.raises(BankError, match="input decoder: the bank has fast, this run exact"):
        extract(dataset, tmp_path / "bank", config)
    bank = open_bank(tmp_path / "bank")
    assert bank.manifest.input.decoder == "fast"
    runner = load_runner(make_plan(dataset, tmp_path / "again", config))
    assert runner is not None
    again = recompute(dataset, runner, bank.manifest.input)
    exact = recompute(dataset, runner, runner.spec.input)
    key = "photo_0001.jpg"
    fast, other = again(key), exact(key)
    assert fast is not None and other is not None
    assert relative_error(bank[key], fast[GRID]) <= 2e-6
    assert relative_error(bank[key], other[GRID]) > 2e-6


def test_what_vanishes_after_the_plan_is_made_again(
    images: Path, config: ExtractConfig, tmp_path: Path, expected: dict[str, str]
) -> None:
    dataset, bank = load_dataset("folder", images), tmp_path / "bank"
    extract(dataset, bank, replace(config, limit=5))
    plan = make_plan(dataset, bank, config)
    shutil.rmtree(bank)
    execute(plan, load_runner(plan))
    assert contents(bank) == expected


def test_pickles_that_vanish_after_the_plan_are_made_again(
    images: Path, tiny_config: ExtractConfig, tmp_path: Path, expected_pickles: dict[str, str]
) -> None:
    dataset = load_dataset("folder", images)
    extract(dataset, tmp_path, replace(tiny_config, limit=5))
    plan = make_plan(dataset, tmp_path, tiny_config)
    (tmp_path / "photo_0002_clip.pkl").unlink()
    execute(plan, load_runner(plan))
    assert contents(tmp_path) == expected_pickles


def test_a_bar_in_an_interactive_session_or_on_request(tiny_weights: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 4)
    (tmp_path / "images/broken.jpg").write_bytes(b"no image")

    def stderr(out: str, progress: object, *options: str) -> str:
        program = (
            "from patchbank import ExtractConfig, extract, load_dataset\n"
            "from tests.support import MODELS, TINY\n"
            "MODELS['tiny'] = TINY\n"
            f"config = ExtractConfig(model='tiny', weights={str(tiny_weights)!r})\n"
            f"extract(load_dataset('folder', {str(tmp_path / 'images')!r}), {str(tmp_path / out)!r}, config,"
            f" progress={progress})\n"
        )
        done = subprocess.run(
            [sys.executable, *options], input=program, cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stderr

    bar = stderr("asked", True)
    assert "loading and packing weights" in bar and "5/5" in bar and "failed=1" in bar
    assert stderr("script", None) == ""
    assert "5/5" in stderr("session", None, "-i", "-q")
    assert "images" not in stderr("silent", False, "-i", "-q")
