"""Printing: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from patchbank.errors import printable
from patchbank.files import bytes_text

_WIDTH = 78  # largest width of a text beside another
_HARD_SPACE = "\ue000"  # of no text: stands for a space that is not a place to break
FAILURES_SHOWN = 20  # in a summary; the rest are counted


class _Harmless(Console):
    """Escapes control characters in all that it prints: a name in data must not control the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As the base class does."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


stdout = _Harmless(highlight=False)
stderr = _Harmless(highlight=False, stderr=True)


def say(text: str, style: str = "") -> None:
    """Print a line of the result: markup is not interpreted, nothing is broken, so that commands can be copied."""
    stdout.print(Text(harmless(text), style=style), soft_wrap=True)


def say_prose(text: str, style: str = "") -> None:
    """Print a line of the result, which may begin with spaces; on a terminal, broken between words."""
    words = text.lstrip(" ")
    say_beside(Text(" " * (len(text) - len(words))), words, style, wrapped=stdout.is_terminal)


def say_beside(head: Text, text: str, style: str = "", *, wrapped: bool = True, console: Console | None = None) -> None:
    """Print `head`, and `text` beside it in lines of a readable length. Words are not broken: paths, URLs."""
    console = console or stdout
    room = max(20, min(console.width - head.cell_len, _WIDTH))
    lines = [part for line in harmless(text).split("\n") for part in (_broken(line, room) if wrapped else [line])]
    for number, line in enumerate(lines or [""]):
        start = " " * head.cell_len if number else head
        console.print(Text.assemble(start, (line, style)), soft_wrap=True)


def _broken(line: str, room: int) -> list[str]:
    """The line in lines of at most so many characters; a longer word, or an argument with spaces, is not broken."""
    for each in (*sys.argv[1:], str(Path.cwd())):
        line = line.replace(each, each.replace(" ", _HARD_SPACE))
    indent = " " * (len(line) - len(line.lstrip(" ")))
    parts = textwrap.wrap(line, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [part.replace(_HARD_SPACE, " ") for part in parts or [""]]


def can_redraw(console: Console) -> bool:
    """Whether a bar or a spinner can be drawn in place."""
    return console.is_terminal and not console.is_dumb_terminal


def show_error(message: str) -> None:
    """Print to standard error why a command ends."""
    _print_labelled("error: ", "bold red", message)


def show_note(message: str) -> None:
    """Print to standard error what a user should know."""
    _print_labelled("note: ", "bold yellow", message)


def _print_labelled(label: str, style: str, message: str) -> None:
    if stderr.is_terminal:
        say_beside(Text(label, style), message, console=stderr)
    else:
        stderr.print(Text.assemble((label, style), harmless(message)), soft_wrap=True)


def harmless(text: str) -> str:
    """A text of several lines with other control characters escaped."""
    return printable(text, "\n\t")


def one_line(value: object) -> str:
    """A text from data, as part of a line: with line breaks escaped too, which would forge lines."""
    return printable(str(value))


def show_facts(place: Path, *facts: str) -> None:
    """What was done at a place; empty facts are left out."""
    say(str(place), "bold")
    say_prose(f"  {', '.join(filter(None, facts))}")


def written_text(features: int, size: int) -> str:
    """``2,000 features written (804 MB)``."""
    return f"{count_text(features, 'feature')} written ({bytes_text(size)})"


def some(count: int, what: str) -> str:
    """``2,000 failed``; empty if the count is 0."""
    return f"{count:,} {what}" if count else ""


def count_text(count: int, what: str) -> str:
    """``1 file``, ``2,000 files``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def show_failures(state: str, reasons: Mapping[str, str], where: str, count: int | None = FAILURES_SHOWN) -> None:
    """Print the first `count` failures with their reasons (None: all), and the number of the others with `where`."""
    for key, reason in islice(reasons.items(), count):
        say_prose(f"  {state}: {one_line(key)}: {one_line(reason)}", "red")
    if count is not None and (more := len(reasons) - count) > 0:
        say(f"  and {more:,} more{where}", "red")


def results_alone_on_stdout() -> None:
    """From now on, what libraries print to standard output goes to standard error; our own results do not."""
    stdout.file = sys.stdout
    sys.stdout = sys.stderr


def show_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    print(json.dumps(value, indent=2), file=stdout.file)


def plain_table(*columns: str) -> Table:
    """A table without frames; a name that begins with ``>`` aligns its column right. Long values are folded."""
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
