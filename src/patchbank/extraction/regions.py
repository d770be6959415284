"""Features of boxes pooled from a bank's grids, without images or an encoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Event, Lock

import torch
from torch import Tensor

from patchbank.bank.convert import Converted, transfer
from patchbank.bank.manifest import Manifest
from patchbank.bank.parts import part_size
from patchbank.bank.payload import Feature
from patchbank.bank.reader import Bank
from patchbank.config import StoredDtype
from patchbank.datasets.boxes import digest
from patchbank.datasets.samples import Dataset, Failure, Sample
from patchbank.datasets.sources import Directory
from patchbank.errors import BankError
from patchbank.pool import pool_regions
from patchbank.regions import GRID_CUT, Box, fault_of

_IMAGES = 64  # whose pooled features are kept, until all their boxes are written


def images_of(bank: Bank) -> Dataset:
    """A bank's images, also those without a feature; none is read. Raises BankError if it holds no grids of images."""
    _require_images(bank)
    place = Directory(bank.path)
    keys = (*bank.in_order(), *bank.failures)
    samples = tuple(Sample(key, place, position) for position, key in enumerate(keys))
    return Dataset(bank.manifest.dataset, bank.manifest.split, bank.path, samples)


def _require_images(bank: Bank) -> None:
    if bank.manifest.input.cut:
        raise BankError(f"{bank.path} holds features of regions: pool from a bank of whole images.")
    bank.grid_name()


def pool_into(
    source: Bank,
    dataset: Dataset,
    target: Path,
    *,
    dtype: StoredDtype | None = None,
    shard_size: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> Converted:
    """Write the features of boxes, as `pool_regions` gives them from each of a bank's grids, into a bank of regions.

    Args:
        dataset: of regions (`datasets.boxes`); its images need not exist.
        dtype: the new bank's stored dtype; None is the source's, and float16 of int8.
        shard_size, overwrite, progress, stop: as in `bank.convert.convert`.

    A box that cannot be used, or that the model did not see, and one of an image without a feature, becomes a failure.

    Raises:
        BankError: the source stores no grid, or what `bank.convert.convert` raises it for.
    """
    _require_images(source)
    samples = {sample.key: sample for sample in dataset.samples}
    of_image: dict[str, list[Sample]] = defaultdict(list)
    for sample in dataset.samples:
        of_image[sample.image].append(sample)
    wanted = _manifest(source, dataset, dtype, shard_size)
    known: set[str] = set()

    one_at_a_time = Lock()  # threads ask for boxes of the same image

    @lru_cache(_IMAGES)
    def of(image: str) -> dict[str, Feature | Failure]:
        return _pooled(source, image, of_image[image], wanted)

    def read(key: str) -> Feature | Failure:
        try:
            with one_at_a_time:
                found = of(samples[key].image)[key]
        except BankError as error:
            return Failure(key, str(error))
        if isinstance(found, Failure):
            known.add(key)
        return found

    return transfer(
        target,
        wanted,
        list(samples),
        read,
        known,
        overwrite,
        progress,
        stop,
        source.path,
        source.reducer if wanted.reduction else None,
    )


def _manifest(source: Bank, dataset: Dataset, dtype: StoredDtype | None, shard_size: int) -> Manifest:
    kept = source.manifest.with_outputs(source.manifest.grids)
    made = kept.stored_as("shards", dtype or ("float16" if kept.dtype == "int8" else kept.dtype))
    outputs = {name: replace(each, shape=each.shape[1:]).stored_as(each.dtype) for name, each in made.outputs.items()}
    return replace(
        made,
        dataset=dataset.name,
        split=dataset.split,
        outputs=outputs,
        input=replace(made.input, cut=GRID_CUT),
        part_size=part_size("shards", outputs, shard_size),
        regions=digest(dataset.samples),
    )


def _pooled(source: Bank, image: str, samples: list[Sample], wanted: Manifest) -> dict[str, Feature | Failure]:
    """The features of one image's regions, or why there are none. Raises BankError if the image's are damaged."""
    if image not in source:
        reason = source.failures.get(image, f"{source.path} has no feature of {image}")
        return {sample.key: Failure(sample.key, reason) for sample in samples}
    transform = source.transform(image)
    size = transform.width, transform.height
    found: dict[str, Feature | Failure] = {}
    boxes: dict[str, Box] = {}
    for sample in samples:
        box = (sample.region and sample.region.box) or (0.0, 0.0, float(size[0]), float(size[1]))
        if fault := fault_of(box, size):
            found[sample.key] = Failure(sample.key, fault)
        elif float(transform.visible_fraction(box)) == 0:
            found[sample.key] = Failure(sample.key, "the model did not see it: the image was cropped")
        else:
            boxes[sample.key] = box
    if boxes:
        source.check(image)
        features: dict[str, Tensor] = {
            name: pool_regions(source.output(image, name).float(), torch.tensor(list(boxes.values())), transform)
            for name in wanted.outputs
        }
        regions = {sample.key: sample.region for sample in samples}
        for row, key in enumerate(boxes):
            outputs = {name: each[row].clone() for name, each in features.items()}
            found[key] = Feature(key, outputs, size, regions[key])
    return found
