"""The shell's completion: what it proposes, and that it never says a word of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchbank import ExtractConfig, extract, load_dataset
from tests.support import REPOSITORY, parts_in, photographs


def proposed(*words: object) -> list[str]:
    """What bash is told for a line whose last word is incomplete."""
    line = "\n".join(["patchbank", *map(str, words)])
    asked = {"_PATCHBANK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", "from patchbank.cli import main; main()"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.stderr == ""
    return list(filter(None, done.stdout.splitlines()))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["extract", "folder", "images", "--model", "ViT-L"], ["ViT-L/14", "ViT-L/14@336px"]),
        (["bench", "--model", "ViT-B"], ["ViT-B/32", "ViT-B/16"]),
        (["extract", "hicodet", "--split", ""], ["train", "test"]),
        (["extract", "vcoco", "--split", "v"], ["val"]),
        (["verify", "bank", "--split", "t"], ["train", "test"]),
        (["info", "bank", "--dataset", ""], ["hicodet", "vcoco", "folder"]),
        (["extract", "tar", "a.tar", "--precision", "f"], ["fp32", "fp16"]),
    ],
)
def test_values_of_options(words: list[str], expected: list[str]) -> None:
    assert proposed(*words) == expected


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
def test_keys_of_the_bank_in_the_line(layout: str, tiny_config: ExtractConfig, tmp_path: Path) -> None:
    names = photographs(tmp_path / "images", 4)
    (tmp_path / "images/photo_\x1b.jpg").write_bytes((tmp_path / "images" / names[0]).read_bytes())
    bank = tmp_path / "bank"
    options = {"layout": layout, "shard_size": 2 * 2200}
    extract(load_dataset("folder", tmp_path / "images"), bank, ExtractConfig(**vars(tiny_config) | options))
    assert sorted(proposed("show", bank, "photo_")) == names
    assert proposed("show", bank, names[2][:-4]) == [names[2]]
    assert proposed("show", tmp_path / "nowhere", "photo_") == proposed("show", "s3://nowhere/bank", "") == []
    damaged = parts_in(bank)[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert set(proposed("show", bank, "photo_")) <= set(names)
