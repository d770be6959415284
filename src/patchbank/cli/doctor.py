"""``patchbank doctor``: what is right and what is wrong with an EZ-HOI root, before hours are spent on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from patchbank.cli import options
from patchbank.cli.console import busy, say, show_json, stdout
from patchbank.cli.options import DEFAULTS, flag
from patchbank.config import ExtractConfig, check_dtype
from patchbank.encoders.openai.registry import EZHOI_MODELS, get_model
from patchbank.errors import ConfigError

if TYPE_CHECKING:
    from patchbank.doctor import Finding, Report

_MARKS = {"ok": ("ok", "green"), "note": ("note", "bold yellow"), "problem": ("PROBLEM", "bold red")}
_MARK_WIDTH = 11
_WIDTH = 78  # text of a finding is not set wider than this, however wide the terminal is


def doctor(
    root: options.Root = Path(),
    model: options.Models = None,
    weights: options.Weights = None,
    checkpoints: options.Checkpoints = None,
    precision: options.PrecisionOption = DEFAULTS.precision,
    layout: options.LayoutOption = DEFAULTS.layout,
    dtype: options.Dtype = DEFAULTS.dtype,
    resize: options.Resize = DEFAULTS.resize,
    decode: options.DecodeOption = DEFAULTS.decode,
    device: options.Device = DEFAULTS.device,
    batch_size: options.BatchSize = DEFAULTS.batch_size,
    compile: options.CompileOption = DEFAULTS.compile,
    workers: options.Workers = DEFAULTS.workers,
    no_timing: Annotated[
        bool, flag("--no-timing", "Measure nothing: no times, but an answer at once.", "This run")
    ] = False,
    json: options.Json = False,
) -> None:
    """Examine an EZ-HOI root: data sets, checkpoints, packages, banks, disk and machine. Changes nothing.

    Give it the options that you will give `extract`.

    Exit codes: 0 no problem, 1 problems (each with its mend), 2 wrong usage.
    """
    names = list(dict.fromkeys(model or EZHOI_MODELS))
    for name in names:
        get_model(name)
    if weights is not None and len(names) != 1:
        raise ConfigError("--weights is the checkpoint of one model: say which with one --model.")
    root = root.expanduser()
    if not root.is_dir():
        raise ConfigError(f"--root {root}: there is no such directory. Name an EZ-HOI checkout.")
    config = ExtractConfig(
        weights=weights,
        checkpoints=checkpoints,
        precision=precision,
        layout=layout,
        dtype=dtype,
        resize=resize,
        decode=decode,
        device=device,
        batch_size=batch_size,
        compile=compile,
        workers=workers,
    )
    check_dtype(layout or "ezhoi", config.dtype)
    with busy("Looking at data sets, checkpoints, banks and machine"):
        from patchbank.doctor import examine

        report = examine(root, names, config, timing=not no_timing)
    show_json(report.to_dict()) if json else _show(report)
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
        says = "There is 1 problem" if problems == 1 else f"There are {problems} problems"
        says += ": mend what is marked PROBLEM, and run patchbank doctor again."
        stdout.print(Text(says, style="bold red"))
    elif report.commands:
        say(f"All is ready{_notes(report)}: {' && '.join(report.commands)}", "bold green")
    else:
        say(f"All is well{_notes(report)}: nothing is left to extract.", "bold green")


def _notes(report: Report) -> str:
    count = sum(finding.level == "note" for found in report.sections.values() for finding in found)
    return f" ({count} {'note' if count == 1 else 'notes'} above)" if count else ""


def _show_finding(finding: Finding, widest: int) -> None:
    """Mark, thing and text side by side; below them the mend. Commands are not broken, so that they can be copied."""
    mark, style = _MARKS[finding.level]
    _say_wrapped(Text.assemble((f"  {mark}".ljust(_MARK_WIDTH), style), f"{finding.what:{widest}}  "), finding.text)
    for number, line in enumerate((finding.mend or "").splitlines()):
        indent = Text(" " * _MARK_WIDTH + ("mend: " if not number else "      "))
        if line.startswith("$ "):
            say(f"{indent}{line.removeprefix('$ ')}", "cyan")
        else:
            _say_wrapped(indent, line)


def _say_wrapped(head: Text, text: str) -> None:
    """`head`, and `text` beside it, in lines of a readable length."""
    width = min(stdout.width - head.cell_len, _WIDTH)
    for number, line in enumerate(Text(text).wrap(stdout, max(20, width))):
        line.rstrip()
        stdout.print(Text.assemble(" " * head.cell_len if number else head, line), soft_wrap=True)
