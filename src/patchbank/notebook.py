"""What a notebook shows of an object: HTML, with every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from patchbank.errors import printable

if TYPE_CHECKING:
    from patchbank.transform import ImageTransform

_ROWS = 20  # of a table
_SIDE = 220  # pixels: the longer side of a drawing


def facts(title: str, values: Mapping[str, object]) -> str:
    """A title, and a table of names and values; empty values are left out."""
    return f"<strong>{_text(title)}</strong>" + table((), [(name, value) for name, value in values.items() if value])


def table(header: Sequence[str], rows: Sequence[Iterable[object]]) -> str:
    """A table of texts; only the first rows of many."""
    head = f"<thead><tr>{_cells('th', header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows[:_ROWS])
    more = f"<p>and {len(rows) - _ROWS:,} more</p>" if len(rows) > _ROWS else ""
    return f"<table>{head}<tbody>{body}</tbody></table>{more}"


def geometry(transform: ImageTransform) -> str:
    """A drawing of a transform: the image, the part that the model saw, and the patches on it."""
    x1, y1, x2, y2 = transform.points_from_input([0, 0, transform.input_size[1], transform.input_size[0]]).tolist()
    left, top = min(x1, 0), min(y1, 0)
    width, height = max(x2, transform.width) - left, max(y2, transform.height) - top
    scale = _SIDE / max(width, height)
    rows, columns = transform.grid
    lines = [(x1 + (x2 - x1) * each / columns, y1, 0, y2 - y1) for each in range(columns + 1)]
    lines += [(x1, y1 + (y2 - y1) * each / rows, x2 - x1, 0) for each in range(rows + 1)]
    grid = "".join(f"M{x - left:.6g} {y - top:.6g}l{dx:.6g} {dy:.6g}" for x, y, dx, dy in lines)
    return (
        f'<svg viewBox="0 0 {width:.6g} {height:.6g}" width="{width * scale:.0f}" height="{height * scale:.0f}">'
        f'<rect x="{-left:.6g}" y="{-top:.6g}" width="{transform.width}" height="{transform.height}" fill="#8884"/>'
        f'<path d="{grid}" fill="none" stroke="#0072B2" stroke-width="{1 / scale:.6g}"/></svg>'
    )


def _cells(kind: str, texts: Iterable[object]) -> str:
    return "".join(f'<{kind} style="text-align: left">{_text(each)}</{kind}>' for each in texts)


def _text(value: object) -> str:
    return escape(printable(str(value)))
