"""One image's features as a picture: the image, its annotated pairs, and the maps that the user asks for."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank import encoders
from patchbank.bank.reader import Bank
from patchbank.bank.runs import read_runs
from patchbank.boxes import union_boxes
from patchbank.config import DRAWN_PAIRS, ExtractConfig
from patchbank.datasets import Dataset, Sample
from patchbank.datasets.sources import Directory
from patchbank.errors import ConfigError, DatasetError, KeyNotInBank, with_options
from patchbank.extraction.recompute import spec_of
from patchbank.features import GRID
from patchbank.files import whole_file
from patchbank.images import open_image
from patchbank.listing import options_needed, usual_dataset
from patchbank.pool import pool_regions
from patchbank.show.figure import Box, Map, Picture, draw
from patchbank.show.maps import Floats, similarities
from patchbank.show.names import MARK, grid_of_images, named_pairs, plain, weights_of
from patchbank.transform import ImageTransform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 200
_COMPARED = 20_000  # largest number of keys searched for the closest match: a second
_LONGEST = 6000  # pixels a side; a figure needs no more
_TOUCH = 1e-6  # visible fraction of a box that only touches the visible part of the image


@dataclass(frozen=True)
class Drawing:
    """One image's features as a picture; a notebook shows it.

    Attributes:
        figure: matplotlib's.
        notes: what the picture does not show, and why, one sentence each.
    """

    figure: Figure
    notes: list[str] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write a .png, .pdf or .svg. Raises OSError."""
        with whole_file(Path(path)) as place:
            self._save(place, place.suffix[1:].lower())

    def _repr_png_(self) -> bytes:
        self._save(content := BytesIO(), "png")
        return content.getvalue()

    def _save(self, place: Path | BytesIO, format: str) -> None:
        name = "Software" if format == "png" else "Creator"
        with _missing_characters(self.notes):
            self.figure.savefig(place, dpi=_DPI, format=format, metadata={name: MARK})


@contextmanager
def _missing_characters(notes: list[str]) -> Iterator[None]:
    """Turn matplotlib's warnings of them into one note."""
    note = "no installed font has some of the characters; boxes replace them."
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    if any("missing from font" in str(each.message) for each in warned) and note not in notes:
        notes.append(note)


