"""``patchbank repair BANK``: put damaged files in quarantine; with --extract, extract them again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from patchbank.cli import options
from patchbank.cli.completing import show_completing
from patchbank.cli.console import FAILURES_SHOWN, count_text, say, say_prose, show_json
from patchbank.cli.extract import run_jobs
from patchbank.cli.options import RunOptions
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import interruptible
from patchbank.cli.verify import show_findings
from patchbank.config import ExtractConfig, option
from patchbank.errors import BankError, ConfigError
from patchbank.listing import Listing, ListingOptions, find_listing, options_needed
from patchbank.locations import is_remote, of_hub

if TYPE_CHECKING:
    from patchbank.bank.repair import Repaired


@options.takes(config=("weights", "checkpoints", "device", "workers"))
def repair(
    bank: options.Bank,
    *,
    asked: ListingOptions,
    extract: bool = option(False, "Extract again what is damaged or missing."),
    config: ExtractConfig,
    json: bool = options.JSON,
) -> None:
    """Fix a bank in place. Files that cannot be used are renamed to *.damaged and listed; --extract makes them again.

    Exit codes: 0 nothing is left to extract, 1 something is.

    patchbank repair BANK --extract
    """
    with busy("looking at the bank"):
        from patchbank.bank.parts import find_payload, manifest_in
        from patchbank.bank.repair import repair
        from patchbank.extraction.plan import make_plan
        from patchbank.extraction.recompute import config_of, spec_of

        if of_hub(bank):
            raise ConfigError(
                f"{bank}: repair works on directories. Repair the bank that was uploaded, and upload it again."
            )
        if is_remote(bank):
            raise ConfigError(
                f"{bank}: repair works on directories. In an object store, delete the shards that `patchbank verify` "
                "names, and extract again."
            )
        before = manifest_in(bank)
        if extract and before is None and find_payload(bank) is not None:
            raise BankError(
                f"No part of {bank} is sound: its model and options are unknown. The `patchbank extract` that made it "
                "makes it again."
            )
        found = find_listing(bank, before, asked, "--extract" if extract else None, recall=extract)
        loaded = found.load() if found and extract else None
        keys = found.keys() if found else None
        if loaded is not None and before is not None:
            # Refuse other weights, a bank that cannot be completed, and images that are gone before anything changes.
            spec_of(before, config, loaded.root)
            make_plan(loaded, bank, config_of(before, config))
    with (
        interruptible("nothing is lost: the same command continues."),
        Activity() as activity,
    ):
        counter = activity.counter(f"verifying {bank.name}", before.noun if before else "image")
        done = repair(bank, keys, progress=counter, size_of=found.size_of() if found else None)
    if not json:
        show_repaired(done, found, config.weights, extracting=extract)
    elif not extract:
        show_json(_repaired_dict(done))
    if loaded is None:
        raise typer.Exit(1 if done.to_extract or done.unread else 0)
    assert before is not None  # else it is no bank, which `repair` refuses
    job = loaded, bank, config_of(before, config)
    run_jobs(
        lambda: [job],
        RunOptions(json=json),
        report=lambda extracted: {"repaired": _repaired_dict(done), "extracted": extracted},
    )


def show_repaired(done: Repaired, found: Listing | None, weights: Path | None, *, extracting: bool) -> None:
    """Print what was fixed, what is in quarantine, what is left to extract."""
    report = done.before
    say(str(report.bank), "bold")
    say(f"  {report.looked_at:,} features read")
    if done.fixed:
        say(f"  fixed: {count_text(len(done.fixed), 'file')} written again as the index lists them", "green")
    if done.quarantined:
        where = f"{done.quarantined[0]}, ..." if len(done.quarantined) > 1 else done.quarantined[0]
        say_prose(
            f"  in quarantine: {count_text(len(done.quarantined), 'file')} ({where}); delete when you like",
            "yellow",
        )
    if done.unread:
        say(f"  left as they are: {count_text(len(done.unread), 'thing')} that could not be read", "red")
    if done.to_extract:
        say(
            f"  to extract: {count_text(len(done.to_extract), report.noun)}",
            "red",
        )
    else:
        say("  nothing is left to extract", "green")
    show_findings([*done.unread, *done.to_extract], FAILURES_SHOWN, "--json")
    if done.to_extract and not extracting:
        options = found.options if found else options_needed(report.manifest)
        show_completing("\nExtract them again:", report.bank, report.manifest, options, weights)


def _repaired_dict(done: Repaired) -> dict[str, Any]:
    return {
        "bank": str(done.before.bank),
        "features": done.before.looked_at,
        "fixed": [asdict(finding) for finding in done.fixed],
        "quarantined": done.quarantined,
        "unread": [asdict(finding) for finding in done.unread],
        "to_extract": [asdict(finding) for finding in done.to_extract],
    }
