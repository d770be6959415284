"""``patchbank verify BANK``: read every feature and report problems."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.text import Text

from patchbank.cli import options
from patchbank.cli.completing import show_completing
from patchbank.cli.console import count_text, one_line, plain_table, say, say_prose, show_json, show_note, stdout
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import interruptible
from patchbank.config import ExtractConfig, option
from patchbank.errors import BankError, ConfigError
from patchbank.features import UNKNOWN
from patchbank.listing import Listing, ListingOptions, find_listing, options_needed
from patchbank.locations import is_remote

if TYPE_CHECKING:
    from patchbank.bank.ada_cm_reading import PairsReport
    from patchbank.bank.check import Finding, Report
    from patchbank.bank.manifest import Manifest
    from patchbank.encoders.runner import Runner

_NAMED = 10  # findings named for each kind; the rest are counted


@options.takes(config=("weights", "device"))
def verify(
    bank: options.Bank,
    *,
    asked: ListingOptions,
    config: ExtractConfig,
    sample: int = option(0, "Compare N features with a fresh extraction of their images.", minimum=0),
    all: bool = option(False, f"Name every finding, not only the first {_NAMED} of a kind."),
    json: bool = options.JSON,
) -> None:
    """Read every feature of a bank, of EZ-HOI's pickles or of ADA-CM's file, and report what is wrong. Writes nothing.

    Exit codes: 0 no problem, 1 problems; the report names each, and the command that fixes it.

    patchbank verify BANK --sample 20
    """
    if not is_remote(bank) and bank.is_file():
        _verify_pairs(bank, asked, sample, names=None if all else _NAMED, json=json)
    with busy("looking at the bank"):
        from patchbank.bank.check import verify
        from patchbank.bank.parts import manifest_in

        manifest = manifest_in(bank)
        found = find_listing(bank, manifest, asked, "--sample" if sample else None, recall=bool(sample))
        keys = found.keys() if found else None
        # Before the bank is read, which may take hours: what is missing for the comparison ends the command.
        compare = comparison(manifest, found, config, sample) if found and sample else None
    with interruptible("nothing was changed."):
        with Activity() as activity:
            counter = activity.counter(f"verifying {bank.name}", manifest.noun if manifest else "image")
            report = verify(bank, keys, counter, size_of=found.size_of() if found else None)
        if compare:
            compare(report)
    if json:
        show_json(_report_dict(report, found))
    else:
        show_report(report, found, config.weights, names=None if all else _NAMED)
    if sample and not report.sample:
        show_note("no image could be extracted again: none that can be read has a feature to compare with.")
    raise typer.Exit(1 if report.problems else 0)


def comparison(
    manifest: Manifest | None, found: Listing, config: ExtractConfig, count: int
) -> Callable[[Report], Runner]:
    """A function that compares features with a fresh extraction, and returns the encoder.

    Raises PatchbankError if the model, its weights or the images are not available.
    """
    from patchbank.extraction.plan import check_images
    from patchbank.extraction.recompute import compare_sample, runner_of

    if manifest is None:
        raise BankError("Nothing says which model made these pickles: import them with --sample, to compare them.")
    dataset, wanted = found.load(), manifest.input
    check_images(dataset)
    runner = runner_of(manifest, config, found.root)

    def compare(report: Report) -> Runner:
        with busy(f"extracting {count} images again"):
            compare_sample(report, dataset, runner, wanted, count)
        return runner

    return compare


def _verify_pairs(path: Path, asked: ListingOptions, sample: int, names: int | None, *, json: bool) -> NoReturn:
    from patchbank.bank.ada_cm_reading import verify_pairs

    if sample:
        raise ConfigError("--sample compares features of a bank: `patchbank import` makes one of ADA-CM's file.")
    with busy("reading the annotations"):
        found = find_listing(path, None, asked)
        annotated = found.pairs() if found else None
    with interruptible("nothing was changed."), Activity() as activity:
        report = verify_pairs(path, annotated, activity.counter(f"verifying {path.name}", bytes=True))
    if json:
        show_json(_report_dict(report, found) | {"pairs": report.pairs, "shape": report.shape, "input": report.input})
    else:
        _show_pairs(report, found, names)
    raise typer.Exit(1 if report.problems else 0)


def _show_pairs(report: PairsReport, found: Listing | None, names: int | None) -> None:
    say(str(report.bank), "bold")
    width = f", features of {report.shape[0]} numbers" if report.shape else ""
    say_prose(f"  {count_text(report.pairs, 'pair')} of {count_text(report.looked_at, 'image')} read{width}")
    if found is None:
        say_prose(f"  not compared with annotated pairs: --annotations FILE or{options_needed(None)} names them")
    else:
        size = " in an input of {} x {} pixels".format(*report.input) if report.input else ""
        say_prose(f"  compared with the pairs of {report.listed:,} images that {found.source} lists{size}")
    show_findings(report.findings, names, "--all")
    if not report.problems:
        say(f"\nNo problems found{'' if found else '; completeness not checked (no annotations)'}.", "bold green")
        return
    say(f"\n{count_text(len({finding.name for finding in report.problems}), 'problem')} found.", "bold red")
    say_prose("`patchbank extract pairs` and `patchbank convert --layout ada-cm` make the file again.")


def show_report(report: Report, found: Listing | None, weights: Path | None, names: int | None = _NAMED) -> None:
    """Print the problems, worst first, each with names and its fix; then a summary."""
    from patchbank.bank.check import KINDS

    naming = options_needed(report.manifest)  # nothing, for boxes
    say(str(report.bank), "bold")
    say_prose(f"  {report.looked_at:,} features read: {one_line(_what(report))}")
    if found is not None and report.listed is not None:
        say_prose(f"  compared with the {report.listed:,} {report.noun}s that {found.source} lists")
    elif naming:
        say_prose(f"  not compared with a list of {report.noun}s:{naming} names one")
    if report.sample:
        worst = max(report.sample, key=lambda key: report.sample[key])
        error = f"relative error at most {report.sample[worst]:.1e} ({one_line(worst)})"
        say_prose(f"  {len(report.sample):,} extracted again from their images: {error}")
    table = plain_table(">features", "what", "fix")
    unknown = report.manifest is not None and UNKNOWN in report.manifest.identity.values()
    extracting = "import again" if unknown else "repair --extract" if report.layout else "import, extract"
    extracting = extracting if naming else "extract boxes"
    fixes = {"import": "import", "convert": "convert again", "extract": extracting, "scratch": "extract --overwrite"}
    for kind, findings in report.by_kind().items():
        style = "red" if KINDS[kind].fix else "dim"
        table.add_row(f"{len(findings):,}", Text(KINDS[kind].says, style), fixes.get(KINDS[kind].fix or "", ""))
    if table.row_count:
        stdout.print("", table)
    show_findings(report.findings, names, "--all")
    if not report.problems:
        unlisted = "; completeness not checked (no image list)" if report.listed is None else ""
        say(f"\nNo problems found{unlisted}.", "bold green")
        return
    count = len({finding.name for finding in report.problems})
    total = len({*report.sound, *(finding.name for finding in report.problems)})
    say(f"\n{count:,} of {total:,} {'has' if count == 1 else 'have'} problems.", "bold red")
    needed = {KINDS[finding.kind].fix for finding in report.problems}
    options = found.options if found else naming
    if report.layout is None:
        place = shlex.quote(str(report.bank))
        say_prose("Import them into a bank, which leaves out the unusable ones, and extract those again:")
        say(f"  patchbank import {place} BANK --model MODEL{options if found else ''}", "cyan")
    elif report.manifest is None:
        say_prose(
            "No part of the bank is sound: nothing says how it was made. The command that made it makes it again."
        )
    elif needed & {"extract", "import", "convert"}:
        kinds = {finding.kind for finding in report.problems if KINDS[finding.kind].fix != "scratch"}
        if kinds - {"failed", "missing", "unread"}:
            title = "Put the unusable files in quarantine, and extract them again:"
        elif "failed" in kinds:
            title = "Extract again what failed, after replacing images that cannot be read:"
        else:
            title = "Extract what is missing:"
        show_completing(title, report.bank, report.manifest, options, weights)
    if "scratch" in needed:
        say_prose("Features differ from a fresh extraction: images, weights or preprocessing changed.")
        say_prose("If the change is intended, extract all features from scratch: patchbank extract ... --overwrite")
    if "look" in needed:
        say_prose(
            "Check the disk and the permissions of the files that could not be read; repair does not change them."
        )


def show_findings(findings: Sequence[Finding], names: int | None, option: str) -> None:
    """Print the findings of each kind below its title.

    Args:
        names: how many of a kind are named; None is all.
        option: the option that names all.
    """
    from patchbank.bank.check import KINDS, by_kind

    for kind, found in by_kind(findings).items():
        say(f"\n{KINDS[kind].says}", "bold")
        for finding in found[:names]:
            say_prose(f"  {one_line(finding.name)}" + (f": {one_line(finding.detail)}" if finding.detail else ""))
        if names is not None and (more := len(found) - names) > 0:
            say(f"  and {more:,} more: {option} names them")


def _what(report: Report) -> str:
    if (bank := report.manifest) is not None:
        return f"{bank.model}, {bank.shape} {bank.dtype}, layout {bank.layout}, {bank.title}"
    if report.by_kind().get("unlisted"):
        return "pickles of a bank whose index is missing"
    if report.layout is not None:
        return f"a bank in {report.layout} of which no part is sound"
    return f"third-party pickles, most of shape {report.shape}" if report.shape else "third-party pickles"


def _report_dict(report: Report, found: Listing | None) -> dict[str, Any]:
    from patchbank.bank.check import KINDS

    return {
        "bank": str(report.bank),
        "layout": report.layout,
        "model": report.manifest.model if report.manifest else None,
        "features": report.looked_at,
        "sound": len(report.sound),
        "listed": report.listed,
        "list": str(found.source) if found else None,
        "sample": report.sample,
        "problems": len(report.problems),
        "counts": {kind: len(findings) for kind, findings in report.by_kind().items()},
        "findings": [{**asdict(finding), "fix": KINDS[finding.kind].fix} for finding in report.findings],
    }
