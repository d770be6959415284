"""What is printed from data cannot control the terminal, whatever prints it; the program's own colours stay."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.text import Text

from patchbank.cli import console


def test_tables_and_texts_are_escaped_where_they_are_printed() -> None:
    table = console.plain_table("name")
    table.add_row("a\x1b]0;owned\x07\u202eb")
    for printed in (table, Text("a\x1b]0;owned\x07\u202eb", "red")):
        out = type(console.stdout)(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
        out.print(printed)
        text = out.file.getvalue()  # type: ignore[attr-defined]
        assert "a\\x1b]0;ow" in text  # the escapes take room, which a table's column does not have
        assert not {"\x07", "\u202e"} & set(text) and "\x1b]" not in text
    assert "\x1b[31m" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_prose_is_broken_between_words_on_a_terminal_and_what_was_given_is_not(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Console(file=io.StringIO(), force_terminal=terminal, width=40, color_system=None)
    monkeypatch.setattr(console, "stdout", made)
    monkeypatch.setattr(console, "stderr", made)
    monkeypatch.setattr(sys, "argv", ["patchbank", "verify", "my own bank of images"])
    console.say_prose("  failed: it is in my own bank of images/a.jpg, and cannot be read")
    console.show_error("one two three four five six seven eight nine\n  ten: eleven twelve thirteen fourteen fifteen")
    lines = made.file.getvalue().splitlines()  # type: ignore[attr-defined]
    if terminal:
        assert lines == [
            "  failed: it is in",
            "  my own bank of images/a.jpg, and",
            "  cannot be read",
            "error: one two three four five six seven",
            "       eight nine",
            "         ten: eleven twelve thirteen",
            "         fourteen fifteen",
        ]
    else:
        assert len(lines) == 3 and lines[1].startswith("error: one") and lines[2].startswith("  ten: eleven")
