"""``patchbank show BANK KEY``: one image's features as a picture."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from patchbank.cli import options
from patchbank.cli.console import say, show_note
from patchbank.cli.outputs import require_own
from patchbank.cli.progress import busy
from patchbank.cli.signals import interruptible
from patchbank.config import DRAWN_PAIRS, ExtractConfig, as_path, option
from patchbank.errors import ConfigError
from patchbank.listing import ListingOptions, find_listing, load_if_found
from patchbank.show.names import MARK

_NUMBER = r"\s*(-?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*"
_LONGEST_NAME = 200  # bytes; file systems allow 255
_FORMATS = ("png", "pdf", "svg")


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
    output: str | None = options.OUTPUT,
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
    all_pairs: bool = option(False, f"Draw all annotated pairs instead of the first {DRAWN_PAIRS}."),
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
    require_own(target, MARK, "a picture of `patchbank show`")
    with interruptible("no picture was written."), busy("drawing"):
        from patchbank.bank.reader import open_bank
        from patchbank.show.showing import show_features

        opened = open_bank(bank)
        drawing = show_features(
            opened,
            key,
            at=points,
            boxes=boxes,
            texts=text or (),
            image=image,
            dataset=load_if_found(find_listing(bank, opened.manifest, asked)) if asked.given else None,
            weights=config.weights,
            checkpoints=config.checkpoints,
            all_pairs=all_pairs,
            output=output,
        )
        drawing.save(target)
    for note in drawing.notes:
        show_note(note)
    say(str(target))


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
