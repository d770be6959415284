"""The parts of a figure: the image, its annotated pairs, and the maps that the user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank import encoders
from patchbank.bank.reader import Bank
from patchbank.boxes import union_boxes
from patchbank.config import ExtractConfig
from patchbank.datasets import Dataset, Sample
from patchbank.datasets.sources import Directory
from patchbank.errors import ConfigError, DatasetError
from patchbank.extraction.recompute import spec_of
from patchbank.images import open_image
from patchbank.pool import pool_regions
from patchbank.show.figure import Box, Map
from patchbank.show.maps import Floats, similarities
from patchbank.show.names import named_pairs, plain
from patchbank.transform import ImageTransform

_LONGEST = 6000  # pixels a side; a figure needs no more
_TOUCH = 1e-6  # visible fraction of a box that only touches the visible part of the image


def image_of(key: str, file: Path | None, data: Dataset | None, transform: ImageTransform) -> Image.Image | None:
    """The image from the file or the dataset; None if neither has it.

    Raises DatasetError if it cannot be opened, or has another size than the encoded one.
    """
    if file is not None:
        sample = Sample(file.name, Directory(file.expanduser().parent), 0)
    else:
        found = next((each for each in data.samples if each.key == key), None) if data else None
        if found is None or not found.exists():
            return None
        sample = found
    try:
        with open_image(sample.source.content(sample)) as image:
            image.load()
    except OSError as error:
        raise DatasetError(f"{sample.path} cannot be opened: {error.strerror or error}.") from error
    if image.size != (transform.width, transform.height):
        raise DatasetError(
            f"{sample.path} is another image: it has {image.width} x {image.height} pixels, and the bank's {key!r} has "
            f"{transform.width} x {transform.height}."
        )
    image.thumbnail((_LONGEST, _LONGEST))
    return image


def box_of(kind: str, xyxy: Sequence[float], label: str = "") -> Box:
    """A box to draw, from any four numbers."""
    x1, y1, x2, y2 = map(float, xyxy)
    return Box(kind, (x1, y1, x2, y2), label)


def is_seen(box: Box, transform: ImageTransform) -> bool:
    """Whether any part of a box is visible to the model."""
    return bool(transform.visible_fraction([box.xyxy])[0] > _TOUCH)


def pairs_of(key: str, data: Dataset | None) -> list[Box]:
    """Human, object and union of each annotated pair, in a row; empty without annotations."""
    if data is None or data.annotations is None or all(sample.key != key for sample in data.samples):
        return []
    boxes = []
    for human, thing, name, verb in named_pairs(data, key):
        union = union_boxes(torch.tensor(human), torch.tensor(thing)).tolist()
        boxes += [box_of("human", human), box_of("object", thing, plain(name)), box_of("union", union, plain(verb))]
    return boxes


def first_pair(pairs: Sequence[Box], transform: ImageTransform) -> Sequence[Box]:
    """Human, object and union of the first visible pair; of the first pair if none is visible."""
    triples = [pairs[start : start + 3] for start in range(0, len(pairs), 3)]
    return next((each for each in triples if any(is_seen(box, transform) for box in each)), pairs[:3])


def at_point(tokens: Floats, transform: ImageTransform, point: Sequence[float]) -> Map:
    """Similarities to the patch at a point (x, y) in original pixels. Raises ConfigError if it is not visible."""
    x, y = point
    x1, y1, x2, y2 = transform.visible
    if not (x1 <= x <= x2 and y1 <= y <= y2):
        raise ConfigError(
            f"--at {x:g},{y:g} is outside the part that the model saw: x {x1:.0f} to {x2:.0f}, y {y1:.0f} to {y2:.0f}."
        )
    rows, columns = transform.grid
    column, row = (int(each) for each in transform.points_to_grid([x, y]))
    row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
    title = f"Similarity to the patch at {x:.0f}, {y:.0f}\n(row {row}, column {column}, from 0)"
    return Map(title, similarities(tokens, tokens[row * columns + column]), point=(x, y))


def in_boxes(tokens: Tensor, transform: ImageTransform, boxes: Sequence[Box]) -> list[Map]:
    """Similarities to the tokens pooled in boxes. Raises ConfigError if a box is not visible."""
    maps = []
    for box in boxes:
        numbers = ",".join(f"{each:g}" for each in box.xyxy)
        if not is_seen(box, transform):
            raise ConfigError(f"--box {numbers} is outside the part that the model saw.")
        pooled = pool_regions(tokens, torch.tensor([box.xyxy]), transform)[0].numpy()
        fraction = float(transform.visible_fraction([box.xyxy])[0])
        share = f"{fraction:.0%}" if fraction >= 0.01 else "less than 1%"
        seen = "" if fraction > 0.995 else f"{share} of the box visible"
        label = f"{f' {numbers}' * (box.kind == 'box')}{f' ({box.label})' * bool(box.label)}"
        title = f"Similarity to the pooled {box.kind}{label}\n{seen}".rstrip()
        maps.append(Map(title, similarities(tokens.numpy(), pooled), box=replace(box, label="")))
    return maps


def to_texts(
    bank: Bank,
    key: str,
    tokens: Floats,
    texts: Sequence[str],
    data: Dataset | None,
    weights: Path | None,
    checkpoints: Path | None,
) -> list[Map]:
    """Similarities to texts.

    Raises as `encoders.encode_texts` does; WeightsError on other weights than the bank's.
    """
    config = ExtractConfig(weights=weights, checkpoints=checkpoints)
    spec = spec_of(bank.manifest, config, data.root if data else None)
    features = encoders.encode_texts(spec, texts)
    every = [similarities(tokens, feature) for feature in features.numpy()]
    shown = np.stack(every)[:, bank.transform(key).valid.flatten()]
    finite = shown[np.isfinite(shown)]
    scale = (float(finite.min()), float(finite.max())) if len(finite) else None
    return [
        Map(f"Similarity to “{plain(text)}”", values, scale=scale) for text, values in zip(texts, every, strict=True)
    ]


def middle(transform: ImageTransform) -> tuple[float, float]:
    """The centre of the middle patch that shows the image, (x, y) in original pixels."""
    rows, columns = (np.flatnonzero(transform.valid.any(axis)) for axis in (1, 0))
    x, y = transform.points_from_grid([columns[len(columns) // 2] + 0.5, rows[len(rows) // 2] + 0.5]).tolist()
    x1, y1, x2, y2 = transform.visible
    return min(max(x, x1), x2), min(max(y, y1), y2)
