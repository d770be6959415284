"""What the commands print with: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

FAILURES_SHOWN = 20  # in a summary; the rest are counted

stdout = Console(highlight=False)
stderr = Console(highlight=False, stderr=True)


def say(text: str, style: str = "") -> None:
    """A line of the result, as it is: no markup in it is interpreted, and paths are not broken."""
    stdout.print(Text(text, style=style), soft_wrap=True)


def busy(text: str) -> AbstractContextManager[object]:
    """On a terminal, a spinner beside `text` while the block runs; elsewhere nothing."""
    return stderr.status(Text(text)) if stderr.is_terminal else nullcontext()


def show_error(message: str) -> None:
    """Why a command ends, on standard error."""
    _tell("error: ", "bold red", message)


def show_note(message: str) -> None:
    """Something a user should know, on standard error."""
    _tell("note: ", "bold yellow", message)


def _tell(label: str, style: str, message: str) -> None:
    stderr.print(Text.assemble((label, style), message), soft_wrap=True)


def show_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def plain_table(*columns: str) -> Table:
    """A table without frames; columns whose name begins with ``>`` are set flush right. Long values are folded."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, overflow="fold")
    return table


def duration_text(seconds: float) -> str:
    """Seconds for people: ``0:42``, ``2:03:10``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
