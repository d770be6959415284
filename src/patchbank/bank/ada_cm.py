"""ADA-CM's file of pairs: one pickle of a split, with the boxes, classes and features of each image's annotated pairs.

It is a dict by file name of dicts of numpy arrays, those of `FIELDS`; row k of each belongs to the image's pair k.
Boxes are xyxy in the image squashed to the encoder's input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchbank.array_pickles import pickle_pieces
from patchbank.bank.check import Progress
from patchbank.bank.reader import Bank
from patchbank.bank.regions import regions_by_image, unfinished
from patchbank.errors import BankError
from patchbank.features import CLS, POOLED
from patchbank.files import fsync_directory, whole_file, write_and_sync
from patchbank.locations import is_remote
from patchbank.regions import HUMAN, IMAGE, OBJECT, UNION, Region, image_of, name_of, pair_name, pair_of, region_key

# Name -> (dtype, shape), in the file's order: K is the number of pairs, D the features' width.
FIELDS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "boxes_h": ("float16", ("K", 4)),
    "boxes_o": ("float16", ("K", 4)),
    "union_boxes": ("float16", ("K", 4)),
    "verbs": ("int64", ("K",)),
    "hois": ("int64", ("K",)),
    "objects": ("int64", ("K",)),
    "huamn_features": ("float16", ("K", "D")),  # so it is spelt
    "object_features": ("float16", ("K", "D")),
    "union_features": ("float16", ("K", "D")),
    "global_feature": ("float16", ("D",)),
    "size_orig": ("int64", (2,)),  # height first
}
REGIONS = {  # of a pair -> its boxes and features
    HUMAN: ("boxes_h", "huamn_features"),
    OBJECT: ("boxes_o", "object_features"),
    UNION: ("union_boxes", "union_features"),
}

Arrays = dict[str, NDArray[Any]]


@dataclass
class Written:
    """What `write_pairs` did.

    Attributes:
        file: what was written.
        output: the bank's output that it holds.
        images, pairs: how many are in it.
        bytes_written: its size.
        left_out: region -> reason, of regions without a feature of float16. Their pairs are left out; of whole images,
            the images.
        pairs_left_out: how many pairs.
        note: that the bank is not finished; empty if it is, or has failures, which `left_out` names.
        actions: whether `hois` holds the verbs, since V-COCO has no classes of verb and object together.
    """

    file: Path
    output: str
    images: int = 0
    pairs: int = 0
    bytes_written: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    pairs_left_out: int = 0
    note: str = ""
    actions: bool = False


def write_pairs(bank: Bank, target: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Written:
    """Write a bank's annotated pairs as ADA-CM's file, whole or not at all. The same bank gives the same bytes.

    Every feature is compared with its checksum. Memory is bounded by one image's pairs, and the bank's index.

    Args:
        overwrite: replace a file of this name.
        progress: called with the numbers of images done, and of all.

    Raises:
        BankError: the file exists or cannot be written; the bank has no pairs, no output that is a vector, or, but for
            V-COCO, no hoi classes.
    """
    if is_remote(target):
        raise BankError(f"{target}: ADA-CM's file is written to a local path.")
    if target.is_dir() or (target.exists() and not overwrite):
        kind = (
            "is a directory; name a file" if target.is_dir() else "exists. --overwrite replaces it; else choose another"
        )
        raise BankError(f"{target} {kind}.")
    found, done = _pairs_by_image(bank), Written(target, _vector(bank), note=unfinished(bank))

    def entries() -> Iterator[tuple[str, Mapping[str, NDArray[Any]]]]:
        for number, (image, pairs) in enumerate(found.items(), start=1):
            if arrays := _entry(bank, image, pairs, done):
                yield image, arrays
            if progress:
                progress(number, len(found))

    try:
        with whole_file(target) as place:
            write_and_sync(place, pickle_pieces(entries(), list(FIELDS)))
            done.bytes_written = place.stat().st_size
            if not done.pairs:
                first = next(iter(done.left_out.items()))
                raise BankError(f"No pair of {bank.path} has its features ({': '.join(first)}); nothing was written.")
        fsync_directory(target.resolve().parent)
    except OSError as error:
        raise BankError(f"{error.filename or target} cannot be written: {error.strerror or error}.") from error
    return done


def _vector(bank: Bank) -> str:
    """The output that is one vector of a region."""
    outputs = bank.manifest.outputs
    for name in (bank.manifest.main, POOLED, CLS):
        if name in outputs and len(outputs[name].shape) == 1:
            return name
    raise BankError(
        f"{bank.path} stores {', '.join(outputs)}, and ADA-CM's file takes one vector of each region: extract the "
        f"pairs with --output {POOLED} or --output {CLS}."
    )


def _pairs_by_image(bank: Bank) -> dict[str, list[int]]:
    """image -> the numbers of its pairs, those without features too; in the dataset's order."""
    found: dict[str, set[int]] = {image: _numbers(names) for image, names in regions_by_image(bank).items()}
    for key in bank.failures:
        found.setdefault(image_of(key), set()).update(_numbers([name_of(key)]))
    if not any(found.values()):
        raise BankError(f"{bank.path} has no annotated pairs: `patchbank extract pairs` makes a bank of them.")
    return {image: sorted(numbers) for image, numbers in found.items() if numbers}


