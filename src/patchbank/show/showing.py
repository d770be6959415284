"""What `show` puts into a figure: the image, its annotated pairs, and the maps that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank.bank.reader import Bank
from patchbank.boxes import union_boxes
from patchbank.config import ExtractConfig
from patchbank.datasets import Dataset
from patchbank.encoders.text import encode_texts
from patchbank.errors import ConfigError, DatasetError
from patchbank.extraction.recompute import spec_of
from patchbank.pool import pool_regions
from patchbank.show.figure import Box, Map
from patchbank.show.maps import Floats, similarities
from patchbank.show.names import names_of, plain
from patchbank.transform import ImageTransform

_LONGEST = 6000  # pixels a side of an image as it is drawn; a figure has no room for more
_TOUCH = 1e-6  # of a box's area: a box that only touches what the model saw has less


def image_of(key: str, file: Path | None, data: Dataset | None, transform: ImageTransform) -> Image.Image | None:
    """The image; None where nothing says where it lies.

    Raises DatasetError where it cannot be opened, or is another one than that which was encoded.
    """
    content: Any
    if file is not None:
        content, name = file.expanduser(), str(file)
    else:
        sample = next((each for each in data.samples if each.key == key), None) if data else None
        if sample is None or not sample.exists():
            return None
        name = str(sample.path)
        try:
            content = sample.source.content(sample)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    try:
        with Image.open(content) as image:
            image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{name} cannot be opened: {reason}.") from error
    if image.size != (transform.width, transform.height):
        raise DatasetError(
            f"{name} is {image.width} x {image.height} pixels, and the bank's {key!r} was "
            f"{transform.width} x {transform.height}: it is another image."
        )
    image.thumbnail((_LONGEST, _LONGEST))
    return image


def box_of(kind: str, xyxy: Sequence[float], label: str = "") -> Box:
    """A box to be drawn, of any four numbers."""
    x1, y1, x2, y2 = map(float, xyxy)
    return Box(kind, (x1, y1, x2, y2), label)


def is_seen(box: Box, transform: ImageTransform) -> bool:
    """Whether the model saw any of a box, and not only touched it."""
    return bool(transform.visible_fraction([box.xyxy])[0] > _TOUCH)


def pairs_of(key: str, data: Dataset | None) -> list[Box]:
    """Human, object and union of each annotated pair, one after the other; none where there are no annotations."""
    if data is None or data.annotations is None or all(sample.key != key for sample in data.samples):
        return []
    target = data.target(key)
    names = names_of(data)
    boxes = []
    unions = union_boxes(target.boxes_h, target.boxes_o)
    rows = zip(target.boxes_h, target.boxes_o, unions, target.object.tolist(), target.verb.tolist(), strict=True)
    for human, thing, union, category, verb in rows:
        boxes.append(box_of("human", human.tolist()))
        boxes.append(box_of("object", thing.tolist(), plain(names.object(category))))
        boxes.append(box_of("union", union.tolist(), plain(names.verb(verb))))
    return boxes


def first_pair(pairs: Sequence[Box], transform: ImageTransform) -> Sequence[Box]:
    """Human, object and union of the first pair of which the model saw any; of the first, where it saw none."""
    triples = [pairs[start : start + 3] for start in range(0, len(pairs), 3)]
    return next((each for each in triples if any(is_seen(box, transform) for box in each)), pairs[:3])


def at_point(tokens: Floats, transform: ImageTransform, point: Sequence[float]) -> Map:
    """Similarities to the patch at a point. Raises ConfigError where the model did not see it."""
    x, y = point
    x1, y1, x2, y2 = transform.visible
    if not (x1 <= x <= x2 and y1 <= y <= y2):
        raise ConfigError(
            f"--at {x:g},{y:g} is not in what the model saw of the image: x {x1:.0f} to {x2:.0f}, "
            f"y {y1:.0f} to {y2:.0f}."
        )
    rows, columns = transform.grid
    column, row = (int(each) for each in transform.points_to_grid([x, y]))
    row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
    title = f"Similarity to the patch at {x:.0f}, {y:.0f}\n(row {row}, column {column}, from 0)"
    return Map(title, similarities(tokens, tokens[row * columns + column]), point=(x, y))


def in_boxes(tokens: Tensor, transform: ImageTransform, boxes: Sequence[Box]) -> list[Map]:
    """Similarities to what is pooled in boxes. Raises ConfigError where the model saw nothing of one."""
    maps = []
    for box in boxes:
        if not is_seen(box, transform):
            raise ConfigError(f"--box {','.join(f'{each:g}' for each in box.xyxy)}: the model saw nothing of it.")
        pooled = pool_regions(tokens, torch.tensor([box.xyxy]), transform)[0].numpy()
        coverage = float(transform.visible_fraction([box.xyxy])[0])
        share = f"{coverage:.0%}" if coverage >= 0.01 else "less than 1%"
        seen = "" if coverage > 0.995 else f"{share} of the box seen by the model"
        what = "the pooled box" if box.kind == "box" else f"the pooled {box.kind}"
        label = f" ({box.label})" if box.label else ""
        if box.kind == "box":
            label = f" {','.join(f'{each:g}' for each in box.xyxy)}{label}"
        maps.append(
            Map(
                f"Similarity to {what}{label}\n{seen}".rstrip(),
                similarities(tokens.numpy(), pooled),
                box=replace(box, label=""),
            )
        )
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
    """Similarities to texts. Raises what `encode_texts` does, and WeightsError on other weights than the bank's."""
    config = ExtractConfig(weights=weights, checkpoints=checkpoints)
    spec = spec_of(bank.manifest, config, data.root if data else None).obtain()
    features = encode_texts(Path(spec.weights or ""), texts)
    every = [similarities(tokens, feature) for feature in features.numpy()]
    shown = np.stack(every)[:, bank.transform(key).valid.flatten()]
    finite = shown[np.isfinite(shown)]
    scale = (float(finite.min()), float(finite.max())) if len(finite) else None
    return [
        Map(f"Similarity to “{plain(text)}”", values, scale=scale) for text, values in zip(texts, every, strict=True)
    ]


def middle(transform: ImageTransform) -> tuple[float, float]:
    """The centre of the patch in the middle of those that show the image, in original pixels."""
    rows, columns = (np.flatnonzero(transform.valid.any(axis)) for axis in (1, 0))
    x, y = transform.points_from_grid([columns[len(columns) // 2] + 0.5, rows[len(rows) // 2] + 0.5]).tolist()
    x1, y1, x2, y2 = transform.visible
    return min(max(x, x1), x2), min(max(y, y1), y2)
