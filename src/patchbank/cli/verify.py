"""``patchbank verify BANK``: is it sound?"""

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
from patchbank.config import ARCHIVES, UNKNOWN, ExtractConfig, option
from patchbank.encoders.openai.registry import MODELS
from patchbank.errors import BankError, ConfigError, PatchbankError

if TYPE_CHECKING:
    from patchbank.bank.examine import Finding
    from patchbank.bank.verify import Report
    from patchbank.datasets import Dataset

_NAMED = 10  # findings of a kind; the rest are counted


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
        from patchbank.bank.layouts import manifest_in
        from patchbank.bank.verify import verify

        bank = bank.expanduser()
        manifest = manifest_in(bank)
        found = find_listing(bank, manifest, asked)
        keys = found.keys() if found else None
        if sample and manifest is not None and manifest.dataset in ARCHIVES:
            raise ConfigError(
                f"--sample does not read {manifest.dataset} files. "
                f"What is missing, `patchbank extract {manifest.dataset}` makes, given the files again."
            )
        if sample and found is None:
            raise ConfigError(f"--sample needs the images: add{options_needed(manifest)}.")
        images_there = found.load() if found and sample else None
    with interruptible("nothing was changed."), CountProgress(f"Verifying {bank.name}") as progress:
        report = verify(bank, keys, progress)
    problem: PatchbankError | None = None
    if images_there is not None:
        try:
            with interruptible("nothing was changed."):
                _sample(report, images_there, sample, config)
        except PatchbankError as error:
            problem = error  # once what was found has been said
    if json:
        show_json(_report_dict(report, found))
    else:
        show_report(report, found, _command_options(report, found, config.weights), names=None if all else _NAMED)
    if problem is not None:
        raise problem
    if sample and not report.sample:
        show_note("no image could be computed anew: none of those that can be read has a feature to compare with.")
    raise typer.Exit(1 if report.problems else 0)


def _sample(report: Report, dataset: Dataset, count: int, config: ExtractConfig) -> None:
    """Compare with pixels. Raises PatchbankError where the model or its weights are not to be had."""
    from patchbank.bank.verify import compare_with_pixels
    from patchbank.extraction.recompute import encoder_of, recompute

    if report.model is None:
        raise BankError(f"{report.bank} is of no model that patchbank knows: nothing can be computed to compare with.")
    with busy(f"Computing {count} images anew"):
        encoder = encoder_of(report.model, report.manifest, dataset.root, weights=config.weights, device=config.device)
        made = (report.manifest.resize, report.manifest.decode) if report.manifest else ()
        keys = [sample.key for sample in dataset.samples if sample.exists()]
        compare_with_pixels(report, keys, count, recompute(dataset, encoder, *made))


def _command_options(report: Report, found: Listing | None, weights: Path | None) -> str:
    """What the advised `repair --extract` must be given, beside the bank."""
    options = found.options if found else options_needed(report.manifest)
    if weights is not None:
        return f"{options} --weights {shlex.quote(str(weights))}"
    known = report.manifest.fingerprint.weights_sha256 if report.manifest else UNKNOWN
    official = {UNKNOWN, *(model.sha256 for model in MODELS.values())}
    return options if known in official else f"{options} --weights FILE"


def show_report(report: Report, found: Listing | None, options: str, names: int | None = _NAMED) -> None:
    """For people: what is wrong, the worst first, each with names and what mends it; then one line that sums it up."""
    from patchbank.bank.examine import KINDS

    say(str(report.bank), "bold")
    say(f"  {_what(report)}")
    if found is not None and report.listed is not None:
        say(f"  compared with the {report.listed:,} images that {found.source} lists")
    else:
        say(f"  compared with no list of images:{options_needed(report.manifest)} names one")
    if report.sample:
        worst = max(report.sample, key=lambda key: report.sample[key])
        error = f"relative error at most {report.sample[worst]:.1e} ({worst})"
        say(f"  {len(report.sample):,} computed anew from their pixels: {error}")
    by_kind = report.by_kind()
    if by_kind:
        stdout.print()
        table = plain_table(">features", "what", "mended by")
        for kind, findings in by_kind.items():
            style = "red" if KINDS[kind].mend else "dim"
            mend = {"repair": "repair", "extract": "repair --extract", "anew": "extract --overwrite"}.get(
                KINDS[kind].mend or "", ""
            )
            table.add_row(f"{len(findings):,}", Text(KINDS[kind].says, style), mend)
        stdout.print(table)
        for kind, findings in by_kind.items():
            _show_names(kind, findings, names)
    stdout.print()
    if not report.problems:
        say(
            "Sound." if report.listed is not None else "No problems found; completeness not checked (no image list).",
            "bold green",
        )
        return
    count = len({finding.name for finding in report.problems})
    verb = "is not as it" if count == 1 else "are not as they"
    say(f"{count:,} of {_total(report):,} {verb} should be.", "bold red")
    command = f"patchbank repair {shlex.quote(str(report.bank))}"
    mends = {KINDS[finding.kind].mend for finding in report.problems}
    if "repair" in mends:
        say("Mend what needs no images (each old file stays until the new one is on the disk):")
        say(f"  {command}{found.options if found else ''}", "cyan")
    if "extract" in mends:
        say("Mend that, and extract the rest again:" if "repair" in mends else "Extract again what is not right:")
        say(f"  {command} --extract{options}", "cyan")
    if "anew" in mends:
        say("Features differ from a fresh extraction: images, weights or preprocessing changed. If these are the right")
        say("ones, extract all features again: patchbank extract ... --overwrite")
    if "look" in mends:
        say("See to the disk and the permissions of what could not be read; repair leaves it as it is.")


def _what(report: Report) -> str:
    facts = [f"{report.looked_at:,} features read"]
    if report.manifest is not None:
        bank = report.manifest
        facts.append(f"{bank.fingerprint.model}, {bank.shape} {bank.dtype}, layout {bank.layout}, {bank.title}")
    else:
        model = f"{report.model.name} by their shapes" if report.model else "of no known model"
        facts.append(f"pickles that patchbank did not make, {model}")
    return ": ".join(facts)


def _total(report: Report) -> int:
    return len({*report.sound, *(finding.name for finding in report.findings)})


def _show_names(kind: str, findings: list[Finding], names: int | None) -> None:
    from patchbank.bank.examine import KINDS

    stdout.print()
    say(KINDS[kind].says, "bold")
    for finding in findings[:names]:
        say(f"  {finding.name}" + (f": {finding.detail}" if finding.detail else ""))
    if names is not None and (more := len(findings) - names) > 0:
        say(f"  and {more:,} more: --all names them")


def _report_dict(report: Report, found: Listing | None) -> dict[str, Any]:
    from patchbank.bank.examine import KINDS

    return {
        "bank": str(report.bank),
        "layout": report.layout,
        "model": report.model.name if report.model else None,
        "features": report.looked_at,
        "sound": len(report.sound),
        "listed": report.listed,
        "list": str(found.source) if found else None,
        "sample": report.sample,
        "problems": len(report.problems),
        "counts": {kind: len(findings) for kind, findings in report.by_kind().items()},
        "findings": [{**asdict(finding), "mend": KINDS[finding.kind].mend} for finding in report.findings],
    }
