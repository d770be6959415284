"""`convert`: between layouts and dtypes, to the same bytes every time, with the whole manifest."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.bank.convert import Converted, convert, import_pickles
from patchbank.bank.manifest import Manifest
from patchbank.errors import BankError, ConfigError
from patchbank.locations import locate
from tests.bank.test_check import damage_numbers
from tests.support import contents, photographs, relative_error, tiny_manifest

SIZE = 3 * 2176


def converted(source: Path, target: Path, layout: str, dtype: str | None = None, **options: object) -> Converted:
    return convert(open_bank(source), target, layout, dtype, **{"shard_size": SIZE, **options})  # type: ignore[arg-type]


def test_pickles_to_shards_and_back_are_the_same_bytes(banks: Path, tmp_path: Path) -> None:
    done = converted(banks / "ezhoi", tmp_path / "shards", "shards")
    assert (done.features, done.failures, done.damaged, done.refused) == (7, 1, {}, {})
    converted(tmp_path / "shards", tmp_path / "back", "ezhoi")
    assert contents(tmp_path / "back") == contents(banks / "ezhoi")
    assert verify(tmp_path / "shards").problems == verify(tmp_path / "back").problems  # the failure alone


def test_shards_to_shards_are_the_same_bytes(banks: Path, tmp_path: Path) -> None:
    """In the order of their keys, which is the order of a folder's images."""
    converted(banks / "shards", tmp_path / "same", "shards")
    assert contents(tmp_path / "same") == contents(banks / "shards")
    converted(banks / "shards", tmp_path / "larger", "shards", shard_size=10**6)
    assert len(contents(tmp_path / "larger")) == 1
    assert all(
        torch.equal(open_bank(tmp_path / "larger").cls(key), open_bank(banks / "shards").cls(key))
        for key in open_bank(banks / "shards")
    )


def test_half_precision_shards_become_pickles_that_ez_hoi_reads(banks: Path, tmp_path: Path) -> None:
    converted(banks / "shards", tmp_path / "half", "shards", "float16")
    done = converted(tmp_path / "half", tmp_path / "pickles", "ezhoi")
    assert done.manifest.dtype == "float32"
    opened = open_bank(tmp_path / "pickles")
    assert opened.manifest.rounded == ("float16",)
    for key, original in open_bank(banks / "ezhoi").items():
        with open(tmp_path / "pickles" / f"{key.split('.')[0]}_clip.pkl", "rb") as file:
            tokens = pickle.load(file)
        assert tokens.dtype == torch.float32
        assert torch.equal(tokens, original.half().float())
        assert opened.transform(key) == open_bank(banks / "ezhoi").transform(key)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_was_rounded_is_not_changed_by_being_stored_so_again(banks: Path, tmp_path: Path, dtype: str) -> None:
    converted(banks / "shards", tmp_path / "rounded", "shards", dtype)
    converted(tmp_path / "rounded", tmp_path / "wide", "shards", "float32")
    converted(tmp_path / "wide", tmp_path / "again", "shards", dtype)
    again, rounded = open_bank(tmp_path / "again"), open_bank(tmp_path / "rounded")
    for key, tokens in rounded.items():
        assert torch.equal(tokens, again[key])
    if dtype != "int8":  # its [CLS] features stay float16 on the way
        assert contents(tmp_path / "again") == contents(tmp_path / "rounded")
    assert all(relative_error(again[key].float(), open_bank(banks / "ezhoi")[key]) < 1e-2 for key in again)


def test_the_dtypes_that_rounded_the_numbers_are_remembered() -> None:
    def chain(*dtypes: str) -> str:
        manifest: Manifest = tiny_manifest("shards", dtypes[0])
        for dtype in dtypes[1:]:
            manifest = manifest.stored_as("shards", dtype)  # type: ignore[arg-type]
        return " > ".join([*manifest.rounded, manifest.dtype])

    assert chain("float32", "float16") == "float16"
    assert chain("float32", "float16", "float32") == "float16 > float32"
    assert chain("float32", "float16", "float32", "float16") == "float16"
    assert chain("int8", "float32", "float16", "float32") == "int8 > float16 > float32"
    assert chain("int8", "float32", "bfloat16") == "int8 > bfloat16"
    assert chain("float16", "bfloat16", "float16") == "float16 > bfloat16 > float16"
    assert chain("float32", "float32") == "float32"


