"""One image's features as a figure: what the model saw, principal components, similarities. Drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from patchbank.errors import ConfigError
from patchbank.show.maps import Floats, principal_colours
from patchbank.transform import ImageTransform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INSTALL = 'pip install "patchbank[show]" (in a checkout: ".[show]")'

# Okabe and Ito's colours (2008), which the colour-blind can tell apart; dashes tell them apart in print.
_STYLES: dict[str, tuple[str, Any]] = {
    "human": ("#0072B2", "-"),
    "object": ("#D55E00", (0, (8, 1.5))),
    "union": ("#CC79A7", (0, (3, 2))),
    "box": ("#009E73", (0, (1, 1))),
}
_COLOURS = "cividis"  # of similarities: even in lightness, also in grey and to the colour-blind
# For what of a name the first does not have, as far as they are installed.
_FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Noto Sans Arabic", "Noto Emoji")
_LEAST = 0.01  # of similarity, that colours run over: less is rounding, and would be drawn as if it were a pattern
# In inches: the room for the figure's title and for footnote and legend; beside a panel and below it for its axes'
# labels; for another line, and for a colour bar with its labels. And how high a panel may be, of its width.
_TITLE, _FOOT, _LEFT, _LABELS, _LINE, _BAR = 0.5, 0.62, 0.7, 0.55, 0.17, 0.62
_TALLEST = 1.7


@dataclass(frozen=True)
class Box:
    """A box to be drawn.

    Attributes:
        kind: ``human``, ``object``, ``union``, or ``box`` for one that was asked for.
        xyxy: in original pixels.
        label: beside it; may be empty.
    """

    kind: str
    xyxy: tuple[float, float, float, float]
    label: str = ""


@dataclass(frozen=True)
class Map:
    """Similarities to be drawn.

    Attributes:
        title: what the patches are compared with.
        values: (N,) cosine similarities.
        point: the place asked about, (x, y) in original pixels.
        box: the box asked about.
        scale: the values between which the colours run; None: those of this map.
    """

    title: str
    values: Floats
    point: tuple[float, float] | None = None
    box: Box | None = None
    scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """What a figure shows.

    Attributes:
        title: above it all.
        tokens: (N, D) float32.
        transform: how the image became the grid.
        image: the image itself, as Pillow opens it; None where it is not at hand.
        boxes: human, object and union boxes.
        maps: similarities, a panel each.
        footnote: below it all.
    """

    title: str
    tokens: Floats
    transform: ImageTransform
    image: Image | None
    boxes: Sequence[Box] = field(default_factory=tuple)
    maps: Sequence[Map] = field(default_factory=tuple)
    footnote: str = ""


def draw(picture: Picture) -> Figure:
    """The figure. It belongs to no window and no pyplot: ``figure.savefig(path)`` writes it.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.font_manager import fontManager
    except ImportError:
        raise ConfigError(f"Pictures are drawn by matplotlib: {INSTALL}") from None
    installed = {font.name for font in fontManager.ttflist}
    with matplotlib.rc_context({"font.family": [_FONTS[0], *(name for name in _FONTS[1:] if name in installed)]}):
        return _drawn(picture)


@dataclass(frozen=True)
class _Panel:
    """A panel to be drawn, and the room that it needs: its size and what stands above and below it, in inches."""

    title: str
    limits: tuple[float, float, float, float]
    draw: Callable[[Axes], None]
    below: float

    @property
    def above(self) -> float:
        return 0.1 + 0.17 * len(self.title.splitlines())

    def size(self, side: float) -> tuple[float, float]:
        """(width, height): as wide as there is room for, unless it became too high."""
        x1, y1, x2, y2 = self.limits
        aspect = (y2 - y1) / (x2 - x1)
        height = min(side * aspect, _TALLEST * side)
        return height / aspect, height


