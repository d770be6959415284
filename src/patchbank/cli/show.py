"""``patchbank show BANK KEY``: one image's features as a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli import listing, options
from patchbank.cli.console import busy, say, show_note
from patchbank.cli.options import flag
from patchbank.errors import BankError, ConfigError, DatasetError, PatchbankError
from patchbank.locations import locate

if TYPE_CHECKING:
    from PIL.Image import Image

    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset
    from patchbank.geometry import ImageTransform
    from patchbank.pictures.figure import Box, Map
    from patchbank.pictures.maps import Floats

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_LONGEST = 6000  # pixels a side of an image as it is drawn; a figure has no room for more
_PAIRS = 8  # drawn of an image's, unless all are asked for
_FORMATS = ("png", "pdf", "svg", "jpg", "webp")


def show(
    bank: Annotated[Path, typer.Argument(parser=locate, metavar="BANK", help="The bank's directory, or its URL.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="The image's name in it.")],
    *,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="The image, where the data set's is not at hand.")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="X,Y", help="Similarity to the patch here, in original pixels. Several times."),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            "--box", metavar="X1,Y1,X2,Y2", help="Similarity to what is pooled in this box, likewise. Several times."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Similarity to a text, by the checkpoint's text tower. Several times. CLIP was trained to match whole "
            "images with texts, and its patch tokens only through [CLS]: they tell what is in a picture better than "
            "where. Compare a map with that of another text; single values mean little, and maps may be inverted.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The picture: .png, .pdf, .svg.", show_default="KEY-features.png"
        ),
    ] = None,
    dataset: listing.DatasetName = None,
    split: listing.Split = None,
    root: listing.Root = None,
    images: listing.Images = None,
    annotations: listing.Annotations = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="For --text, a checkpoint that is not the official."),
    ] = None,
    checkpoints: options.Checkpoints = None,
    all_pairs: Annotated[bool, flag("--all-pairs", f"Draw all annotated pairs, and not {_PAIRS} at most.")] = False,
) -> None:
    """Draw one image's features: what the model saw, their principal components as colours, and similarities.

    The similarity is the cosine of every patch's token to that of the patch at --at, to the tokens pooled over --box,
    or to a --text. Where the data set is found or given, its human and object boxes and their unions are drawn too. The
    image is taken from there, or from --image.
    """
    points = [_numbers("--at", each, 2) for each in at or []]
    boxes = [_numbers("--box", each, 4) for each in box or []]
    target = Path(f"{PurePosixPath(key).stem}-features.png") if out is None else out.expanduser()
    if target.suffix[1:].lower() not in _FORMATS:
        raise ConfigError(f"{target}: pictures are written as {', '.join(f'.{each}' for each in _FORMATS)}.")
    with busy("Drawing"):
        from patchbank.bank.reader import open_bank
        from patchbank.pictures.figure import Picture, draw

        opened = open_bank(bank)
        tokens, transform = opened[key].float(), opened.transform(key)
        found = listing.find_listing(
            bank, opened.manifest, dataset=dataset, split=split, root=root, images=images, annotations=annotations
        )
        data = _dataset_of(found, required=found is not None and bool(found.options))
        drawn = _image_of(key, image, data, transform)
        pairs = _pairs_of(key, data)
        if not (points or boxes or text) and not pairs:
            rows, columns = transform.grid
            points = [tuple(transform.points_from_grid([columns // 2 + 0.5, rows // 2 + 0.5]).tolist())]
        array = tokens.numpy()
        maps = [_at_point(array, transform, each) for each in points]
        asked = [_box("box", each) for each in boxes]
        if not (points or boxes or text):
            asked = [each for each in pairs[:3] if transform.coverage([each.xyxy])[0] > 0]
        maps += _in_boxes(tokens, transform, asked)
        if text:
            maps += _to_texts(opened, array, text, data, weights, checkpoints)
        kept = pairs if all_pairs else pairs[: 3 * _PAIRS]
        picture = Picture(
            title=key,
            tokens=array,
            transform=transform,
            image=drawn,
            boxes=[*kept, *(_box("box", each) for each in boxes)],
            maps=maps,
            footnote=_footnote(opened),
        )
        figure = draw(picture)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    if drawn is None:
        show_note("the image is not at hand, and is left out: give it with --image, or its data set's options.")
    if len(kept) < len(pairs):
        show_note(f"{len(kept) // 3} of {len(pairs) // 3} annotated pairs are drawn: --all-pairs draws all.")
    say(str(target))


def _numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """``10,20`` as numbers. Raises ConfigError where it is no such thing."""
    match = re.fullmatch(",".join([_NUMBER] * count), text)
    if match is None:
        form = "X,Y" if count == 2 else "X1,Y1,X2,Y2"
        raise ConfigError(f"{option} takes {form} in pixels of the original image, not {text!r}.")
    values = tuple(float(each) for each in match.groups())
    if count == 4 and not (values[0] < values[2] and values[1] < values[3]):
        raise ConfigError(f"{option} {text}: X2 must be more than X1, and Y2 more than Y1.")
    return values


def _dataset_of(found: listing.Listing | None, *, required: bool) -> Dataset | None:
    """The listing's data set; None where it was only guessed, and is not there."""
    if found is None or found.dataset is None:
        return None
    try:
        return found.load()
    except PatchbankError:
        if required:
            raise
        return None


