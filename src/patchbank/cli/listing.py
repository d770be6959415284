"""Which images a bank should hold: from the command's options, from what the bank says, from where it lies."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.config import ARCHIVES
from patchbank.errors import ConfigError, DatasetError
from patchbank.features import UNKNOWN
from patchbank.locations import locate

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.datasets import Dataset

_PANEL = "The images that it should hold"

DatasetName = Annotated[
    str | None,
    typer.Option("--dataset", metavar="NAME", help="hicodet, vcoco or folder.", rich_help_panel=_PANEL),
]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="SPLIT", help="train, test (hicodet); train, val (vcoco).", rich_help_panel=_PANEL),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="The EZ-HOI checkout that has them.", rich_help_panel=_PANEL),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        parser=locate,
        metavar="DIR",
        help="Another image directory, or its URL; a folder's.",
        rich_help_panel=_PANEL,
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option("--annotations", metavar="FILE", help="Another annotation file.", rich_help_panel=_PANEL),
]

# EZ-HOI's name of a bank: clipbase_img_hicodet_train.
_BANK_NAME = re.compile(r".*_img_(hicodet|vcoco)_(train|test|val)")


@dataclass(frozen=True)
class Listing:
    """The images that a bank should hold.

    Attributes:
        dataset: ``hicodet``, ``vcoco``, ``folder``; None where only an annotation file is known.
        split: the split's name, if it has any.
        root, images, annotations: where they lie, as far as that is known.
        options: the command's options that led here, as one gives them; empty if none were needed.
    """

    dataset: str | None
    split: str | None
    root: Path | None
    images: Path | None
    annotations: Path | None
    options: str = ""

    @property
    def source(self) -> Path:
        """What the names are read from."""
        from patchbank.datasets import find_annotations

        if self.annotations is not None:
            return self.annotations
        if self.dataset == "folder" or self.dataset is None:
            return self.images or Path()
        return find_annotations(self.dataset, self.root or Path(), self.split or "")

    def keys(self) -> list[str]:
        """Every listed image once. Raises DatasetError."""
        from patchbank.datasets import read_file_names

        if self.dataset == "folder":
            return [sample.key for sample in self.load().samples]
        return list(dict.fromkeys(read_file_names(self.source)))

    def load(self) -> Dataset:
        """The data set with its images. Raises DatasetError where they are not there, ConfigError on a wrong split."""
        from patchbank.datasets import load_dataset

        if self.dataset == "folder":
            return load_dataset("folder", self.images or Path())
        if self.dataset is None:
            raise ConfigError("An annotation file alone says which images there are and not where: add --dataset.")
        return load_dataset(
            self.dataset, self.root or Path(), self.split, images=self.images, annotations=self.annotations
        )


def find_listing(
    bank: Path,
    manifest: Manifest | None,
    *,
    dataset: str | None,
    split: str | None,
    root: Path | None,
    images: Path | None,
    annotations: Path | None,
) -> Listing | None:
    """What a bank is to be compared with; None where nothing tells.

    Without options, the data set and split are those that the bank says it is of, or that its directory is named
    for, and the root is the EZ-HOI checkout that it lies in. Raises ConfigError on options that do not go together.
    """
    from patchbank.datasets import SPLITS

    asked = any(option is not None for option in (dataset, split, root, images, annotations))
    root, annotations = (path and path.expanduser() for path in (root, annotations))
    name, own_split = _own_dataset(bank, manifest)
    if dataset not in (None, *SPLITS, "folder"):
        raise ConfigError(f"There is no dataset {dataset!r}. Choose from: {', '.join([*SPLITS, 'folder'])}.")
    if dataset is None and name is None and images is not None and annotations is None:
        dataset = "folder"
    _refuse_contradiction(bank, manifest, dataset, split)
    chosen = dataset or name
    if chosen == "folder" and images is None:
        if asked:
            raise ConfigError("Of a folder, give its directory of images with --images.")
        return None
    if chosen in SPLITS:
        split = split or (own_split if chosen == name else None)
        if split not in SPLITS[chosen]:
            wrong = "Say which --split" if split is None else f"There is no split {split!r}"
            raise ConfigError(f"{wrong} of {chosen}: {' or '.join(SPLITS[chosen])}.")
    if chosen in ARCHIVES:
        if annotations is None and not asked:
            return None
        if annotations is None or images is not None or root is not None:
            raise ConfigError(
                f"{bank} was made of {chosen} files, which are not read here: give a list of its keys with "
                "--annotations, or leave the options out. `patchbank extract` with the files makes what is missing."
            )
        chosen = None
    if chosen is None and annotations is None:
        if asked:
            raise ConfigError("Say which --dataset and --split it is of, or give the --annotations.")
        return None
    given: dict[str, object] = {"dataset": dataset, "split": split if asked else None, "root": root, "images": images}
    given["annotations"] = annotations
    options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    listing = Listing(chosen, split if chosen in SPLITS else None, root, images, annotations, options)
    if root is None and chosen in SPLITS:
        listing = replace(listing, root=Path(os.path.relpath(bank.absolute().parent.parent)))
        if annotations is None and not _there(listing):
            listing = replace(listing, root=Path())
            if not asked and not _there(listing):
                return None
    return listing


def _refuse_contradiction(bank: Path, manifest: Manifest | None, dataset: str | None, split: str | None) -> None:
    if manifest is None or manifest.dataset == UNKNOWN:
        return
    for what, asked, own in (("dataset", dataset, manifest.dataset), ("split", split, manifest.split)):
        if asked is not None and asked != own:
            raise ConfigError(f"{bank} is a bank of {manifest.title}, and --{what} says {asked}: leave it out.")


def options_needed(manifest: Manifest | None) -> str:
    """The options to name a list with, where none is found, for a message: the user has to fill them in."""
    if manifest is not None and manifest.dataset == "folder":
        return " --images DIR"
    if manifest is not None and manifest.dataset in ARCHIVES:
        return " --annotations FILE"
    return " --dataset NAME --split SPLIT --root DIR"


def _there(listing: Listing) -> bool:
    try:
        return listing.source.exists()
    except DatasetError:
        return False


def _own_dataset(bank: Path, manifest: Manifest | None) -> tuple[str | None, str | None]:
    if manifest is not None and manifest.dataset != UNKNOWN:
        return manifest.dataset, manifest.split
    match = _BANK_NAME.fullmatch(bank.resolve().name)
    return (match[1], match[2]) if match else (None, None)
