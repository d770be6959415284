"""V-COCO as an EZ-HOI checkout lays it out. Its ``val`` is V-COCO's test list, on the images of COCO's val2014."""

from __future__ import annotations

from pathlib import Path

from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.samples import Dataset, make_records

SPLITS = ("train", "val")

IMAGES = {split: f"vcoco/mscoco2014/{split}2014" for split in SPLITS}
ANNOTATIONS = {"train": "vcoco/instances_vcoco_trainval.json", "val": "vcoco/instances_vcoco_test.json"}


def find_annotations(root: Path, split: str) -> Path:
    """Where the split's annotation file lies, or should."""
    return root / ANNOTATIONS[split]


def load(root: Path, split: str, images: Path | None, annotations: Path | None) -> Dataset:
    """One split of V-COCO. Raises DatasetError where its parts are missing or malformed."""
    source = annotations or find_annotations(root, split)
    names = read_file_names(source)
    directory = images or root / IMAGES[split]
    return Dataset("vcoco", split, directory, make_records(names, directory, source), source, root)
