"""Banks for the pages' tests, and a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from patchbank import Bank, Dataset, extract, load_dataset, open_bank
from patchbank.config import ExtractConfig
from tests.browser import NoBrowserError, headless_browser
from tests.support import hico_root, photographs

# Names that run, end the data or change the page if they are not treated as text.
HOSTILE = [
    "<img src=x onerror=window.hacked=1>.jpg",
    "</script><script>window.hacked=2</script>.jpg".replace("/", "\u2215"),
    "\"'><svg onload=window.hacked=3>.jpg",
    "]]><!--{{ 7 * 7 }}{% raw %}.jpg",
    "\u202egpj.exe\x07.jpg",
]


@pytest.fixture(scope="session")
def annotated(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> tuple[Bank, Dataset]:
    """Ten photographs with HICO-DET's annotations, of a tiny untrained model."""
    root = hico_root(tmp_path_factory.mktemp("annotated"), 10, splits=["train"])
    dataset = load_dataset("hicodet", root, "train")
    extract(dataset, root / "bank", tiny_config)
    return open_bank(root / "bank"), dataset


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_config: ExtractConfig) -> tuple[Bank, Dataset]:
    """Images with hostile names, and one that fails."""
    directory = tmp_path_factory.mktemp("hostile")
    names = photographs(directory / "images", len(HOSTILE))
    for name, hostile in zip(names, HOSTILE, strict=True):
        (directory / "images" / name).rename(directory / "images" / hostile)
    (directory / "images" / "<b>broken</b>.jpg".replace("/", "\u2215")).write_bytes(b"no picture")
    dataset = load_dataset("folder", directory / "images")
    extract(dataset, directory / "bank", replace(tiny_config, layout="shards"))
    return open_bank(directory / "bank"), dataset


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, Debian's."""
    try:
        with headless_browser() as browser:
            yield browser
    except NoBrowserError as error:
        pytest.skip(str(error))
