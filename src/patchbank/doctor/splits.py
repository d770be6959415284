"""The splits of a root's data sets: their lists, and where each listed image is."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patchbank.bank.ezhoi import check_names
from patchbank.datasets import SPLITS, hicodet, vcoco
from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.samples import make_records
from patchbank.doctor.directories import Directories, closed, exists, needed_rename
from patchbank.doctor.findings import Finding, extract_command, relative, run, shell
from patchbank.errors import BankError, DatasetError

_IMAGES = {"hicodet": hicodet.IMAGES, "vcoco": vcoco.IMAGES}
_ANNOTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "hicodet": {**hicodet.ANNOTATIONS},
    "vcoco": {split: (place,) for split, place in vcoco.ANNOTATIONS.items()},
}


@dataclass(frozen=True)
class Elsewhere:
    """Listed images that lie in another directory than their split's.

    Attributes:
        place: that directory.
        names: of the images, as they are listed.
        renamed: whether they lie there under COCO 2017's names, which are numbers only.
    """

    place: Path
    names: list[str]
    renamed: bool = False


@dataclass(kw_only=True)
class Split:
    """One split of a data set that is there.

    Attributes:
        dataset, split: its names.
        annotations: its list; None where there is none.
        images: the directory that its images should be in.
        actual: the directory that they are looked for in: the same, or one whose name differs by case.
        keys: every listed image once; empty where the list cannot be used.
        there: those that are in `actual`.
        by_case: (name on disk, listed name) of those that are there under a name that differs by case.
        elsewhere: those that are in other directories.
        absent: those that are nowhere.
    """

    dataset: str
    split: str
    annotations: Path | None
    images: Path
    actual: Path
    keys: tuple[str, ...] = ()
    there: list[str] = field(default_factory=list)
    by_case: list[tuple[str, str]] = field(default_factory=list)
    elsewhere: list[Elsewhere] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """``hicodet train``."""
        return f"{self.dataset} {self.split}"


def read_splits(
    root: Path, dataset: str, directories: Directories
) -> tuple[list[tuple[Split, Finding | None]], list[tuple[Path, Path]]]:
    """Each split with what is wrong with its list, if anything is, and renames that the directories need."""
    found: list[tuple[Split, Finding | None]] = []
    renames: list[tuple[Path, Path]] = []

    def locate(place: str) -> Path | None:
        wanted = root / place
        if exists(wanted):
            return wanted
        if (twin := directories.twin(root, place)) and (rename := needed_rename(root, twin, wanted)) not in renames:
            renames.append(rename)
        return twin

    for split in SPLITS[dataset]:
        annotations = next(filter(None, map(locate, _ANNOTATIONS[dataset][split])), None)
        images = root / _IMAGES[dataset][split]
        actual = locate(_IMAGES[dataset][split]) or images
        one = Split(dataset=dataset, split=split, annotations=annotations, images=images, actual=actual)
        found.append((one, _read_list(root, one)))
    return found, renames


def _read_list(root: Path, split: Split) -> Finding | None:
    """Read the split's list into `split.keys`; the finding that says why that cannot be."""

    def problem(text: str, mend: str) -> Finding:
        data = {"annotations": None if split.annotations is None else str(split.annotations), "readable": False}
        return Finding(what=split.title, level="problem", text=text, mend=mend, data=data)

    places = [root / place for place in _ANNOTATIONS[split.dataset][split.split]]
    if split.annotations is None:
        others = " or ".join(relative(place, root) for place in places)
        source = f"instances_*.json are in github.com/fredzzhang/{split.dataset}"
        other = next(name for name in SPLITS[split.dataset] if name != split.split)
        only = run(extract_command(root, split.dataset, "--split", other))
        return problem(
            f"There is no annotation file {others}.",
            f"Put it at {places[0]} ({source}). To do without this split:\n{only}",
        )
    try:
        names = read_file_names(split.annotations)
        make_records(names, split.images, split.annotations)  # no name may lead out of the directory
        check_names(names)
    except DatasetError as error:
        again = f"Correct {split.annotations}, or put the original file there again (see EZ-HOI's README)."
        return problem(
            str(error), run(shell("chmod", "u+rX", place)) if (place := closed(split.annotations)) else again
        )
    except BankError as error:
        return problem(str(error), f"Rename one of the two, on the disk and in {split.annotations}.")
    split.keys = tuple(dict.fromkeys(names))
    return None


def look_for_images(root: Path, split: Split, directories: Directories) -> None:
    """Sort the split's keys into those that are there, there by another case, elsewhere, and nowhere."""
    missing: dict[str, list[str]] = defaultdict(list)  # by directory within the image directory
    for key in split.keys:
        parent, _, name = key.rpartition("/")
        (split.there if name in directories.files(split.actual / parent) else missing[parent]).append(key)
    rest: list[str] = []
    for parent, keys in missing.items():
        place = directories.twin(split.actual, parent) if parent else split.actual
        on_disk = {name.lower(): name for name in directories.files(place)} if place else {}
        for key in keys:
            name = on_disk.get(key.rpartition("/")[2].lower(), "")
            if place is None or not name:
                rest.append(key)
            elif exists(split.actual / key):  # this file system ignores case
                split.there.append(key)
            else:
                split.by_case.append(((place / name).relative_to(split.actual).as_posix(), key))
    _search(root, split, rest, directories)


def _search(root: Path, split: Split, names: list[str], directories: Directories) -> None:
    """Look for images in the other directories of the root's data sets."""
    own = os.path.realpath(split.actual)
    word = {"hicodet": "hico", "vcoco": "coco"}[split.dataset]
    starts = [
        root / name
        for name in sorted(directories.directories(root))
        if word in name.lower() and not name.endswith("_pkl_files")
    ]
    places = [place for place in directories.below(starts) if os.path.realpath(place) != own] if names else []
    while names:
        found = [Elsewhere(place, _held(names, directories.files(place))) for place in places]
        found += [Elsewhere(place, _held(names, directories.files(place), coco2017=True), True) for place in places]
        best = max(found, key=lambda each: len(each.names), default=None)
        if best is None or not best.names:
            break
        split.elsewhere.append(best)
        gone = set(best.names)
        names = [name for name in names if name not in gone]
    split.absent = names


def _held(names: Sequence[str], files: frozenset[str], *, coco2017: bool = False) -> list[str]:
    """Which of these images a directory's files are."""
    if not files:
        return []
    if coco2017:  # COCO_train2014_000000000009.jpg is 000000000009.jpg there
        return [name for name in names if name.startswith("COCO_") and name.rpartition("_")[2] in files]
    return [name for name in names if name.rpartition("/")[2] in files]