def test_a_stopped_conversion_goes_on(banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchbank.bank.convert._AT_ONCE", 2)
    for layout in ("ezhoi", "shards"):
        target = tmp_path / layout
        steps = 0
        while True:
            stop = Event()
            done = converted(banks / "shards", target, layout, stop=stop, progress=lambda *_, stop=stop: stop.set())
            steps += 1
            if not done.remaining:
                break
        assert steps >= 3
        assert done.already_done >= 4
        assert converted(banks / "shards", target, layout).features == 0
        converted(banks / "shards", tmp_path / "whole", layout, overwrite=True)
        assert contents(target) == contents(tmp_path / "whole")
        stop = Event()
        halt = {"overwrite": True, "stop": stop, "progress": lambda *_, stop=stop: stop.set()}
        assert converted(banks / "shards", target, layout, "float16", **halt).remaining
        assert contents(tmp_path / "whole").items() < contents(target).items()
        assert converted(banks / "shards", target, layout, "float16", overwrite=True).already_done
        converted(banks / "shards", tmp_path / f"half_{layout}", layout, "float16")
        assert contents(target) == contents(tmp_path / f"half_{layout}")


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
def test_what_has_changed_in_the_source_is_converted_again(
    banks: Path, tmp_path: Path, tiny_config: ExtractConfig, layout: str
) -> None:
    shutil.copytree(banks / "images", tmp_path / "images")
    source = shutil.copytree(banks / "ezhoi", tmp_path / "source")
    converted(source, tmp_path / "target", layout, "float16")
    shutil.copy(tmp_path / "images/photo_0004.jpg", tmp_path / "images/photo_0001.jpg")
    (source / "photo_0001_clip.pkl").unlink()
    extract(load_dataset("folder", tmp_path / "images"), source, tiny_config)
    done = converted(source, tmp_path / "target", layout, "float16")
    assert (done.features, done.already_done) == (1, 6)
    target = open_bank(tmp_path / "target")
    assert torch.equal(target["photo_0001.jpg"], open_bank(source)["photo_0001.jpg"].half())
    assert torch.equal(target["photo_0001.jpg"], target["photo_0004.jpg"])
    target.check("photo_0001.jpg")


def test_damaged_features_are_not_carried_over(banks: Path, tmp_path: Path) -> None:
    for layout in ("ezhoi", "shards"):
        source = shutil.copytree(banks / layout, tmp_path / f"from_{layout}")
        damage_numbers(open_bank(source).file("photo_0006.jpg"))
        [damaged] = {finding.name for finding in verify(source).problems} - {"a.jpg"}
        done = converted(source, tmp_path / layout, "shards")
        assert list(done.damaged) == [damaged]
        assert "patchbank repair" in done.damaged[damaged]
        assert damaged not in open_bank(tmp_path / layout)
        shutil.rmtree(source)
        shutil.copytree(banks / layout, source)  # once it is fixed, the same call completes the bank
        assert converted(source, tmp_path / layout, "shards").features == 1
        converted(source, tmp_path / "fresh", "shards", overwrite=True)
        assert contents(tmp_path / layout) == contents(tmp_path / "fresh")


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tokens = torch.randn(16, 32)
    for name, factor in (("a", 1.0), ("b", 1e6)):
        (source / f"{name}_clip.pkl").write_bytes(pickle.dumps(tokens * factor))
    import_pickles(source, tmp_path / "bank", tiny_manifest())
    done = converted(tmp_path / "bank", tmp_path / "half", "shards", "float16")
    assert (done.features, list(done.refused)) == (1, ["b"])
    assert converted(tmp_path / "bank", tmp_path / "int8", "shards", "int8").features == 2


def test_what_cannot_be_converted(banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BankError, match="is the source itself"):
        converted(banks / "ezhoi", banks / "images/../ezhoi", "shards")
    (tmp_path / "link").symlink_to(banks / "ezhoi")
    for target in (banks / "ezhoi/sub", banks, tmp_path / "link/sub"):
        with pytest.raises(BankError, match="or in it"):
            converted(banks / "ezhoi", target, "shards", overwrite=True)
    with pytest.raises(ConfigError, match="int8 is for layout shards"):
        converted(banks / "ezhoi", tmp_path / "int8", "ezhoi", "int8")
    with pytest.raises(BankError, match="layout: the bank has shards, this run ezhoi"):
        converted(banks / "ezhoi", banks / "shards", "ezhoi")
    converted(banks / "ezhoi", tmp_path / "half", "shards", "float16")
    with pytest.raises(BankError, match="dtype: the bank has float16, this run float32"):
        converted(banks / "ezhoi", tmp_path / "half", "shards")
    monkeypatch.setattr("patchbank.bank.writer.free_bytes", lambda _: 100)
    with pytest.raises(BankError, match="Not enough disk"):
        converted(banks / "ezhoi", tmp_path / "full", "shards")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("target", ["s3a://b/bank", "s3://b//bank/", "s3://b/bank/sub", "s3://b"])
def test_other_names_of_the_source_are_refused(target: str) -> None:
    bank = SimpleNamespace(path=locate("s3://b/bank"))
    with pytest.raises(BankError, match="is the source itself"):
        convert(bank, locate(target), "shards", shard_size=1, overwrite=True)  # type: ignore[arg-type]


def test_the_same_directory_under_another_mount_is_refused(
    banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount has the directory's own device and number, and no link to resolve."""
    mount, stat = tmp_path / "mount", os.stat
    mount.mkdir()
    monkeypatch.setattr(os, "stat", lambda path, **more: stat(banks / "ezhoi" if path == mount else path, **more))
    with pytest.raises(BankError, match="is the source itself"):
        converted(banks / "ezhoi", mount / "sub", "shards", overwrite=True)


def test_keys_that_share_a_pickle_stay_shards(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 2)
    for number in (0, 1):
        (tmp_path / f"images/photo_000{number}.jpg").rename(tmp_path / f"images/frame.{number}.jpg")
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", replace(tiny_config, layout=None))
    with pytest.raises(BankError, match="would share one pickle"):
        converted(tmp_path / "bank", tmp_path / "pickles", "ezhoi")
    assert not (tmp_path / "pickles").exists()
