"""The runs that faults happen to: a long one of the program, and a short one in the tests' own process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from patchbank import extract, load_dataset
from patchbank.config import ExtractConfig
from tests.faults.processes import run
from tests.support import contents, photographs

BROKEN = {"photo_0030a.jpg", "photo_0070a.jpg"}


@dataclass(frozen=True)
class Extraction:
    """A run of the program, as a process, that lasts long enough for a fault.

    Attributes:
        arguments: of the command line, all but ``--out``.
        images: the directory of its images.
        layout: of its bank.
        expected: the uninterrupted bank's `contents`.
        count: images with a feature.
    """

    arguments: tuple[str, ...]
    images: Path
    layout: str
    expected: dict[str, str]
    count: int

    def to(self, bank: Path, *more: object) -> tuple[object, ...]:
        """The command line that makes a bank."""
        return *self.arguments, "--out", bank, *more


def committed(bank: Path) -> list[Path]:
    """The features' files of a bank."""
    return [*bank.glob("*_clip.pkl"), *bank.glob("shard-*")]


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with enough photographs for an interruption, and two images that cannot be read."""
    directory = tmp_path_factory.mktemp("many")
    photographs(directory, 100, size=(80, 60))
    (directory / "photo_0030a.jpg").write_bytes(b"")
    (directory / "photo_0070a.jpg").write_bytes(b"no image")
    return directory


# For tests that do not depend on the layout: shards, and with --all pickles too.
in_shards = pytest.mark.parametrize(
    "extraction", ["shards", pytest.param("ezhoi", marks=pytest.mark.full)], indirect=True
)


@pytest.fixture(scope="session", params=["ezhoi", "shards"])
def extraction(
    many: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Extraction:
    """The extraction of that folder, in either layout; a shard holds nine images."""
    arguments = ("extract", "folder", str(many), "--layout", request.param, "--shard-size", "20kB")
    arguments += ("--model", "tiny", "--weights", str(tiny_weights), "--batch-size", "4")
    place = tmp_path_factory.mktemp("uninterrupted")
    run(place / "printed", *arguments, "--out", place / "bank", check=1)
    return Extraction(arguments, many, request.param, contents(place / "bank"), 100)


@dataclass(frozen=True)
class Short:
    """A run of a few images in this process.

    Attributes:
        images: the directory of seven images, one of which, ``photo_0003a.jpg``, cannot be read.
        config: in batches of four, into shards for three.
        expected: the uninterrupted bank's `contents`.
    """

    images: Path
    config: ExtractConfig
    expected: dict[str, str]


@pytest.fixture(scope="session", params=["ezhoi", "shards"])
def short(
    tiny_config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Short:
    """A short run, in either layout."""
    place = tmp_path_factory.mktemp("short")
    photographs(place / "images", 6)
    (place / "images/photo_0003a.jpg").write_bytes(b"")
    config = replace(tiny_config, layout=request.param, shard_size=3 * 2176)
    extract(load_dataset("folder", place / "images"), place / "bank", config)
    return Short(place / "images", config, contents(place / "bank"))