def _drawn(picture: Picture) -> Figure:
    """Places are counted out, since automatic layouts leave room by an axes' cell, and not by its shape."""
    from matplotlib.figure import Figure

    near = _limits(picture.transform)
    broad = near[3] - near[1] < 0.6 * (near[2] - near[0])
    side = 5.3 if broad else 3.7
    handles: list[Any] = []
    seen = "What the model saw" if picture.image else "What the model saw (image not at hand)"
    whole = _limits(picture.transform, whole=True)
    panels = [
        _Panel(seen, whole, lambda axes: handles.extend(_draw_image(axes, picture)), _LABELS),
        _Panel(
            "Principal components 1, 2, 3 as red, green, blue",
            near,
            lambda axes: _draw_components(axes, picture),
            _LABELS + _LINE,
        ),
    ]
    panels += [
        _Panel(_wrapped(each.title, side), near, partial(_draw_map, picture=picture, each=each), _LABELS + _BAR)
        for each in picture.maps
    ]
    columns = min(len(panels), 2 if broad or len(panels) == 4 else 3)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    # Panels of a row begin at one height, below the longest of its titles.
    above = [max(each.above for each in row) for row in rows]
    heights = [
        over + max(each.size(side)[1] + each.below for each in row) for over, row in zip(above, rows, strict=True)
    ]
    cell = _LEFT + side + 0.25
    width, height = columns * cell, _TITLE + sum(heights) + _FOOT
    figure = Figure(figsize=(width, height))
    top = height - _TITLE
    for row, over, taken in zip(rows, above, heights, strict=True):
        for column, panel in enumerate(row):
            across, down = panel.size(side)
            left = column * cell + _LEFT + (side - across) / 2
            axes = figure.add_axes((left / width, (top - over - down) / height, across / width, down / height))
            axes.set_title(panel.title, fontsize=10, parse_math=False)
            x1, y1, x2, y2 = panel.limits
            axes.set_xlabel("x, pixels", fontsize=8.5)
            axes.set_ylabel("y, pixels", fontsize=8.5)
            axes.tick_params(labelsize=8)
            panel.draw(axes)
            axes.set(xlim=(x1, x2), ylim=(y2, y1), aspect="auto")
        top -= taken
    title = _cut(picture.title, int(9.5 * width))
    figure.text(
        0.5, 1 - 0.3 / height, title, ha="center", va="center", fontsize=12, fontweight="bold", parse_math=False
    )
    figure.text(
        *(0.5, 0.42 / height, picture.footnote), ha="center", va="center", fontsize=8.5, color="0.25", parse_math=False
    )
    if handles:
        legend = figure.legend(
            handles=handles, loc="center", ncols=len(handles), fontsize=9, frameon=False, borderpad=0
        )
        legend.set_bbox_to_anchor((0.5, 0.18 / height), figure.transFigure)
    return figure


