"""``patchbank verify BANK``: read every feature and report problems."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from patchbank.cli import options
from patchbank.cli.console import busy, interruptible, plain_table, say, show_json, show_note, stdout
from patchbank.cli.listing import Listing, ListingOptions, find_listing, options_needed
from patchbank.cli.progress import CountProgress
from patchbank.config import ExtractConfig, option
from patchbank.errors import BankError, PatchbankError

if TYPE_CHECKING:
    from patchbank.bank.check import Report
    from patchbank.datasets import Dataset

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
    """Read every feature of a bank or of a directory of EZ-HOI's pickles, and report what is wrong. Writes nothing.

    Exit codes: 0 no problem, 1 problems; the report names each, and the command that fixes it.

    patchbank verify BANK --sample 20
    """
    with busy("Looking at the bank"):
        from patchbank.bank.check import verify
        from patchbank.bank.parts import manifest_in

        manifest = manifest_in(bank)
        found = find_listing(bank, manifest, asked, "--sample" if sample else None)
        keys = found.keys() if found else None
        images_there = found.load() if found and sample else None
    with interruptible("nothing was changed."), CountProgress(f"Verifying {bank.name}") as progress:
        report = verify(bank, keys, progress, size_of=found.size_of() if found else None)
    problem: PatchbankError | None = None
    if images_there is not None:
        try:
            with interruptible("nothing was changed."):
                _sample(report, images_there, sample, config)
        except PatchbankError as error:
            problem = error  # raised after the report
    if json:
        show_json(_report_dict(report, found))
    else:
        show_report(report, found, _command_options(report, found, config.weights), names=None if all else _NAMED)
    if problem is not None:
        raise problem
    if sample and not report.sample:
        show_note("no image could be extracted again: none that can be read has a feature to compare with.")
    raise typer.Exit(1 if report.problems else 0)


def _sample(report: Report, dataset: Dataset, count: int, config: ExtractConfig) -> None:
    """Compare with a fresh extraction. Raises PatchbankError if the model or its weights are not available."""
    from patchbank.extraction.recompute import compare_sample, runner_of

    if report.manifest is None:
        raise BankError(f"{report.bank} names no model: features cannot be extracted again.")
    with busy(f"Extracting {count} images again"):
        runner = runner_of(report.manifest, config, dataset.root)
        compare_sample(report, dataset, runner, report.manifest.input, count)


def _command_options(report: Report, found: Listing | None, weights: Path | None) -> str:
    """The options of the suggested `repair --extract`."""
    from patchbank.encoders import official_weights

    options = found.options if found else options_needed(report.manifest)
    if weights is not None:
        return f"{options} --weights {shlex.quote(str(weights))}"
    if report.manifest is None or official_weights(report.manifest.identity):
        return options
    return f"{options} --weights FILE"


def show_report(report: Report, found: Listing | None, options: str, names: int | None = _NAMED) -> None:
    """Print the problems, worst first, each with names and its fix; then a summary."""
    from patchbank.bank.check import KINDS

    say(str(report.bank), "bold")
    say(f"  {report.looked_at:,} features read: {_what(report)}")
    if found is not None and report.listed is not None:
        say(f"  compared with the {report.listed:,} images that {found.source} lists")
    else:
        say(f"  not compared with a list of images:{options_needed(report.manifest)} names one")
    if report.sample:
        worst = max(report.sample, key=lambda key: report.sample[key])
        error = f"relative error at most {report.sample[worst]:.1e} ({worst})"
        say(f"  {len(report.sample):,} extracted again from their images: {error}")
    table = plain_table(">features", "what", "fix")
    extracting = "repair --extract" if report.layout else "import, extract"
    fixes = {"import": "import", "extract": extracting, "scratch": "extract --overwrite"}
    for kind, findings in report.by_kind().items():
        style = "red" if KINDS[kind].fix else "dim"
        table.add_row(f"{len(findings):,}", Text(KINDS[kind].says, style), fixes.get(KINDS[kind].fix or "", ""))
    if table.row_count:
        stdout.print("", table)
    for kind, findings in report.by_kind().items():
        say(f"\n{KINDS[kind].says}", "bold")
        for finding in findings[:names]:
            say(f"  {finding.name}" + (f": {finding.detail}" if finding.detail else ""))
        if names is not None and (more := len(findings) - names) > 0:
            say(f"  and {more:,} more: --all names them")
    if not report.problems:
        unlisted = "; completeness not checked (no image list)" if report.listed is None else ""
        say(f"\nNo problems found{unlisted}.", "bold green")
        return
    count = len({finding.name for finding in report.problems})
    total = len({*report.sound, *(finding.name for finding in report.findings)})
    say(f"\n{count:,} of {total:,} {'is not as it' if count == 1 else 'are not as they'} should be.", "bold red")
    needed = {KINDS[finding.kind].fix for finding in report.problems}
    place = shlex.quote(str(report.bank))
    if report.layout is None:
        say("Import them into a bank, which leaves out the unusable ones, and extract those again:")
        say(f"  patchbank import {place} BANK --model MODEL{found.options if found else ''}", "cyan")
    elif needed & {"extract", "import"}:
        say("Put these in quarantine and extract them again:")
        say(f"  patchbank repair {place} --extract{options}", "cyan")
    if "scratch" in needed:
        say("Features differ from a fresh extraction: images, weights or preprocessing changed.")
        say("If the change is intended, extract all features from scratch: patchbank extract ... --overwrite")
    if "look" in needed:
        say("Check the disk and the permissions of the files that could not be read; repair does not change them.")


def _what(report: Report) -> str:
    if (bank := report.manifest) is not None:
        return f"{bank.model}, {bank.shape} {bank.dtype}, layout {bank.layout}, {bank.title}"
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