def _image_of(key: str, file: Path | None, data: Dataset | None, transform: ImageTransform) -> Image | None:
    """The image; None where nothing says where it lies.

    Raises DatasetError where it cannot be opened, or is another one than that which was encoded.
    """
    from PIL import Image

    content: Any
    if file is not None:
        content, name = file.expanduser(), str(file)
    else:
        record = next((each for each in data.records if each.key == key), None) if data else None
        if record is None:
            return None
        content, name = record.source.content(record), str(record.path)
        if not record.exists():
            return None
    try:
        with Image.open(content) as image:
            image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{name} cannot be opened: {reason}.") from error
    if image.size != (transform.width, transform.height):
        raise DatasetError(
            f"{name} is {image.width} x {image.height} pixels, and the bank's {key} was "
            f"{transform.width} x {transform.height}: it is another image."
        )
    image.thumbnail((_LONGEST, _LONGEST))
    return image


def _box(kind: str, xyxy: Sequence[float], label: str = "") -> Box:
    from patchbank.pictures.figure import Box

    x1, y1, x2, y2 = map(float, xyxy)
    return Box(kind, (x1, y1, x2, y2), label)


def _pairs_of(key: str, data: Dataset | None) -> list[Box]:
    """Human, object and union of each annotated pair, one after the other; none where there are no annotations."""
    from patchbank.boxes import union_boxes
    from patchbank.pictures.names import names_of

    if data is None or data.annotations is None or all(record.key != key for record in data.records):
        return []
    target = data.target(key)
    names = names_of(data)
    boxes = []
    unions = union_boxes(target.boxes_h, target.boxes_o)
    rows = zip(target.boxes_h, target.boxes_o, unions, target.object.tolist(), target.verb.tolist(), strict=True)
    for human, thing, union, category, verb in rows:
        boxes.append(_box("human", human.tolist()))
        boxes.append(_box("object", thing.tolist(), names.object(category)))
        boxes.append(_box("union", union.tolist(), names.verb(verb)))
    return boxes


def _at_point(tokens: Floats, transform: ImageTransform, point: Sequence[float]) -> Map:
    """Similarities to the patch at a point. Raises ConfigError where the model did not see it."""
    from patchbank.pictures.figure import Map
    from patchbank.pictures.maps import similarities

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
    title = f"Similarity to the patch at {x:.0f}, {y:.0f}\n(row {row}, column {column})"
    return Map(title, similarities(tokens, tokens[row * columns + column]), point=(x, y))


def _in_boxes(tokens: Any, transform: ImageTransform, boxes: Sequence[Box]) -> list[Map]:
    """Similarities to what is pooled in boxes. Raises ConfigError where the model saw nothing of one."""
    import torch

    from patchbank.pictures.figure import Map
    from patchbank.pictures.maps import similarities
    from patchbank.regions import pool_regions

    maps = []
    for box in boxes:
        if not (coverage := float(transform.coverage([box.xyxy])[0])):
            raise ConfigError(f"--box {','.join(f'{each:g}' for each in box.xyxy)}: the model saw nothing of it.")
        pooled = pool_regions(tokens, torch.tensor([box.xyxy]), transform)[0].numpy()
        seen = "" if coverage > 0.995 else f"{coverage:.0%} of the box seen by the model"
        what = "the box" if box.kind == "box" else f"the pooled {box.kind}"
        label = f" ({box.label})" if box.label else ""
        maps.append(
            Map(
                f"Similarity to {what}{label}\n{seen}".rstrip(),
                similarities(tokens.numpy(), pooled),
                box=replace(box, label=""),
            )
        )
    return maps


def _to_texts(
    bank: Bank,
    tokens: Floats,
    texts: Sequence[str],
    data: Dataset | None,
    weights: Path | None,
    checkpoints: Path | None,
) -> list[Map]:
    """Similarities to texts. Raises what `encode_texts` does, and WeightsError on other weights than the bank's."""
    from patchbank.encoder.text import encode_texts
    from patchbank.models import MODELS
    from patchbank.pictures.figure import Map
    from patchbank.pictures.maps import similarities
    from patchbank.recompute import checkpoint_of

    if (model := MODELS.get(bank.fingerprint.model)) is None:
        raise BankError(f"{bank.path} is of {bank.fingerprint.model}, which patchbank does not know: no text tower.")
    checkpoint = checkpoint_of(
        model, bank.manifest, data.root if data else None, weights=weights, checkpoints=checkpoints
    )
    features = encode_texts(checkpoint, texts).numpy()
    return [
        Map(f"Similarity to “{text}”", similarities(tokens, feature))
        for text, feature in zip(texts, features, strict=True)
    ]


def _footnote(bank: Bank) -> str:
    from patchbank.bank.runs import read_runs
    from patchbank.pictures.names import weights_text

    made = bank.manifest
    facts = f"{made.fingerprint.model}, {made.resize}, grid {made.grid[0]} x {made.grid[1]}"
    return f"{facts}, {weights_text(made, read_runs(bank.path))}"
