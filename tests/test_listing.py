"""Which images a bank should hold, without an option that names them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.convert import convert
from patchbank.listing import ListingOptions, find_listing
from tests.support import hico_root, patchbank, photographs


def test_a_folders_bank_finds_its_images_wherever_both_are(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "a/images", 3)
    extract(load_dataset("folder", tmp_path / "a/images"), tmp_path / "a/banks/one", tiny_config)
    (tmp_path / "a").rename(tmp_path / "b")
    bank = open_bank(tmp_path / "b/banks/one")
    found = find_listing(bank.path, bank.manifest, ListingOptions())
    assert found is not None and found.images is not None and found.images.samefile(tmp_path / "b/images")
    convert(bank, tmp_path / "two", "shards", shard_size=1 << 20)
    copied = find_listing(tmp_path / "two", bank.manifest, ListingOptions())
    assert copied is not None and copied.images is not None and copied.images.samefile(tmp_path / "b/images")
    assert find_listing(bank.path, bank.manifest, ListingOptions(), recall=False) is None
    [log] = (bank.path / "runs").iterdir()
    for change in ({"folder": "../../other"}, {"seal": ""}, {"folder": "x" * 300}):  # of others: it chooses no images
        log.write_text(json.dumps(json.loads(content := log.read_text()) | change))
        assert find_listing(bank.path, bank.manifest, ListingOptions()) is None
        convert(bank, tmp_path / f"copy-{len(str(change))}", "shards", shard_size=1 << 20)
        assert find_listing(tmp_path / f"copy-{len(str(change))}", bank.manifest, ListingOptions()) is None
        log.write_text(content)
    (tmp_path / "b/images").rename(tmp_path / "b/gone")
    photographs(tmp_path / "b/other", 1)
    (tmp_path / "b/other/photo_0000.jpg").rename(tmp_path / "b/other/else.jpg")
    (tmp_path / "b/other").rename(tmp_path / "b/images")  # another folder in its place
    assert find_listing(bank.path, bank.manifest, ListingOptions()) is None


def test_a_banks_name_says_its_dataset_with_and_without_what_ezhoi_does_not_read(tmp_path: Path) -> None:
    hico_root(tmp_path, 2)
    for name in ("clipbase_img_hicodet_train", "clipbase_img_hicodet_train_squash_float16"):
        found = find_listing(tmp_path / "hicodet_pkl_files" / name, None, ListingOptions())
        assert found is not None and (found.dataset, found.split) == ("hicodet", "train")
    assert find_listing(tmp_path / "hicodet_pkl_files/clipbase_img_hicodet_training", None, ListingOptions()) is None


def test_a_folders_bank_that_was_made_from_scratch_remembers_its_images(
    tmp_path: Path, tiny_config: ExtractConfig
) -> None:
    photographs(tmp_path / "images", 2)
    for overwrite in (False, True):
        config = replace(tiny_config, overwrite=overwrite)
        extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
        bank = open_bank(tmp_path / "bank")
        found = find_listing(bank.path, bank.manifest, ListingOptions())
        assert found is not None and found.images is not None and found.images.samefile(tmp_path / "images")


def test_the_folder_of_a_run_with_a_limit_is_no_list_for_verify(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 3)
    options = ("--model", "tiny", "--weights", tiny_weights)
    patchbank("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *options, "--limit", 2, check=0)
    assert "completeness not checked" in patchbank("verify", tmp_path / "bank", check=0).stdout
    sample = ("--sample", 2, "--weights", tiny_weights)  # for which it finds the images
    done = patchbank("verify", tmp_path / "bank", *sample, check=1)
    assert "2 extracted again" in " ".join(done.stdout.split())
