"""``patchbank show BANK KEY``: one image's features as a picture."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from patchbank.cli import options
from patchbank.cli.console import say, show_note
from patchbank.cli.listing import ListingOptions, find_listing, load_if_found, options_needed
from patchbank.cli.outputs import require_own
from patchbank.cli.progress import busy
from patchbank.cli.signals import interruptible
from patchbank.config import ExtractConfig, as_path, option
from patchbank.errors import ConfigError, KeyNotInBank
from patchbank.files import whole_file

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank

_NUMBER = r"\s*(-?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*"
_LONGEST_NAME = 200  # bytes; file systems allow 255
_COMPARED = 20_000  # largest number of keys searched for the closest match: a second
_PAIRS = 8  # drawn without --all-pairs
_FORMATS = ("png", "pdf", "svg")
_MARK = "patchbank show"  # in every picture: only marked files are replaced


@options.takes(config=("weights", "checkpoints"))
def show(
    bank: options.Bank,
    key: options.Key,
    *,
    image: Path | None = option(None, "The image, if the dataset is elsewhere.", metavar="FILE", parse=as_path),
    at: list[str] | None = option(
        None, "Map the similarity to the patch at this original pixel; repeatable.", metavar="X,Y"
    ),
    box: list[str] | None = option(
        None, "Map the similarity to the tokens pooled in this box; repeatable.", metavar="X1,Y1,X2,Y2"
    ),
    text: list[str] | None = option(
        None,
        "Map the similarity to a text, with the checkpoint's text tower; repeatable, on one scale. CLIP's patch tokens "
        "localise poorly; compare maps between prompts.",
    ),
    out: Path | None = option(
        None,
        "The picture: .png, .pdf or .svg.",
        metavar="FILE",
        short="-o",
        default_text="KEY-features.png",
        parse=as_path,
    ),
    asked: ListingOptions,
    config: ExtractConfig,
    all_pairs: bool = option(False, f"Draw all annotated pairs instead of the first {_PAIRS}."),
) -> None:
    """Draw one image's features: what the model saw, their principal components as colours, and similarities.

    The similarity is the cosine between every patch token and the token at --at, the tokens pooled in --box, or a
    --text. With the dataset, found beside the bank or named below, it draws the human, object and union boxes too.

    patchbank show BANK KEY --at 470,250 --box 480,60,660,340 -o out.png
    """
    points = [_numbers("--at", each, 2) for each in at or []]
    boxes = [_numbers("--box", each, 4) for each in box or []]
    target = Path(f"{_file_name(key)}-features.png") if out is None else out
    if target.suffix[1:].lower() not in _FORMATS:
        raise ConfigError(f"{target}: the file must end in {', '.join(f'.{each}' for each in _FORMATS)}.")
    require_own(target, _MARK, "a picture of `patchbank show`")
    notes: list[str] = []
    with interruptible("no picture was written."), busy("drawing"):
        from patchbank.bank.reader import open_bank
        from patchbank.show import showing
        from patchbank.show.figure import Picture, draw
        from patchbank.show.names import plain

        opened = open_bank(bank)
        if key not in opened and key not in opened.failures and (like := _alike(key, opened)):
            raise KeyNotInBank(f"The bank {opened.path} has no {key!r}. Did you mean {like!r}?")
        tokens, transform = opened[key].float(), opened.transform(key)
        array = tokens.numpy()
        data = load_if_found(find_listing(bank, opened.manifest, asked))
        if data is not None and all(sample.key != key for sample in data.samples):
            notes.append(f"{data.title} at {data.annotations or data.images} does not list this image.")
        drawn = showing.image_of(key, image, data, transform)
        pairs = showing.pairs_of(key, data)
        if bad := int((~tokens.isfinite()).any(1).sum()):
            notes.append(f"{bad:,} of {len(array):,} tokens have values that are not finite; they stay blank.")
        wanted = [
            showing.box_of("box", each, f"box\u00a0{number}" * (len(boxes) > 1)) for number, each in enumerate(boxes, 1)
        ]
        of_pair = [] if points or boxes or text else showing.first_pair(pairs, transform)
        seen = [each for each in of_pair if showing.is_seen(each, transform)]
        if not (points or boxes or text or seen):
            points = [showing.middle(transform)]
        maps = [showing.at_point(array, transform, each) for each in points]
        maps += showing.in_boxes(tokens, transform, [*wanted, *seen])
        if unseen := [each.kind for each in of_pair if each not in seen]:
            notes.append(f"no map for the pair's {' and '.join(unseen)}: outside the part that the model saw.")
        if text:
            maps += showing.to_texts(opened, key, array, text, data, config.weights, config.checkpoints)
        kept = pairs if all_pairs else pairs[: 3 * _PAIRS]
        if len(kept) < len(pairs):
            notes.append(f"{len(kept) // 3} of {len(pairs) // 3} annotated pairs are drawn; --all-pairs draws all.")
        picture = Picture(
            title=plain(key),
            tokens=array,
            transform=transform,
            image=drawn,
            boxes=[*kept, *wanted],
            maps=maps,
            footnote=_footnote(opened),
        )
        with warnings.catch_warnings(record=True) as warned, whole_file(target) as place:
            warnings.simplefilter("always")
            name = "Software" if place.suffix.lower() == ".png" else "Creator"
            draw(picture).savefig(place, dpi=150, metadata={name: _MARK})
    if any("missing from font" in str(each.message) for each in warned):
        notes.append("no installed font has some of the characters; boxes replace them.")
    if drawn is None:
        needed = options_needed(opened.manifest)
        notes.append(f"the image is not available: add --image FILE, or{needed}.")
    for note in notes:
        show_note(note)
    say(str(target))


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


def _file_name(key: str) -> str:
    """A file name made from a key."""
    from patchbank.show.names import plain

    name = plain(PurePosixPath(key).stem).replace("/", "-").replace("\\", "-")
    return name.encode()[-_LONGEST_NAME:].decode(errors="ignore")


def _numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """Parse ``10,20``. Raises ConfigError on anything else."""
    match = re.fullmatch(",".join([_NUMBER] * count), text)
    if match is None:
        form = "X,Y" if count == 2 else "X1,Y1,X2,Y2"
        raise ConfigError(f"{option} takes {form} in original pixels, not {text!r}.")
    values = tuple(float(each) for each in match.groups())
    if count == 4 and not (values[0] < values[2] and values[1] < values[3]):
        raise ConfigError(f"{option} {text}: X2 must be greater than X1, and Y2 greater than Y1.")
    return values


def _footnote(bank: Bank) -> str:
    from patchbank.bank.runs import read_runs
    from patchbank.show.names import weights_of

    made = bank.manifest
    facts = f"{made.model}, {made.input.resize}, grid {made.grid[0]} x {made.grid[1]}"
    return f"{facts}, {weights_of(made, read_runs(bank.path))[1]}"