def _cut(text: str, length: int) -> str:
    """Its end, where it is longer: a file's name stands there."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _wrapped(title: str, inches: float) -> str:
    """In lines for which there is room."""
    lines: list[str] = []
    for line in title.splitlines():
        letters = int(inches * (13 if line.isascii() else 8))
        lines += textwrap.wrap(line, letters, max_lines=3, placeholder=" …")
    return "\n".join(lines)


def _frame(transform: ImageTransform) -> tuple[float, float, float, float]:
    """What the input covers: xyxy in original pixels; beyond the image where it was padded."""
    height, width = transform.input_size
    x1, y1, x2, y2 = transform.boxes_from_input([0, 0, width, height]).tolist()
    return x1, y1, x2, y2


def _limits(transform: ImageTransform, *, whole: bool = False) -> tuple[float, float, float, float]:
    """Image and input together, xyxy; of a long image only what is near the input, unless it is to be whole."""
    x1, y1, x2, y2 = _frame(transform)
    across, down = (np.inf, np.inf) if whole else (x2 - x1, y2 - y1)
    width, height = transform.width, transform.height
    return (
        min(x1, max(0.0, x1 - across)),
        min(y1, max(0.0, y1 - down)),
        max(x2, min(width, x2 + across)),
        max(y2, min(height, y2 + down)),
    )


def _show(panel: Axes, values: Any, picture: Picture, **options: Any) -> Any:
    """A map of the patches, over what they cover of the image, which is seen faintly around it."""
    x1, y1, x2, y2 = _frame(picture.transform)
    if picture.image is not None:
        extent = 0, picture.transform.width, picture.transform.height, 0
        panel.imshow(np.asarray(picture.image.convert("L")), extent=extent, cmap="gray", vmin=0, vmax=255, alpha=0.3)
    return panel.imshow(values, extent=(x1, x2, y2, y1), interpolation="nearest", **options)


def _draw_image(panel: Axes, picture: Picture) -> list[Any]:
    """Returns what the legend explains."""
    from matplotlib.patches import Rectangle

    transform = picture.transform
    if picture.image is not None:
        panel.imshow(np.asarray(picture.image.convert("RGB")), extent=(0, transform.width, transform.height, 0))
    x1, y1, x2, y2 = _frame(transform)
    rows, columns = transform.grid
    for places, lines in (
        (np.linspace(x1, x2, columns + 1), panel.vlines),
        (np.linspace(y1, y2, rows + 1), panel.hlines),
    ):
        ends = (y1, y2) if lines == panel.vlines else (x1, x2)
        lines(places, *ends, colors="black", linewidth=0.7, alpha=0.35)
        lines(places, *ends, colors="white", linewidth=0.35, alpha=0.8)
    handles = []
    width, height = transform.width, transform.height
    seen = transform.visible
    if unseen := _around((0, 0, width, height), seen):
        for left, top, right, bottom in unseen:
            panel.add_patch(Rectangle((left, top), right - left, bottom - top, color="black", alpha=0.6, linewidth=0))
        handles.append(Rectangle((0, 0), 1, 1, facecolor="0.35", label="not seen"))
    if padding := _around((x1, y1, x2, y2), (0, 0, width, height)):
        style: dict[str, Any] = {"facecolor": "0.88", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}
        for left, top, right, bottom in padding:
            panel.add_patch(Rectangle((left, top), right - left, bottom - top, zorder=0.5, **style))
        handles.append(Rectangle((0, 0), 1, 1, label="padding", **style))
    kinds = dict.fromkeys(box.kind for box in picture.boxes)
    boxes = list(dict.fromkeys(picture.boxes))  # pairs share some
    for box in boxes:
        _outline(panel, box)
    _label(panel, [box for box in boxes if box.label], _limits(transform, whole=True))
    return handles + [_handle(kind) for kind in kinds]


def _around(
    outer: tuple[float, float, float, float], inner: tuple[float, float, float, float]
) -> list[tuple[float, float, float, float]]:
    """What of a rectangle lies outside of another one: up to four, without overlaps."""
    x1, y1, x2, y2 = outer
    left, top = min(max(inner[0], x1), x2), min(max(inner[1], y1), y2)
    right, bottom = max(min(inner[2], x2), x1), max(min(inner[3], y2), y1)
    parts = [(x1, y1, x2, top), (x1, bottom, x2, y2), (x1, top, left, bottom), (right, top, x2, bottom)]
    least = 1e-6 * max(x2 - x1, y2 - y1)
    return [part for part in parts if part[2] - part[0] > least and part[3] - part[1] > least]


def _outline(panel: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    colour, dashes = _STYLES[box.kind]
    x1, y1, x2, y2 = box.xyxy
    halo = withStroke(linewidth=3.4, foreground="white", alpha=0.85)
    panel.add_patch(
        Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colour,
            linewidth=1.8,
            linestyle=dashes,
            path_effects=[halo],
        )
    )


def _label(panel: Axes, boxes: Sequence[Box], limits: tuple[float, float, float, float]) -> None:
    """Each box's label in the first of its corners that has room, and no other; none where there is none."""
    place = panel.get_position(original=True)
    inches = place.width * panel.figure.bbox.width / panel.figure.dpi
    pixels = (limits[2] - limits[0]) / inches  # an inch
    taken: list[tuple[float, float, float, float]] = []
    for box in boxes:
        x1, y1, x2, y2 = box.xyxy
        if x1 >= limits[2] or y1 >= limits[3] or x2 <= limits[0] or y2 <= limits[1]:
            continue
        left, right = min(max(x1, limits[0]), limits[2]), max(min(x2, limits[2]), limits[0])
        top, bottom = min(max(y1, limits[1]), limits[3]), max(min(y2, limits[3]), limits[1])
        across, down = pixels * (0.1 + 0.075 * len(box.label)), pixels * 0.2
        corners = [(left, top, 1, 1), (right, top, -1, 1), (left, bottom, 1, -1), (right, bottom, -1, -1)]
        for x, y, to_right, to_bottom in corners[::-1] if box.kind == "union" else corners:
            (x1, x2), (y1, y2) = sorted((x, x + to_right * across)), sorted((y, y + to_bottom * down))
            if x1 < limits[0] or y1 < limits[1] or x2 > limits[2] or y2 > limits[3]:
                continue
            if any(x1 < o[2] and o[0] < x2 and y1 < o[3] and o[1] < y2 for o in taken):
                continue
            taken.append((x1, y1, x2, y2))
            panel.annotate(
                box.label,
                (x, y),
                xytext=(3 * to_right, -3 * to_bottom),
                textcoords="offset points",
                ha="left" if to_right > 0 else "right",
                va="top" if to_bottom > 0 else "bottom",
                fontsize=8,
                color="white",
                parse_math=False,
                bbox={
                    "boxstyle": "round,pad=0.15",
                    "facecolor": _STYLES[box.kind][0],
                    "edgecolor": "none",
                    "alpha": 0.92,
                },
            )
            break


