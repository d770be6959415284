"""Regions of images as samples: the boxes of annotated pairs. Regions of one image follow each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from patchbank.budget import without_collection
from patchbank.datasets.samples import Dataset, Sample
from patchbank.regions import HUMAN, IMAGE, OBJECT, UNION, Box, Region, region_key

_PERSON = 0  # of COCO's 80


@without_collection()
def annotated_pairs(dataset: Dataset) -> Dataset:
    """The regions of a dataset's annotated pairs, for each image with any, in the annotations' order.

    They are ``IMAGE#image``, the whole image, and for pair k ``IMAGE#human-k``, ``IMAGE#object-k`` and
    ``IMAGE#union-k``, the smallest box around both, which has the pair's classes. Pair k is the image's k-th in the
    annotation file, also if others were left out.

    Raises DatasetError as `Dataset.pairs` does.
    """
    pairs = dataset.pairs
    unions = np.concatenate(
        [
            np.minimum(pairs.boxes_h[:, :2], pairs.boxes_o[:, :2]),
            np.maximum(pairs.boxes_h[:, 2:], pairs.boxes_o[:, 2:]),
        ],
        axis=1,
    )

    def regions(key: str) -> Iterator[tuple[str, Region]]:
        yield IMAGE, Region()
        for number, row in zip(pairs.numbers(key), pairs.rows[key], strict=True):
            label, verb = int(pairs.object[row]), int(pairs.verb[row])
            hoi = None if pairs.hoi is None else int(pairs.hoi[row])
            yield f"{HUMAN}-{number}", Region(_box(pairs.boxes_h[row]), _PERSON)
            yield f"{OBJECT}-{number}", Region(_box(pairs.boxes_o[row]), label)
            yield f"{UNION}-{number}", Region(_box(unions[row]), label, None, verb, hoi)

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


def digest(samples: Iterable[Sample]) -> str:
    """The SHA-256 of the keys, boxes and classes of all regions; empty if there are none."""
    found, some = hashlib.sha256(), False
    for sample in samples:
        if sample.region is None:
            return ""
        some = True
        found.update(f"{sample.key}\n{sample.region!r}\n".encode(errors="surrogateescape"))
    return found.hexdigest() if some else ""
