"""``patchbank doctor``: the plans of an EZ-HOI root's banks, and the problems on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from patchbank.cli import options
from patchbank.cli.console import count_text, say, say_beside, show_json, stdout
from patchbank.cli.options import RunOptions
from patchbank.cli.progress import busy
from patchbank.config import ExtractConfig, check_dtype, option
from patchbank.encoders import EZHOI_MODELS
from patchbank.errors import ConfigError
from patchbank.listing import ListingOptions

if TYPE_CHECKING:
    from patchbank.doctor import Finding, Report

_MARKS = {"ok": ("ok", "green"), "note": ("note", "bold yellow"), "problem": ("PROBLEM", "bold red")}
_MARK_WIDTH = 11
_WIDEST = 14  # largest width of a thing with the text beside it, if that has several lines


@options.takes(
    {"root": Path()},
    options.EZHOI,
    asked=("root",),
    run=("model", "json"),
    config=options.without_rounding(options.BANK),
)
def doctor(
    asked: ListingOptions,
    run: RunOptions,
    config: ExtractConfig,
    no_timing: bool = option(False, "Skip the measurements, and with them the times."),
) -> None:
    """Check an EZ-HOI root: datasets, checkpoints, packages, machine, banks and disk. Changes nothing.

    Pass the options that you will pass to `extract`.

    Exit codes: 0 no problem, 1 problems (each with its fix), 2 wrong usage.

    patchbank doctor --root EZ-HOI --dtype float16
    """
    names = run.models(config, EZHOI_MODELS)
    root = asked.root or Path()
    if not root.is_dir():
        raise ConfigError(f"There is no directory {root}. Give --root an EZ-HOI checkout.")
    check_dtype(config.layout or "ezhoi", config.dtype)
    with busy("looking at datasets, checkpoints, banks and machine"):
        from patchbank.doctor import examine

        report = examine(root, names, config, timing=not no_timing)
    show_json(report.to_dict()) if run.json else _show(report)
    raise typer.Exit(1 if report.problems else 0)


def _show(report: Report) -> None:
    say(f"EZ-HOI root: {report.root.absolute()}")
    for title, findings in report.sections.items():
        if findings:
            say(f"\n{title}", "bold")
            for finding in findings:
                _show_finding(finding, max(len(each.what) for each in findings))
    say("")
    if problems := len(report.problems):
        count = count_text(problems, "problem")
        stdout.print(Text(f"{count}. Fix what is marked PROBLEM and run patchbank doctor again.", style="bold red"))
    elif report.commands:
        say(f"Ready{_notes(report)}: {' && '.join(report.commands)}", "bold green")
    else:
        say(f"Nothing left to extract{_notes(report)}.", "bold green")


def _notes(report: Report) -> str:
    count = sum(finding.level == "note" for found in report.sections.values() for finding in found)
    return f" ({count_text(count, 'note')} above)" if count else ""


def _show_finding(finding: Finding, widest: int) -> None:
    """Print mark, thing and text side by side; below them the fix. Commands are not broken: they can be copied.

    A text of several lines begins below a thing with a long name: beside it there is too little room.
    """
    mark, style = _MARKS[finding.level]
    head = Text.assemble((f"  {mark}".ljust(_MARK_WIDTH), style), f"{finding.what:{widest}}  ")
    if widest > _WIDEST and head.cell_len + len(finding.text) > stdout.width:
        head.rstrip()
        stdout.print(head)
        head = Text(" " * _MARK_WIDTH)
    say_beside(head, finding.text)
    for number, line in enumerate((finding.fix or "").splitlines()):
        indent = Text(" " * _MARK_WIDTH + ("fix: " if not number else "     "))
        if line.startswith("$ "):
            say(f"{indent}{line.removeprefix('$ ')}", "cyan")
        else:
            say_beside(indent, line)
