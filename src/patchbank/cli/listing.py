"""Which images a bank should hold: from the command's options, from what the bank says, from where it lies."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.config import ARCHIVES, as_path, option
from patchbank.errors import ConfigError, DatasetError
from patchbank.features import UNKNOWN
from patchbank.locations import locate

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.datasets import Dataset

_DATA = "Data"


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """Which images a command works on, as its options say."""

    dataset: str | None = option(None, "hicodet, vcoco or folder.", _DATA, metavar="NAME")
    split: str | None = option(None, "train or test (hicodet), train or val (vcoco).", _DATA)
    root: Path | None = option(
        None, "EZ-HOI checkout, with hicodet/, vcoco/ and checkpoints/.", _DATA, metavar="DIR", parse=as_path
    )
    images: Path | None = option(
        None, "Image directory or URL (s3://...), for one --split.", _DATA, metavar="DIR", parse=locate
    )
    annotations: Path | None = option(
        None, "Annotation file for one --split; the format is detected.", _DATA, metavar="FILE", parse=as_path
    )

    @property
    def given(self) -> bool:
        """Whether any option is."""
        return any(value is not None for value in vars(self).values())


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


def find_listing(bank: Path, manifest: Manifest | None, asked: ListingOptions) -> Listing | None:
    """The images that a bank should hold; None where neither the options nor the bank say.

    Without options, the data set and split are those that the bank says it is of, or that its directory is named
    for, and the root is the EZ-HOI checkout that it lies in. Raises ConfigError on options that do not go together.
    """
    from patchbank.datasets import SPLITS

    dataset, split, root = asked.dataset, asked.split, asked.root
    images, annotations = asked.images, asked.annotations
    name, own_split = _own_dataset(bank, manifest)
    if dataset not in (None, *SPLITS, "folder"):
        raise ConfigError(f"There is no dataset {dataset!r}. Choose from: {', '.join([*SPLITS, 'folder'])}.")
    if dataset is None and name is None and images is not None and annotations is None:
        dataset = "folder"
    _refuse_contradiction(bank, manifest, dataset, split)
    chosen = dataset or name
    if chosen == "folder" and images is None:
        if asked.given:
            raise ConfigError("Name the folder's images: --images DIR.")
        return None
    if chosen in SPLITS:
        split = split or (own_split if chosen == name else None)
        if split not in SPLITS[chosen]:
            wrong = "Say which --split" if split is None else f"There is no split {split!r}"
            raise ConfigError(f"{wrong} of {chosen}: {' or '.join(SPLITS[chosen])}.")
    if chosen in ARCHIVES:
        if annotations is None and not asked.given:
            return None
        if annotations is None or images is not None or root is not None:
            raise ConfigError(
                f"{bank} was made of {chosen} files, which are not read here: give a list of its keys with "
                "--annotations, or leave the options out. `patchbank extract` with the files makes what is missing."
            )
        chosen = None
    if chosen is None and annotations is None:
        if asked.given:
            raise ConfigError("Say which --dataset and --split it is of, or give the --annotations.")
        return None
    given = vars(replace(asked, dataset=dataset, split=split)) if asked.given else {}
    options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    listing = Listing(chosen, split if chosen in SPLITS else None, root, images, annotations, options)
    if root is None and chosen in SPLITS:
        listing = replace(listing, root=Path(os.path.relpath(bank.absolute().parent.parent)))
        if annotations is None and not _there(listing):
            listing = replace(listing, root=Path())
            if not asked.given and not _there(listing):
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