def show_features(
    bank: Bank,
    key: str,
    *,
    at: Sequence[Sequence[float]] = (),
    boxes: Sequence[Sequence[float]] = (),
    texts: Sequence[str] = (),
    image: str | Path | None = None,
    dataset: Dataset | None = None,
    weights: str | Path | None = None,
    checkpoints: str | Path | None = None,
    all_pairs: bool = False,
    output: str | None = None,
) -> Drawing:
    """Draw one image's features: what the model saw, their principal components as colours, and similarities.

    Args:
        at: points (x, y) in original pixels, each for a map of the similarities to the patch there.
        boxes: (x1, y1, x2, y2) in original pixels, each for a map of the similarities to the tokens pooled in it.
        texts: each for a map of the similarities to it, with the checkpoint's text tower.
        image: the image's file; None: of the dataset.
        dataset: the bank's images, and their annotations if any; None: where they usually lie, if there.
        weights, checkpoints: as in `ExtractConfig`, for texts.
        all_pairs: draw all annotated pairs instead of the first eight.
        output: the output to draw, a grid; None: the main one.

    Raises:
        KeyNotInBank: there is no feature of the key.
        BankError: the output is not stored, or is no grid of patches.
        ConfigError: a point or a box is not visible, matplotlib or the text tower's package is not installed, or the
            model has no text tower.
        DatasetError: the image cannot be opened, or has another size than the encoded one.
        WeightsError: texts need other weights than those found.
    """
    if key not in bank and key not in bank.failures and (like := _alike(key, bank)):
        raise KeyNotInBank(f"The bank {bank.path} has no {key!r}. Did you mean {like!r}?")
    notes: list[str] = []
    name = grid_of_images(bank, output)
    tokens, transform = bank.output(key, name).float(), bank.transform(key)
    array = tokens.numpy()
    data = usual_dataset(bank.path, bank.manifest) if dataset is None else dataset
    if data is not None and all(sample.key != key for sample in data):
        notes.append(f"{data.title} at {data.annotations or data.images} does not list this image.")
    drawn = image_of(key, None if image is None else Path(image), data, transform)
    pairs = pairs_of(key, data)
    if bad := int((~tokens.isfinite()).any(1).sum()):
        notes.append(f"{bad:,} of {len(array):,} tokens have values that are not finite; they stay blank.")
    wanted = [box_of("box", each, f"box\u00a0{number}" * (len(boxes) > 1)) for number, each in enumerate(boxes, 1)]
    of_pair = [] if at or boxes or texts else first_pair(pairs, transform)
    seen = [each for each in of_pair if is_seen(each, transform)]
    points = at if at or boxes or texts or seen else [middle(transform)]
    maps = [at_point(array, transform, each) for each in points]
    maps += in_boxes(tokens, transform, [*wanted, *seen])
    if unseen := [each.kind for each in of_pair if each not in seen]:
        notes.append(f"no map for the pair's {' and '.join(unseen)}: outside the part that the model saw.")
    if texts:
        config = ExtractConfig(weights=weights, checkpoints=checkpoints)  # type: ignore[arg-type]
        maps += to_texts(bank, name, key, array, texts, config, data)
        if not bank.manifest.outputs[name].projection:
            notes.append(
                f"texts are in the space of the model's pooled output, and its {name} are not: read with care."
            )
    kept = pairs if all_pairs else pairs[: 3 * DRAWN_PAIRS]
    if len(kept) < len(pairs):
        notes.append(f"{len(kept) // 3} of {len(pairs) // 3} annotated pairs are drawn; --all-pairs draws all.")
    if drawn is None:
        naming = options_needed(bank.manifest)
        notes.append(f"the image is not available: add --image FILE{naming and f', or{naming}'}.")
    made = bank.manifest
    of = f", {name}" if name != GRID else ""
    picture = Picture(
        title=f"{plain(key)}\n{plain(made.model)}{of}, {made.grid[0]} x {made.grid[1]} patches",
        tokens=array,
        transform=transform,
        image=drawn,
        boxes=[*kept, *wanted],
        maps=maps,
        footnote=f"{made.input.resize}, {weights_of(made, read_runs(bank.path))[1]}",
    )
    notes = list(map(with_options, notes))
    with _missing_characters(notes):
        return Drawing(draw(picture), notes)


def _alike(key: str, keys: Collection[str]) -> str | None:
    """The key that differs only in case, directory or extension; else the closest one, if it is close."""
    name = PurePosixPath(key).name.casefold()
    stem = name.partition(".")[0].removesuffix("_clip")
    same = [each for each in keys if PurePosixPath(each).name.casefold().partition(".")[0] == stem]
    if same:
        return min(same, key=lambda each: (PurePosixPath(each).name.casefold() != name, each))
    if len(keys) > _COMPARED:
        return None
    return next(iter(difflib.get_close_matches(key, keys, n=1, cutoff=0.8)), None)


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
    title = f"Similarity to the patch at\n{x:.0f}, {y:.0f} (row {row}, column {column})"
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
    output: str,
    key: str,
    tokens: Floats,
    texts: Sequence[str],
    config: ExtractConfig,
    data: Dataset | None,
) -> list[Map]:
    """Similarities to texts.

    Raises as `encoders.encode_texts` does; ConfigError if the output is not in their space, WeightsError on other
    weights than the bank's.
    """
    encoders.require_texts(bank.manifest.model)
    spec = spec_of(bank.manifest, config, data.root if data else None)
    features = encoders.encode_texts(spec, texts)
    reduction = bank.manifest.reduction
    reduced = reduction is not None and output in reduction.outputs
    width = reduction.dim if reduction and reduced else tokens.shape[-1]
    if output.startswith("block:") or features.shape[-1] != width:
        raise ConfigError(f"--text: {output} of {bank.path} is not in the space of texts. Choose another --output.")
    features = bank.project(features) if reduced else features
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
