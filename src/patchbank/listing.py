"""Which images a bank should hold: by the command's options, the bank's manifest, or its place in a checkout."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.bank.runs import remembered_images
from patchbank.config import ARCHIVES, BOXES, as_path, option
from patchbank.errors import ConfigError, DatasetError, PatchbankError
from patchbank.locations import is_remote, locate
from patchbank.regions import GRID_CUT, image_of

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.datasets import Dataset
    from patchbank.datasets.hoi import HOIAnnotations

_DATA = "Data"
_SIZES = 64  # of images that are remembered, while threads ask for those of their regions


@dataclass(frozen=True, kw_only=True)
class ListingOptions:
    """The options that name the images of a command."""

    dataset: str | None = option(
        None, "hicodet, vcoco or folder.", _DATA, metavar="NAME", values=("hicodet", "vcoco", "folder")
    )
    split: str | None = option(
        None, "train or test (hicodet), train or val (vcoco).", _DATA, values=("train", "test", "val")
    )
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


# A bank's name: clipbase_img_hicodet_train as EZ-HOI reads it, or with what it would not read: ..._squash_float16.
_BANK_NAME = re.compile(r".*_img_(hicodet|vcoco)_(train|test|val)(?:_.*)?")


@dataclass(frozen=True, kw_only=True)
class Listing(ListingOptions):
    """The images that a bank should hold; ``dataset`` is None where only an annotation file is known.

    Attributes:
        options: the command's options that name these images; empty if none were needed.
        of_pairs: whether the bank holds the regions of their annotated pairs.
        digest: of the bank's regions (`Manifest.regions`); empty of imported ones, whose boxes are rounded.
    """

    options: str = ""
    of_pairs: bool = False
    digest: str = ""

    @property
    def named(self) -> str:
        """Options that name these images wherever the bank lies."""
        given = {name: getattr(self, name) for name in ("dataset", "split", "root", "images", "annotations")}
        if self.dataset == "folder":
            given["dataset"] = None
        return _words(given)

    @property
    def source(self) -> Path:
        """The file or directory that lists the images."""
        from patchbank.datasets import find_annotations

        if self.annotations is not None:
            return self.annotations
        if self.dataset == "folder" or self.dataset is None:
            return self.images or Path()
        return find_annotations(self.dataset, self.root or Path(), self.split or "")

    def keys(self) -> list[str]:
        """Every listed image once; of pairs, every region. Raises DatasetError."""
        from patchbank.datasets import load_dataset, read_file_names

        if self.of_pairs:
            name, split = (self.dataset, self.split) if self.dataset else ("hicodet", "train")  # whose pairs are alike
            listed = load_dataset(name, self.root or Path(), split, annotations=self.annotations)
            return [sample.key for sample in self._regions(listed).samples]
        if self.dataset == "folder":
            return [sample.key for sample in self.load().samples]
        return list(dict.fromkeys(read_file_names(self.source)))

    def size_of(self) -> Callable[[str], tuple[int, int] | None] | None:
        """A key -> its image's size; None if the images are unknown, or in a store: a request for each takes long."""
        from patchbank.datasets import IMAGES
        from patchbank.datasets.samples import image_size

        images = self.images
        if images is None and self.dataset in IMAGES:
            images = (self.root or Path()) / IMAGES[self.dataset][self.split or ""]
        if images is None or is_remote(images):
            return None
        if self.of_pairs:
            of_image = lru_cache(_SIZES)(lambda image: image_size(images / image))  # one after the other
            return lambda key: of_image(image_of(key))
        return lambda key: image_size(images / key)

    def _regions(self, dataset: Dataset) -> Dataset:
        """The regions of a dataset's pairs. Raises DatasetError if they are not the bank's."""
        from patchbank.datasets.boxes import annotated_pairs, digest

        found = annotated_pairs(dataset)
        if self.digest and digest(found.samples) != self.digest:
            raise DatasetError(
                f"The bank holds other regions than the annotated pairs in {dataset.annotations}: of another file, or "
                "of a detector's boxes."
            )
        return found

    def pairs(self) -> HOIAnnotations:
        """The annotated pairs; images need not exist. Raises DatasetError, and ConfigError for a folder."""
        from patchbank.datasets.hoi_files import read_hoi

        if self.dataset == "folder":
            raise ConfigError("A folder has no annotated pairs: name --dataset hicodet or vcoco, or --annotations.")
        return read_hoi(self.source)

    def load(self) -> Dataset:
        """The dataset with its images, or its regions.

        Raises DatasetError if they do not exist, or are not the bank's; ConfigError on a wrong split.
        """
        from patchbank.datasets import load_dataset

        if self.dataset == "folder":
            found = load_dataset("folder", self.images or Path())
            for place, reason in found.damaged.items():
                raise DatasetError(f"{place} {reason}. So the list of images would lack some.")
            return found
        if self.dataset is None:
            raise ConfigError("An annotation file alone does not say where the images are: add --dataset.")
        found = load_dataset(
            self.dataset, self.root or Path(), self.split, images=self.images, annotations=self.annotations
        )
        return self._regions(found) if self.of_pairs else found


