"""One image's features as a figure: what the model saw, principal components, similarities. Drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from patchbank.errors import ConfigError
from patchbank.geometry import ImageTransform
from patchbank.pictures.maps import Floats, principal_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INSTALL = 'pip install "patchbank[show]"'

# Okabe and Ito's colours (2008), which the colour-blind can tell apart; dashes tell them apart in print.
_STYLES: dict[str, tuple[str, Any]] = {
    "human": ("#0072B2", "-"),
    "object": ("#D55E00", "-"),
    "union": ("#CC79A7", (0, (4, 2))),
    "box": ("#009E73", (0, (1, 1))),
}
_COLOURS = "cividis"  # of similarities: even in lightness, also in grey and to the colour-blind
_PANEL = 4.1  # inches a side
_COLUMNS = 3


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
    """

    title: str
    values: Floats
    point: tuple[float, float] | None = None
    box: Box | None = None


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
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError(f"Pictures are drawn by matplotlib: {INSTALL}") from None
    count = 2 + len(picture.maps)
    aspect = _aspect(picture.transform)
    columns = min(count, 2 if aspect < 0.6 or count == 4 else 3)
    rows = -(-count // columns)
    width = _PANEL * (1.3 if aspect < 0.6 else 1)
    height = width * min(max(aspect, 0.3), 1.7)
    figure = Figure(
        figsize=(columns * width + 0.5, rows * (height + (1.15 if picture.maps else 0.8)) + 1.0),
        layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08),
    )
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.suptitle(_cut(picture.title, 36 * columns), fontsize=12, fontweight="bold", parse_math=False)
    handles = _draw_image(panels[0], picture)
    _draw_components(panels[1], picture)
    for panel, each in zip(panels[2:], picture.maps, strict=False):
        _draw_map(panel, picture, each)
    for panel in panels[count:]:
        panel.set_axis_off()
    if handles:
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False
        )
        legend.set_title(
            picture.footnote, FontProperties(size=8.5)
        )  # a label of the figure's own would lie upon the legend
        legend.get_title().set(color="0.25", parse_math=False)
    else:
        figure.supxlabel(picture.footnote, fontsize=8.5, color="0.25", parse_math=False)
    return figure


def _cut(text: str, length: int) -> str:
    """Its end, where it is longer: a file's name stands there."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _frame(transform: ImageTransform) -> tuple[float, float, float, float]:
    """What the input covers: xyxy in original pixels; beyond the image where it was padded."""
    x1, y1, x2, y2 = transform.boxes_from_input([0, 0, transform.input_size, transform.input_size]).tolist()
    return x1, y1, x2, y2


def _limits(transform: ImageTransform) -> tuple[float, float, float, float]:
    """Image and input together, xyxy."""
    x1, y1, x2, y2 = _frame(transform)
    return min(x1, 0), min(y1, 0), max(x2, transform.width), max(y2, transform.height)


def _aspect(transform: ImageTransform) -> float:
    x1, y1, x2, y2 = _limits(transform)
    return (y2 - y1) / (x2 - x1)


def _prepare(panel: Axes, picture: Picture, title: str) -> None:
    x1, y1, x2, y2 = _limits(picture.transform)
    panel.set_title(title, fontsize=10, parse_math=False)
    panel.set(xlim=(x1, x2), ylim=(y2, y1), aspect="equal")
    panel.set_anchor("N")  # those without a colour bar stand as high as those with one
    panel.set_xlabel("x, pixels", fontsize=8.5)
    panel.set_ylabel("y, pixels", fontsize=8.5)
    panel.tick_params(labelsize=8)


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
    _prepare(panel, picture, "What the model saw" if picture.image else "What the model saw (image not at hand)")
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
    for box in picture.boxes:
        _outline(panel, box)
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
    if box.label:
        panel.annotate(
            box.label,
            (x1, y1),
            xytext=(3, -3),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=8,
            color="white",
            parse_math=False,
            annotation_clip=True,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none", "alpha": 0.92},
        )


def _handle(kind: str) -> Any:
    from matplotlib.lines import Line2D

    colour, dashes = _STYLES[kind]
    return Line2D([], [], color=colour, linestyle=dashes, linewidth=1.8, label=kind)


def _draw_components(panel: Axes, picture: Picture) -> None:
    transform = picture.transform
    colours, shares = principal_colours(picture.tokens, transform.valid.flatten())
    _prepare(panel, picture, "Principal components 1, 2, 3 as red, green, blue")
    valid = np.isfinite(colours[:, :1])
    picture_of = np.concatenate([np.where(valid, colours, 0), valid], axis=1).reshape(*transform.grid, 4)
    _show(panel, picture_of, picture)
    shown = ", ".join(f"{share:.0%}" for share in shares)
    panel.set_xlabel(f"x, pixels\n{shown} of the variance over the patches")


def _draw_map(panel: Axes, picture: Picture, each: Map) -> None:
    transform = picture.transform
    values = np.where(transform.valid, each.values.reshape(transform.grid), np.nan)
    _prepare(panel, picture, each.title)
    drawn = _show(panel, values, picture, cmap=_COLOURS)
    bar = panel.figure.colorbar(drawn, ax=panel, location="bottom", panchor=False, shrink=0.75, aspect=32, pad=0.03)
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