def _handle(kind: str) -> Any:
    from matplotlib.lines import Line2D

    colour, dashes = _STYLES[kind]
    return Line2D([], [], color=colour, linestyle=dashes, linewidth=1.8, label=kind)


def _draw_components(panel: Axes, picture: Picture) -> None:
    transform = picture.transform
    colours, shares = principal_colours(picture.tokens, transform.valid.flatten())
    valid = np.isfinite(colours[:, :1])
    picture_of = np.concatenate([np.where(valid, colours, 0), valid], axis=1).reshape(*transform.grid, 4)
    _show(panel, picture_of, picture)
    shown = ", ".join(f"{share:.0%}" for share in shares) + " of the variance over the patches"
    panel.set_xlabel(f"x, pixels\n{shown if shares.any() else 'no components: the tokens are as good as the same'}")


def _draw_map(panel: Axes, *, picture: Picture, each: Map) -> None:
    transform = picture.transform
    values = np.where(transform.valid, each.values.reshape(transform.grid), np.nan)
    finite = values[np.isfinite(values)]
    low, high = each.scale or (finite.min(initial=np.inf), finite.max(initial=-np.inf))
    if not len(finite):
        panel.text(0.5, 0.5, "no finite number", transform=panel.transAxes, ha="center", va="center", fontsize=9)
        low, high = 0.0, 1.0
    if high - low < _LEAST:
        low, high = (low + high - _LEAST) / 2, (low + high + _LEAST) / 2
    drawn = _show(panel, values, picture, cmap=_COLOURS, vmin=low, vmax=high)
    figure, place = panel.figure, panel.get_position(original=True)
    inches = figure.bbox.height / figure.dpi
    bar = figure.colorbar(
        drawn,
        cax=figure.add_axes(
            (place.x0 + 0.12 * place.width, place.y0 - 0.62 / inches, 0.76 * place.width, 0.12 / inches)
        ),
        orientation="horizontal",
    )
    bar.ax.ticklabel_format(useOffset=False)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("cosine similarity", fontsize=8.5)
    if each.box is not None:
        _outline(panel, each.box)
    if each.point is not None:
        panel.plot(
            *each.point, marker="o", markersize=7, markerfacecolor="none", markeredgecolor="white", markeredgewidth=3
        )
        panel.plot(
            *each.point, marker="o", markersize=7, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.4
        )