def find_listing(
    bank: Path,
    manifest: Manifest | None,
    asked: ListingOptions,
    needed_by: str | None = None,
    *,
    recall: bool = True,
) -> Listing | None:
    """The images that a bank should hold; None if neither the options nor the bank say.

    Without options, the dataset and split are those that the bank names, or its directory's name, and the root is the
    EZ-HOI checkout around it; a folder is the one that the last run read.

    Raises ConfigError on options that do not go together.

    Args:
        needed_by: an option that needs the images. Raises ConfigError if they are not known.
        recall: whether to take the folder that the last run read. It shows the images; as a list of what the bank
            should hold it may be wrong, since that run may have had a limit, or images may have been added.
    """
    if manifest is not None and manifest.dataset == BOXES:
        if needed_by or asked.given:
            raise ConfigError(
                f"{bank} holds features of a detector's boxes, which no option here names: leave out "
                f"{needed_by or 'those that name images'}. `patchbank extract boxes` with the same files extracts what "
                "is missing."
            )
        return None
    if needed_by and manifest is not None and manifest.input.cut == GRID_CUT:
        raise ConfigError(
            f"{needed_by} encodes images, and {bank} was pooled from a bank of them. `patchbank extract regions` with "
            "that bank makes what is missing."
        )
    found = _find_listing(bank, manifest, asked, recall)
    if found is not None and manifest is not None and manifest.input.cut:
        found = _of_pairs(found, manifest)
    if needed_by and manifest is not None and manifest.dataset in ARCHIVES:
        raise ConfigError(
            f"{needed_by} does not read {manifest.dataset} files. `patchbank extract {manifest.dataset}` with the same "
            "files extracts what is missing."
        )
    if needed_by and found is None:
        folder = " --images DIR, or" if manifest is None else ""
        what = "annotations" if needed_by == "--pairs" else "images"
        raise ConfigError(f"{needed_by} needs the {what}: add{folder}{options_needed(manifest)}.")
    return found


def _of_pairs(found: Listing, manifest: Manifest) -> Listing | None:
    """The listing of a bank of regions; None if they are not those of annotated pairs, as far as is known."""
    listing = replace(found, of_pairs=True, digest="" if manifest.imported else manifest.regions)
    if found.dataset == "folder":
        return None
    if not found.options:
        try:
            listing.keys()
        except DatasetError:
            return None
    return listing


def load_if_found(found: Listing | None, note: Callable[[str], None] = lambda _: None) -> Dataset | None:
    """The listing's dataset. Raises PatchbankError if the options name one that cannot be loaded.

    A listing that no option names is a guess: where it cannot be loaded, `note` is called with the reason.
    """
    try:
        return found.load() if found else None
    except PatchbankError as error:
        if found and found.options:
            raise
        note(str(error))
        return None


def usual_dataset(bank: Path, manifest: Manifest) -> Dataset | None:
    """The images of a bank where they usually lie; None if they do not."""
    return load_if_found(find_listing(bank, manifest, ListingOptions()))


def _find_listing(bank: Path, manifest: Manifest | None, asked: ListingOptions, recall: bool) -> Listing | None:
    from patchbank.datasets import SPLITS

    dataset, split, images, annotations = asked.dataset, asked.split, asked.images, asked.annotations
    if dataset not in (None, *SPLITS, "folder"):
        raise ConfigError(f"There is no dataset {dataset!r}. Choose from: {', '.join([*SPLITS, 'folder'])}.")
    name: str | None = None
    own_split: str | None = None
    if manifest is not None and manifest.dataset in (*SPLITS, "folder", *ARCHIVES):
        name, own_split = manifest.dataset, manifest.split
        for what, value, own in (("dataset", dataset, name), ("split", split, own_split)):
            if value not in (None, own):
                raise ConfigError(f"{bank} is a bank of {manifest.title}, and --{what} says {value}: leave it out.")
    elif match := _BANK_NAME.fullmatch(bank.resolve().name):
        name, own_split = match.groups()
    if dataset is None and name is None and images is not None and annotations is None:
        dataset = "folder"
    chosen = dataset or name
    if chosen == "folder" and images is None:
        images = remembered_images(bank) if recall and not (asked.root or split or annotations) else None
        if images is None and asked.given:
            raise ConfigError("Name the folder's images: --images DIR.")
        return Listing(dataset="folder", images=images) if images else None
    if chosen in SPLITS:
        split = split or (own_split if chosen == name else None)
        if split not in SPLITS[chosen]:
            wrong = "Say which --split" if split is None else f"There is no split {split!r}"
            raise ConfigError(f"{wrong} of {chosen}: {' or '.join(SPLITS[chosen])}.")
    if chosen in ARCHIVES:
        if annotations is None and not asked.given:
            return None
        if annotations is None or images is not None or asked.root is not None:
            raise ConfigError(
                f"{bank} was made of {chosen} files, which are not read here: give a list of its keys with "
                "--annotations, or leave the options out. `patchbank extract` with the files makes what is missing."
            )
        chosen = None
    if chosen is None and annotations is None:
        if asked.given:
            raise ConfigError("Say which --dataset and --split it is of, or give the --annotations.")
        return None
    given = vars(asked) | {"dataset": dataset, "split": split} if asked.given else {}
    options = _words(given)
    chosen_split = split if chosen in SPLITS else None
    listing = Listing(**vars(asked) | {"dataset": chosen, "split": chosen_split, "options": options})
    if asked.root is None and chosen in SPLITS:
        listing = replace(listing, root=Path(os.path.relpath(bank.absolute().parent.parent)))
        if annotations is None and not _there(listing):
            listing = replace(listing, root=Path())
            if not asked.given and not _there(listing):
                return None
    return listing


def _words(given: Mapping[str, object]) -> str:
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)


def options_needed(manifest: Manifest | None) -> str:
    """For a message: the options that would name the images, for the user to fill in."""
    from patchbank.datasets import SPLITS

    if manifest is not None and manifest.dataset in SPLITS:
        return " --root DIR"
    if manifest is not None and manifest.dataset == BOXES:
        return ""
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
