"""``patchbank report BANK``: one page that shows a whole bank in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from patchbank.cli import options
from patchbank.cli.console import count_text, say, show_json, show_note
from patchbank.cli.outputs import require_own
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import interruptible
from patchbank.config import PAGE_IMAGES, as_path, option
from patchbank.errors import ConfigError
from patchbank.files import bytes_text
from patchbank.listing import ListingOptions, find_listing, load_if_found, options_needed
from patchbank.show.names import grid_of_images, page_beside

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset
    from patchbank.show.page import Written

_MARK = '<meta name="generator" content="patchbank">'  # in every page: only marked files are replaced


@options.takes()
def report(
    bank: options.Bank,
    *,
    out: Path | None = option(
        None, "The page.", metavar="FILE", short="-o", default_text="BANK-report.html, beside the bank", parse=as_path
    ),
    sample: int = option(PAGE_IMAGES, "Images in the gallery.", minimum=1),
    seed: int = option(0, "Random seed for the gallery."),
    read: int | None = option(None, "Random features read for the statistics.", default_text="all", minimum=1),
    output: str | None = options.OUTPUT,
    asked: ListingOptions,
    json: bool = options.JSON,
) -> None:
    """Write one page about a bank: what it is, whether its numbers are sound, and a gallery with live similarity maps.

    The page is one file that a browser opens from the disk; it loads nothing else. In an EZ-HOI checkout it finds the
    images and annotations; elsewhere name them with the options below. Without them the gallery shows maps alone.

    Exit code 1: images failed, or some numbers are wrong.

    patchbank report BANK --sample 50 -o page.html
    """
    target = page_beside(bank) if out is None else out
    if target.is_dir():
        raise ConfigError(f"{target} is a directory: name the page's file, such as {target / 'report.html'}.")
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{target}: the page must be a .html file, such as {target.with_suffix('.html')}.")
    with busy("opening the bank"):
        from patchbank.bank.reader import open_bank

        opened = open_bank(bank)
        grid_of_images(opened, output)
        found = find_listing(bank, opened.manifest, asked)
        data = load_if_found(found, lambda why: show_note(f"the gallery shows no images and annotations: {why}"))
        if found is None:
            needed = f": add{naming}" if (naming := options_needed(opened.manifest)) else ""
            show_note(f"the page shows no images and cannot list missing ones{needed}.")
    if data is not None and len(opened) and not any(sample.key in opened for sample in data.samples):
        show_note(f"{data.annotations or data.images} lists none of the bank's images.")
    written = write(opened, target, data, sample=sample, seed=seed, read=read, output=output)
    if json:
        show_json(vars(written) | {"path": str(written.path)})
    else:
        show_written(written)
    if opened.failures and not json:
        show_note(f"{count_text(len(opened.failures), 'image')} failed; the page lists the reasons.")
    raise typer.Exit(1 if written.wrong or opened.failures else 0)


def write(opened: Bank, target: Path, data: Dataset | None, **options: Any) -> Written:
    """Write a bank's page, with progress. Raises ConfigError if the file is not ours, or cannot be written."""
    require_own(target, _MARK, "a page of `patchbank report`")
    with interruptible("no page was written."), Activity() as activity:
        reading, drawing = activity.counter(f"reading {opened.path.name}"), activity.counter("drawing the gallery")
        from patchbank.show.page import write_report

        try:
            return write_report(opened, target, data, progress=reading, gallery_progress=drawing, **options)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror or error}.") from error


def show_written(written: Written) -> None:
    """Print the page's path and size, and its problems."""
    if written.images < written.asked:
        show_note(f"the page has {written.images:,} of {written.asked:,} images: more would make it too large.")
    if written.defects:
        show_note(f"{count_text(written.defects, 'invalid feature')}; the page lists them.")
    elif written.wrong:
        show_note("a check of the bank failed; the page says which.")
    say(f"{written.path} ({bytes_text(written.bytes)}, {count_text(written.images, 'image')})")
