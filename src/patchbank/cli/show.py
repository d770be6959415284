"""``patchbank show BANK KEY``: one image's features as a picture."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli import listing, options
from patchbank.cli.console import busy, interruptible, say, show_note
from patchbank.cli.options import flag
from patchbank.cli.outputs import require_own
from patchbank.errors import ConfigError, KeyNotInBank, PatchbankError
from patchbank.files import whole_file
from patchbank.locations import locate

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset

_NUMBER = r"\s*(-?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*"
_LONGEST_NAME = 200  # bytes, of 255 that a file's name may have
_COMPARED = 20_000  # keys, letter by letter; it takes a second
_PAIRS = 8  # drawn of an image's, unless all are asked for
_FORMATS = ("png", "pdf", "svg")
_MARK = "patchbank show"  # in every picture, by which it is known again


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
            help="Similarity to a text, by the checkpoint's text tower. Several times: their maps share a scale. CLIP "
            "was trained to match whole images with texts, and its patch tokens only through [CLS]: they tell what is "
            "in a picture better than where. Compare a map with that of another text; single values mean little, and "
            "maps may be inverted.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The picture: .png, .pdf or .svg.", show_default="KEY-features.png"
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
    target = Path(f"{_file_name(key)}-features.png") if out is None else out.expanduser()
    if target.suffix[1:].lower() not in _FORMATS:
        raise ConfigError(f"{target}: pictures are written as {', '.join(f'.{each}' for each in _FORMATS)}.")
    require_own(target, _MARK, "a picture of `patchbank show`")
    notes: list[str] = []
    with interruptible("no picture was written."), busy("Drawing"):
        from patchbank.bank.reader import open_bank
        from patchbank.show import showing
        from patchbank.show.figure import Picture, draw
        from patchbank.show.names import plain

        opened = open_bank(bank)
        if key not in opened and key not in opened.failures and (like := _alike(key, opened)):
            raise KeyNotInBank(f"The bank {opened.path} has no {key!r}. Did you mean {like!r}?")
        tokens, transform = opened[key].float(), opened.transform(key)
        array = tokens.numpy()
        found = listing.find_listing(
            bank, opened.manifest, dataset=dataset, split=split, root=root, images=images, annotations=annotations
        )
        data = _dataset_of(found)
        if data is not None and all(sample.key != key for sample in data.samples):
            notes.append(f"{data.title} at {data.annotations or data.images} does not list this image.")
        drawn = showing.image_of(key, image, data, transform)
        pairs = showing.pairs_of(key, data)
        if bad := int((~tokens.isfinite()).any(1).sum()):
            notes.append(f"{bad:,} of its {len(array):,} tokens hold numbers that are not finite, and are left blank.")
        asked = [
            showing.box_of("box", each, f"box\u00a0{number}" * (len(boxes) > 1)) for number, each in enumerate(boxes, 1)
        ]
        of_pair = [] if points or boxes or text else showing.first_pair(pairs, transform)
        seen = [each for each in of_pair if showing.is_seen(each, transform)]
        if not (points or boxes or text or seen):
            points = [showing.middle(transform)]
        maps = [showing.at_point(array, transform, each) for each in points]
        maps += showing.in_boxes(tokens, transform, [*asked, *seen])
        if unseen := [each.kind for each in of_pair if each not in seen]:
            notes.append(f"the model saw nothing of the drawn pair's {' and '.join(unseen)}: no map of it.")
        if text:
            maps += showing.to_texts(opened, key, array, text, data, weights, checkpoints)
        kept = pairs if all_pairs else pairs[: 3 * _PAIRS]
        if len(kept) < len(pairs):
            notes.append(f"{len(kept) // 3} of {len(pairs) // 3} annotated pairs are drawn: --all-pairs draws all.")
        picture = Picture(
            title=plain(key),
            tokens=array,
            transform=transform,
            image=drawn,
            boxes=[*kept, *asked],
            maps=maps,
            footnote=_footnote(opened),
        )
        with warnings.catch_warnings(record=True) as warned, whole_file(target) as place:
            warnings.simplefilter("always")
            name = "Software" if place.suffix.lower() == ".png" else "Creator"
            draw(picture).savefig(place, dpi=150, metadata={name: _MARK})
    if any("missing from font" in str(each.message) for each in warned):
        notes.append("no font here has some of the characters: boxes stand for them.")
    if drawn is None:
        needed = listing.options_needed(opened.manifest)
        notes.append(f"the image is not at hand, and is left out: give it with --image FILE, or with{needed}.")
    for note in notes:
        show_note(note)
    say(str(target))


def _alike(key: str, keys: Collection[str]) -> str | None:
    """The key that may have been meant: of the same name but for its case, directory or extension; or nearly so."""
    name = PurePosixPath(key).name.casefold()
    stem = name.partition(".")[0].removesuffix("_clip")
    same = [each for each in keys if PurePosixPath(each).name.casefold().partition(".")[0] == stem]
    if same:
        return min(same, key=lambda each: (PurePosixPath(each).name.casefold() != name, each))
    if len(keys) > _COMPARED:
        return None
    return next(iter(difflib.get_close_matches(key, keys, n=1, cutoff=0.8)), None)


def _file_name(key: str) -> str:
    """Of a key, what a file can be called."""
    from patchbank.show.names import plain

    name = plain(PurePosixPath(key).stem).replace("/", "-").replace("\\", "-")
    return name.encode()[-_LONGEST_NAME:].decode(errors="ignore")


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


def _dataset_of(found: listing.Listing | None) -> Dataset | None:
    """The listing's data set; None where it was only guessed, and is not there."""
    try:
        return found.load() if found else None
    except PatchbankError:
        if found and found.options:
            raise
        return None


def _footnote(bank: Bank) -> str:
    from patchbank.bank.runs import read_runs
    from patchbank.show.names import weights_text

    made = bank.manifest
    facts = f"{made.model}, {made.input.resize}, grid {made.grid[0]} x {made.grid[1]}"
    return f"{facts}, {weights_text(made, read_runs(bank.path))}"
