"""Regions of images as samples: annotated pairs, a detector's boxes. Regions of one image follow each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import msgspec
import numpy as np

from patchbank.budget import without_collection
from patchbank.config import BOXES, WHOLE
from patchbank.datasets.detections import Detections, read_detections
from patchbank.datasets.hoi_files import read_hoi
from patchbank.datasets.samples import Dataset, Sample
from patchbank.errors import DatasetError
from patchbank.regions import HUMAN, IMAGE, OBJECT, PERSON, UNION, Box, Region, pair_name, region_key

_AT_ONCE = 4096  # samples that are made together


@without_collection()
def annotated_pairs(dataset: Dataset) -> Dataset:
    """The regions of a dataset's annotated pairs, for each image with any, in the annotations' order.

    They are ``IMAGE#image``, the whole image, and for pair k ``IMAGE#human-k``, ``IMAGE#object-k`` and
    ``IMAGE#union-k``, the smallest box around both, which has the pair's classes. Pair k is the image's k-th in the
    annotation file, also if others were left out.

    Boxes are not checked: a wrong one is a failure of its region.

    Raises DatasetError as `Dataset.pairs` does, and if there are no pairs.
    """
    file = dataset.annotations if dataset.chosen is None else None
    pairs = dataset.pairs if file is None else read_hoi(file, any_box=True)
    if not len(pairs.verb):
        raise DatasetError(f"{pairs.source} has no pair with both boxes.")

    def regions(key: str) -> Iterator[tuple[str, Region]]:
        yield IMAGE, Region()
        for number, row in zip(pairs.numbers(key), pairs.rows[key], strict=True):
            label, verb = int(pairs.object[row]), int(pairs.verb[row])
            hoi = None if pairs.hoi is None else int(pairs.hoi[row])
            yield pair_name(HUMAN, number), Region(_box(pairs.boxes_h[row]), PERSON)
            yield pair_name(OBJECT, number), Region(_box(pairs.boxes_o[row]), label)
            yield pair_name(UNION, number), Region(_box(pairs.unions[row]), label, None, verb, hoi)

    found = ((image, regions(image.key)) for image in dataset.samples if len(pairs.rows[image.key]))
    return replace(dataset, samples=tuple(_samples(found)), chosen=pairs)


def _samples(found: Iterable[tuple[Sample, Iterable[tuple[str, Region]]]]) -> Iterator[Sample]:
    position = 0
    for image, regions in found:
        for name, region in regions:
            yield Sample(region_key(image.key, name), image.source, position, image.place, region)
            position += 1


def _box(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> Box:
    x1, y1, x2, y2 = values.tolist()
    return x1, y1, x2, y2


def load_boxes(
    dataset: Dataset,
    detections: str | os.PathLike[str] | Mapping[str, Any] | Detections,
    *,
    annotations: str | os.PathLike[str] | None = None,
    min_score: float | None = None,
    classes: Iterable[int] | None = None,
    max_boxes: int | None = None,
) -> Dataset:
    """A detector's boxes of a dataset's images, as samples ``IMAGE#box-N``, to `extract` the features of each.

    Images are in the dataset's order, and an image's boxes in the detector's; N is a box's place there, whatever is
    left out. Images without boxes have no samples.

    Args:
        dataset: images of any kind, from `load_dataset`.
        detections: a file of COCO results (JSON), JSON Lines, or ``{file_name: {boxes, labels, scores}}`` by
            `torch.save` or `pickle.dump`, which is read without running anything; or such a mapping of tensors, arrays
            or lists. Boxes are xyxy in original pixels; COCO's ids of categories become the 80 classes from 0
            (`patchbank.datasets.detections`).
        annotations: COCO's file that names the images of results that number them. Without it, the numbers are those
            at the end of images' names.
        min_score: the least score.
        classes: labels to keep, as they are in the bank.
        max_boxes: at most so many of an image, the best ones.

    Raises DatasetError if the detections cannot be read, name none of the images, or no box is left.
    """
    if dataset.regions or dataset.part != WHOLE:
        raise DatasetError("Boxes are of images: load the whole dataset, and use ExtractConfig(partition=...).")
    found = detections if isinstance(detections, Detections) else read_detections(detections, annotations)
    found, lacking = found.matched([sample.key for sample in dataset.samples])
    taken = found.chosen(min_score, classes, max_boxes)
    notes = [*found.notes]
    if lacking:
        images = f"{lacking:,} image{'' if lacking == 1 else 's'}"
        notes.append(f"Left out: the boxes of {images} that {found.source} names and {dataset.images} lacks.")
    if len(taken) < len(found):
        notes.append(f"{len(taken):,} of {len(found):,} boxes are taken, and the others left out as asked.")
    return replace(
        dataset,
        name=BOXES,
        split=None,
        samples=_Boxes(dataset.samples, taken, range(len(taken))),
        annotations=None,
        chosen=None,
        notes=tuple(notes),
    )


class _Boxes(Sequence[Sample]):
    """A detector's boxes, as samples that are made on access: those of a million boxes would take 600 MB."""

    def __init__(self, images: Sequence[Sample], found: Detections, rows: range) -> None:
        self._images, self._found, self._rows = images, found, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return _Boxes(self._images, self._found, self._rows[index])
        row = self._rows[index]
        return next(self._made(range(row, row + 1)))

    def __iter__(self) -> Iterator[Sample]:
        for begin in range(0, len(self), _AT_ONCE):
            yield from self._made(self._rows[begin : begin + _AT_ONCE])

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)  # a worker needs no more

    def _made(self, rows: range) -> Iterator[Sample]:
        """The samples of some rows, not of all: their columns become lists."""
        for row, (owner, name, region) in zip(rows, self._found.of(np.array(rows)).regions(), strict=True):
            image = self._images[owner]
            yield Sample(region_key(image.key, name), image.source, row, image.place, region)


def digest(samples: Iterable[Sample]) -> str:
    """The `digest_of` samples that are regions."""
    return digest_of((sample.key, sample.region) for sample in samples)


def digest_of(regions: Iterable[tuple[str, Region | None]]) -> str:
    """The SHA-256 of the keys, boxes and classes of all regions; empty if there are none."""
    found, encoder, some = hashlib.sha256(), msgspec.msgpack.Encoder(), False
    for key, region in regions:
        if region is None:
            return ""
        some = True
        found.update(encoder.encode((key.encode(errors="surrogateescape"), region)))
    return found.hexdigest() if some else ""
