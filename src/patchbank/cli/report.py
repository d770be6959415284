"""``patchbank report BANK``: one page that shows a whole bank in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli import listing
from patchbank.cli.console import busy, count_text, interruptible, say, show_json, show_note
from patchbank.cli.options import flag
from patchbank.cli.outputs import require_own
from patchbank.cli.progress import CountProgress
from patchbank.config import PAGE_IMAGES
from patchbank.errors import ConfigError, PatchbankError
from patchbank.files import bytes_text
from patchbank.locations import is_remote, locate

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset
    from patchbank.show.page import Written

_MARK = '<meta name="generator" content="patchbank">'  # in every page, by which it is known again


def report(
    bank: Annotated[Path, typer.Argument(parser=locate, metavar="BANK", help="The bank's directory, or its URL.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page.", show_default="BANK-report.html, beside the bank"),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", metavar="N", help="Images in the gallery.", min=1)] = PAGE_IMAGES,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which images: others with another number.")] = 0,
    read: Annotated[
        int | None,
        typer.Option(
            "--read", metavar="N", help="Features read for the statistics, chosen by chance.", show_default="all", min=1
        ),
    ] = None,
    dataset: listing.DatasetName = None,
    split: listing.Split = None,
    root: listing.Root = None,
    images: listing.Images = None,
    annotations: listing.Annotations = None,
    json: Annotated[bool, flag("--json", "What was written, as JSON on standard output.")] = False,
) -> None:
    """Write one page about a bank: what it is, whether its numbers are sound, and a gallery with live similarity maps.

    The page is one file, opened from the disk; it loads nothing from anywhere. Images and annotations are found by
    where the bank lies, if that is an EZ-HOI checkout, or else by the options below; without them the gallery shows
    maps alone. Exit code 1 where images failed, or something cannot be right.
    """
    target = beside(bank) if out is None else out.expanduser()
    if target.is_dir():
        raise ConfigError(f"{target} is a directory: name the page's file, such as {target / 'report.html'}.")
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{target}: a page is written to a .html file, such as {target.with_suffix('.html')}.")
    with busy("Looking at the bank"):
        from patchbank.bank.reader import open_bank

        opened = open_bank(bank)
        found = listing.find_listing(
            bank, opened.manifest, dataset=dataset, split=split, root=root, images=images, annotations=annotations
        )
        data = _loaded(found, opened)
    if data is not None and len(opened) and not any(sample.key in opened for sample in data.samples):
        show_note(f"none of the bank's images is in {data.annotations or data.images}.")
    written = write(opened, target, data, sample=sample, seed=seed, read=read)
    if json:
        from patchbank.show.page import to_json

        show_json(to_json(written))
    else:
        show_written(written)
    if opened.failures and not json:
        show_note(f"{count_text(len(opened.failures), 'image')} of the bank failed: the page gives the reasons.")
    raise typer.Exit(1 if written.wrong or opened.failures else 0)


def _loaded(found: listing.Listing | None, bank: Bank) -> Dataset | None:
    """The images, where they are at hand. Raises PatchbankError where they were named and are not there."""
    if found is None:
        needed = listing.options_needed(bank.manifest)
        show_note(f"the page shows no images, and cannot say which are missing: name them with{needed}.")
        return None
    try:
        return found.load()
    except PatchbankError as error:
        if found.options:
            raise
        show_note(f"the gallery has no images and annotations: {error}")
        return None


def write(opened: Bank, target: Path, data: Dataset | None, **options: int | None) -> Written:
    """Write a bank's page, with progress bars. Raises ConfigError where the file is another's, or cannot be written."""
    require_own(target, _MARK, "a page of `patchbank report`")
    with (
        interruptible("no page was written."),
        CountProgress(f"Reading {opened.path.name}") as reading,
        CountProgress("Drawing the gallery") as drawing,
    ):
        from patchbank.show.page import write_report

        try:
            return write_report(opened, target, data, progress=reading, gallery_progress=drawing, **options)  # type: ignore[arg-type]
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror or error}.") from error


def show_written(written: Written) -> None:
    """Where the page is, and what it holds."""
    if written.images < written.asked:
        show_note(
            f"{count_text(written.images, 'image')} of {written.asked:,} asked for are in it: more make it too large."
        )
    if written.defects:
        show_note(f"{count_text(written.defects, 'image')} with numbers that cannot be right: the page names them.")
    elif written.wrong:
        show_note("something in the bank cannot be right: the page says what.")
    say(f"{written.path} ({bytes_text(written.bytes)}, {count_text(written.images, 'image')})")


def beside(bank: Path) -> Path:
    """Where `extract` leaves a bank's page: beside it; of a bank in an object store, in the current directory."""
    if is_remote(bank):
        return Path(f"{bank.name}-report.html")
    if not bank.name or bank.name == "..":  # the current directory, or the one above it
        bank = bank.resolve()
    return bank.with_name(f"{bank.name}-report.html")
