"""What is printed from data cannot control the terminal, whatever prints it; the program's own colours stay."""

from __future__ import annotations

import io

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
