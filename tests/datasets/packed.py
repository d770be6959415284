"""A directory's images packed into tars or Parquet files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from patchbank import load_dataset
from patchbank.datasets import Dataset


def packed(kind: str, images: Path, directory: Path, files: int) -> Dataset:
    """The images of a directory by name, in so many files of a kind (``tar``, ``parquet``)."""
    directory.mkdir()
    members = [(path.name, path.read_bytes()) for path in sorted(images.iterdir())]
    each = -(-len(members) // files)
    paths = [directory / f"{number}.{kind}" for number in range(files)]
    for number, path in enumerate(paths):
        some = members[number * each : (number + 1) * each]
        write_tar(path, some) if kind == "tar" else write_table(path, some)
    options = {} if kind == "tar" else {"key_column": "name"}
    return load_dataset(kind, paths, **options)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_table(path: Path, members: Sequence[tuple[str, bytes]], group: int = 3) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names, images = zip(*members, strict=True)
    parquet.write_table(pyarrow.table({"name": names, "image": images}), path, row_group_size=group)
    return path