def _numbers(names: Iterable[str]) -> set[int]:
    return {pair[1] for pair in map(pair_of, names) if pair}


class _Pair(NamedTuple):
    """A pair whose features are complete: of each kind, the box in the encoder's input, and the feature (D,)."""

    union: Region
    boxes: dict[str, NDArray[np.float16]]
    features: dict[str, NDArray[np.float16]]


def _entry(bank: Bank, image: str, pairs: Sequence[int], done: Written) -> Arrays:
    """An image's arrays; none if no pair, or not the whole image, has its features."""
    whole = region_key(image, IMAGE)
    global_feature, size = _feature(bank, whole, done), bank.size(whole) if whole in bank else None
    height, width = bank.manifest.input.size
    scale = np.array([width, height] * 2) / np.array((size or (width, height)) * 2)
    found = [pair for number in pairs if (pair := _pair(bank, image, number, scale, done))]
    if global_feature is None or not found or size is None:
        done.pairs_left_out += len(pairs)
        return {}
    done.images, done.pairs = done.images + 1, done.pairs + len(found)
    done.pairs_left_out += len(pairs) - len(found)
    columns: dict[str, object] = {}
    for kind, (boxes, features) in REGIONS.items():
        columns[boxes] = [pair.boxes[kind] for pair in found]
        columns[features] = [pair.features[kind] for pair in found]
    unions = [pair.union for pair in found]
    columns |= {
        "verbs": [union.verb for union in unions],
        "hois": [_hoi(bank, union, done) for union in unions],
        "objects": [union.label for union in unions],
        "global_feature": global_feature,
        "size_orig": [size[1], size[0]],
    }
    return {name: np.asarray(columns[name]).astype(dtype) for name, (dtype, _) in FIELDS.items()}


def _pair(bank: Bank, image: str, number: int, scale: NDArray[np.float64], done: Written) -> _Pair | None:
    boxes, features = dict[str, NDArray[np.float16]](), dict[str, NDArray[np.float16]]()
    keys = {kind: region_key(image, pair_name(kind, number)) for kind in REGIONS}
    for kind, key in keys.items():
        if (feature := _feature(bank, key, done)) is None or not (region := bank.region(key)):
            continue
        box = _float16(np.array(region.box) * scale)
        if np.isfinite(box).all():
            boxes[kind], features[kind], union = box, feature, region  # the last kind is the union
        else:
            done.left_out[key] = "its box is too large for float16"
    return _Pair(union, boxes, features) if len(boxes) == len(REGIONS) else None


def _feature(bank: Bank, key: str, done: Written) -> NDArray[np.float16] | None:
    """A region's feature in float16; None, with the reason in `left_out`, if there is none."""
    try:
        bank.check(key)
        feature = _float16(bank.output(key, done.output).float().numpy())
        if np.isfinite(feature).all():
            return feature
        done.left_out[key] = "its numbers are too large for float16"
    except BankError as error:
        missing = "it has no feature yet: the same extraction continues" if key not in bank else str(error)
        done.left_out[key] = bank.failures.get(key, missing)
    return None


def _float16(numbers: NDArray[Any]) -> NDArray[np.float16]:
    """Infinite where they are too large."""
    with np.errstate(over="ignore"):
        return numbers.astype(np.float16)


def _hoi(bank: Bank, union: Region, done: Written) -> int | None:
    if union.hoi is not None:
        return union.hoi
    if bank.manifest.dataset != "vcoco":
        raise BankError(
            f"{bank.path} does not have the pairs' hoi classes, since its annotations do not define them. Put UPT's "
            "instances_train2015.json or instances_test2015.json beside the list, and extract the pairs again."
        )
    done.actions = True
    return union.verb
