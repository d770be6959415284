"""Markdown tables, printed and kept for a benchmark's JSON line. Imports nothing: a benchmark that only computes needs
no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TABLES: list[dict[str, Any]] = []  # heads and rows: what this process has printed


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, and keep it."""
    TABLES.append({"heads": heads, "rows": rows})
    print(f"{markdown(TABLES[-1])}\n")


def markdown(table: dict[str, Any]) -> str:
    """A table: the first column is left, the others right; floats have three significant digits."""
    heads = list(table["heads"])
    texts = [heads, *([_text(value) for value in row] for row in table["rows"])]
    widths = [max(len(row[column]) for row in texts) for column in range(len(heads))]
    lines = []
    for row in texts:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""]))
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
