"""The ``ezhoi`` layout: one pickle an image, named as EZ-HOI's reader expects it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from patchbank.errors import BankError

SUFFIX = "_clip.pkl"


def bank_directory(root: Path, dataset: str) -> Path:
    """Where EZ-HOI keeps a data set's banks: ``ROOT/hicodet_pkl_files``."""
    return root / f"{dataset}_pkl_files"


def bank_name(prefix: str, dataset: str, split: str) -> str:
    """A bank's name as the original scripts give it: ``clipbase_img_hicodet_train``."""
    return f"{prefix}_img_{dataset}_{split}"


def pickle_name(key: str) -> str:
    """The key's file, relative to the bank: ``a.b.jpg`` -> ``a_clip.pkl``.

    The reader cuts a file name at its *first* dot. Directories in a key stay as they are.
    """
    path = PurePosixPath(key)
    return (path.parent / (path.name.split(".")[0] + SUFFIX)).as_posix()


def check_names(keys: Iterable[str]) -> None:
    """Raise BankError, naming both, if two keys share one pickle."""
    owners: dict[str, str] = {}
    for key in keys:
        name = pickle_name(key)
        if (other := owners.setdefault(name, key)) != key:
            raise BankError(
                f"{other!r} and {key!r} would share one pickle, {name}: EZ-HOI cuts names at their first dot. "
                "Rename one of them (and its entry in the annotations, if it has one). Nothing was written."
            )


def pickles_in(directory: Path, below: str = "") -> Iterator[tuple[str, int]]:
    """(name relative to `directory`, size in bytes) of every pickle in it, at any depth."""
    with os.scandir(directory / below) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from pickles_in(directory, f"{below}{entry.name}/")
            elif entry.name.endswith(SUFFIX):
                yield below + entry.name, entry.stat().st_size
