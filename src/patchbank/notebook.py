"""What a notebook shows of an object: HTML, with every text escaped, in the notebook's own colours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from patchbank.errors import printable

if TYPE_CHECKING:
    from patchbank.transform import ImageTransform

_ROWS = 20  # of a table
_REASONS = 3  # of failures
_SIDE = 260  # pixels: the longer side of a drawing
_HATCH = 7  # pixels from line to line
_LEFT = 'style="text-align: left; vertical-align: top"'
_TABLE = 'style="margin: 0 0 0.5em"'
_BESIDE = 'style="display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start"'
# As in figures; they differ for the colour-blind, and show on white and on black.
COLOURS = {"human": "#0072B2", "object": "#D55E00"}


def shown(title: str, *parts: str) -> str:
    """A title, and parts of HTML beside each other."""
    return f"<strong>{_text(title)}</strong><div {_BESIDE}>{''.join(parts)}</div>"


def facts(values: Mapping[str, object]) -> str:
    """A table of names and values; empty values are left out, and a list has a line for each."""
    rows = (f"<tr><th {_LEFT}>{_text(name)}</th>{_cell(value)}</tr>" for name, value in values.items() if value)
    return f"<table {_TABLE}><tbody>{''.join(rows)}</tbody></table>"


def table(header: Sequence[str], rows: Sequence[Iterable[object]]) -> str:
    """A table of texts; only the first rows of many. A name of `COLOURS` has its colour beside it."""
    marks = (f'<span style="color: {COLOURS[name]}">\u25a0</span> ' if name in COLOURS else "" for name in header)
    head = "".join(f"<th {_LEFT}>{mark}{_text(name)}</th>" for mark, name in zip(marks, header, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:_ROWS])
    more = f'<tr><td colspan="{len(header)}">and {len(rows) - _ROWS:,} more</td></tr>' if len(rows) > _ROWS else ""
    return f"<table {_TABLE}><thead><tr>{head}</tr></thead><tbody>{body}{more}</tbody></table>"


def failed(failures: Mapping[str, str]) -> list[str]:
    """How many failed, and the reasons of the first, as lines."""
    lines = [f"{key}: {reason}" for key, reason in list(failures.items())[:_REASONS]]
    more = len(failures) - len(lines)
    return [f"{len(failures):,}", *lines, *([f"and {more:,} more"] if more else [])]


def geometry(transform: ImageTransform, boxes: Mapping[str, Iterable[Sequence[float]]] | None = None) -> str:
    """A drawing: the image, hatched where the model did not see it, its patches, and boxes by a name of `COLOURS`."""
    x1, y1, x2, y2 = transform.points_from_input([0, 0, transform.input_size[1], transform.input_size[0]]).tolist()
    left, top = min(x1, 0), min(y1, 0)
    width, height = max(x2, transform.width) - left, max(y2, transform.height) - top
    scale = _SIDE / max(width, height)
    rows, columns = transform.grid
    lines = [(x1 + (x2 - x1) * each / columns, y1, 0, y2 - y1) for each in range(columns + 1)]
    lines += [(x1, y1 + (y2 - y1) * each / rows, x2 - x1, 0) for each in range(rows + 1)]
    drawn = [_rectangle((0, 0, transform.width, transform.height), 'fill-opacity="0.1" stroke="currentColor"')]
    drawn += [_path(_unseen(transform, _HATCH / scale), 0.6), _path(lines, 0.25)]
    for kind, several in (boxes or {}).items():
        drawn += [_rectangle(box, f'fill-opacity="0" stroke="{COLOURS[kind]}" stroke-width="3"') for box in several]
    return (
        f'<svg role="img" aria-label="The image, and the patches that the model saw" width="{width * scale:.0f}" '
        f'height="{height * scale:.0f}" viewBox="{left:.6g} {top:.6g} {width:.6g} {height:.6g}" '
        f'style="overflow: visible; margin: 4px">{"".join(drawn)}</svg>'
    )


def _unseen(transform: ImageTransform, step: float) -> list[tuple[float, float, float, float]]:
    """Diagonals across the parts of the image that the model did not see: (x, y, dx, dy)."""
    x1, y1, x2, y2 = transform.visible
    width, height = transform.width, transform.height
    lines = []
    for a, b, c, d in ((0, 0, width, y1), (0, y2, width, height), (0, y1, x1, y2), (x2, y1, width, y2)):
        if c - a > 0 and d - b > 0:
            for each in range(int((a + b) / step) + 1, int((c + d) / step) + 1):  # x + y = each * step
                x, y = max(a, each * step - d), min(d, each * step - a)
                length = min(c - x, y - b)
                lines.append((x, y, length, -length))
    return lines


def _path(lines: Iterable[tuple[float, float, float, float]], opacity: float) -> str:
    d = "".join(f"M{x:.6g} {y:.6g}l{dx:.6g} {dy:.6g}" for x, y, dx, dy in lines)
    return f'<path d="{d}" stroke="currentColor" stroke-opacity="{opacity}" vector-effect="non-scaling-stroke"/>'


def _rectangle(box: Sequence[float], style: str) -> str:
    x1, y1, x2, y2 = box
    size = f'x="{x1:.6g}" y="{y1:.6g}" width="{max(x2 - x1, 0):.6g}" height="{max(y2 - y1, 0):.6g}"'
    return f'<rect {size} fill="currentColor" {style} vector-effect="non-scaling-stroke"/>'


def _cell(value: object) -> str:
    return f"<td {_LEFT}>{'<br/>'.join(map(_text, value if isinstance(value, list) else [value]))}</td>"


def _text(value: object) -> str:
    return escape(printable(str(value)))
