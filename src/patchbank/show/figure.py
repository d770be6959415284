"""One image's features as a figure: what the model saw, principal components, similarities. matplotlib lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchbank.errors import ConfigError, install
from patchbank.show.maps import Floats, principal_colours
from patchbank.transform import ImageTransform

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from PIL.Image import Image

XYXY = tuple[float, float, float, float]
# The colours of Okabe and Ito (2008): colour-blind readers can distinguish them. The dashes differ in print.
_STYLES: dict[str, tuple[str, Any]] = {
    "human": ("#0072B2", "-"),
    "object": ("#D55E00", (0, (8, 1.5))),
    "union": ("#CC79A7", (0, (3, 2))),
    "box": ("#009E73", (0, (1, 1))),
}
_COLOURS = "inferno"  # for similarities, as in pages: its lightness is even, in grey and for the colour-blind too
# The later fonts draw the characters that the first one lacks, if they are installed.
_FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Noto Sans Arabic", "Noto Emoji")
_TEXT: dict[Any, Any] = {
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "figure.titlesize": 10,
    "text.parse_math": False,
}
_LEAST = 0.01  # the smallest range of similarities that the colours span: less is rounding, not a pattern
# Inches: the width of a panel and of a broad one, and the greatest height. A figure is legible in 600 pixels.
_SIDE, _BROAD, _TALLEST = 2.35, 3.5, 4.0


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        kind: ``human``, ``object``, ``union``, or ``box`` for one that the user asks for.
        xyxy: in original pixels.
        label: the text inside its corner; may be empty.
    """

    kind: str
    xyxy: XYXY
    label: str = ""


@dataclass(frozen=True)
class Map:
    """Similarities to draw.

    Attributes:
        title: what the patches are compared with.
        values: (N,) cosine similarities.
        point: the point asked about, (x, y) in original pixels.
        box: the box asked about.
        scale: the least and greatest value of the colours; None: those of this map.
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
        title: above all panels.
        tokens: (N, D) float32.
        transform: maps the image to the grid.
        image: the image, as Pillow opens it; None if it is not available.
        boxes: human, object and union boxes.
        maps: similarities, one panel each.
        footnote: below all panels.
    """

    title: str
    tokens: Floats
    transform: ImageTransform
    image: Image | None
    boxes: Sequence[Box] = ()
    maps: Sequence[Map] = ()
    footnote: str = ""


def draw(picture: Picture) -> Figure:
    """Draw a figure. It belongs to no window and no pyplot: ``figure.savefig(path)`` writes it.

    Raises ConfigError if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.font_manager import fontManager
    except ImportError:
        raise ConfigError(f"Figures need matplotlib: {install('show')}") from None
    installed = {font.name for font in fontManager.ttflist}
    fonts = [_FONTS[0], *(name for name in _FONTS[1:] if name in installed)]
    with matplotlib.rc_context(_TEXT | {"font.family": fonts}):
        return _drawn(picture)


def _drawn(picture: Picture) -> Figure:
    """All panels have one shape and one width. The first layout says how much room matplotlib needs around them."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shape = _shape(picture.transform)
    side = min(_BROAD if shape < 0.6 else _SIDE, _TALLEST / shape)
    count = 2 + len(picture.maps)
    columns = min(count, 2 if shape < 0.6 or count == 4 else 3)
    rows = -(-count // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure((columns * (side + 1), rows * (side * shape + 1) + 1), layout=layout)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.remove()
    title, handles = _draw_image(panels[0], picture)
    titles = [title, _draw_components(panels[1], picture)]
    titles += [_draw_map(panel, picture, each) for panel, each in zip(panels[2:], picture.maps, strict=False)]
    for number, title in enumerate(titles):
        panels[number].set_title(_wrapped(title, side, 9))
        panels[number].set(aspect="auto")
        if number:  # the first one's pixels are theirs
            panels[number].set(xticks=[], yticks=[])
    figure.suptitle(_wrapped(picture.title, columns * side, 10, end=True))  # a file's name is at the end
    footnote = _wrapped(picture.footnote, columns * side, 8)
    legend = figure.legend(
        handles=handles, title=footnote, loc="outside lower center", ncols=max(1, len(handles)), frameon=False
    )
    legend.get_title().set(color="0.25", multialignment="center")
    figure.draw_without_rendering()
    (width, height), cell = figure.get_size_inches(), panels[0].get_position()
    figure.set_size_inches(
        width * (1 - columns * cell.width) + columns * side, height * (1 - rows * cell.height) + rows * side * shape
    )
    for panel in panels[:count]:
        panel.set(aspect="equal", anchor="N")
    figure.draw_without_rendering()  # panels have their places now, so that labels can be measured
    _label(panels[0], picture.boxes)
    figure.set_layout_engine("none")  # each further layout would move panels: a file saved twice is the same
    return figure


def _wrapped(text: str, inches: float, points: float, *, end: bool = False) -> str:
    """A text of this size in lines that fit into a width, four at most: the first ones, or the last ones.

    A Chinese character is as wide as two Latin ones.
    """
    from rich.console import Console
    from rich.text import Text

    lines = [line.plain for line in Text(text).wrap(Console(), int(inches * 130 / points), overflow="fold")]
    if len(lines) > 4:
        lines = [f"…{lines[-4][1:]}", *lines[-3:]] if end else [*lines[:3], f"{lines[3][:-1]}…"]
    return "\n".join(lines)


def _frame(transform: ImageTransform) -> XYXY:
    """What the grid covers: xyxy in original pixels; beyond the image where it is padded."""
    rows, columns = transform.grid
    x1, y1, x2, y2 = transform.boxes_from_grid([0, 0, columns, rows]).tolist()
    return x1, y1, x2, y2


def _limits(transform: ImageTransform, *, whole: bool = False) -> XYXY:
    """The image, xyxy; of a long one only the part near the input, unless `whole`."""
    x1, y1, x2, y2 = _frame(transform)
    across, down = (np.inf, np.inf) if whole else (x2 - x1, y2 - y1)
    return (
        max(0.0, x1 - across),
        max(0.0, y1 - down),
        min(transform.width, x2 + across),
        min(transform.height, y2 + down),
    )


def _shape(transform: ImageTransform) -> float:
    """A panel's height, of its width. A squashed image may be a thin line: its panel is not."""
    x1, y1, x2, y2 = _limits(transform)
    return min(max((y2 - y1) / (x2 - x1), 0.25), 4)


def _set_view(panel: Axes, transform: ImageTransform, *, whole: bool = False) -> None:
    """Have a panel show `_limits`, in the middle of its shape."""
    x1, y1, x2, y2 = _limits(transform, whole=whole)
    shape = _shape(transform)
    across = max(x2 - x1, (y2 - y1) / shape) / 2
    x, y, down = (x1 + x2) / 2, (y1 + y2) / 2, across * shape
    panel.set(xlim=(x - across, x + across), ylim=(y + down, y - down))


def _draw_image(panel: Axes, picture: Picture) -> tuple[str, list[Any]]:
    """Returns the title, and what the legend explains."""
    from matplotlib.lines import Line2D

    transform = picture.transform
    image, visible = (0.0, 0.0, transform.width, transform.height), transform.visible
    if picture.image is not None:
        panel.imshow(np.asarray(picture.image.convert("RGB")), extent=(0, transform.width, transform.height, 0))
    _set_view(panel, transform, whole=True)
    handles: list[Any] = []
    if not np.allclose(image, visible):
        handles.append(panel.add_patch(_ring(image, visible, color="black", alpha=0.6, linewidth=0, label="not seen")))
    for box in dict.fromkeys(picture.boxes):  # pairs share some
        _outline(panel, box)
    for kind in dict.fromkeys(box.kind for box in picture.boxes):
        colour, dashes = _STYLES[kind]
        handles.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=1.8, label=kind))
    return "Image" if picture.image else "Image (not available)", handles


def _draw_components(panel: Axes, picture: Picture) -> str:
    """Returns the title."""
    transform = picture.transform
    colours, shares = principal_colours(picture.tokens, transform.valid.flatten())
    valid = np.isfinite(colours[:, :1])
    pixels = np.concatenate([np.where(valid, colours, 0), valid], axis=1).reshape(*transform.grid, 4)
    _draw_patches(panel, pixels, picture)
    if not shares.any():
        return "No principal components:\nall tokens are nearly equal"
    return f"Principal components (RGB)\n{', '.join(f'{share:.0%}' for share in shares)} of the variance"


def _draw_map(panel: Axes, picture: Picture, each: Map) -> str:
    """Returns the title."""
    transform = picture.transform
    values = np.where(transform.valid, each.values.reshape(transform.grid), np.nan)
    finite = values[np.isfinite(values)]
    low, high = each.scale or (finite.min(initial=np.inf), finite.max(initial=-np.inf))
    if not len(finite):
        panel.text(0.5, 0.5, "no finite number", transform=panel.transAxes, ha="center", va="center", fontsize=9)
        low, high = 0.0, 1.0
    if high - low < _LEAST:
        low, high = (low + high - _LEAST) / 2, (low + high + _LEAST) / 2
    drawn = _draw_patches(panel, values, picture, cmap=_COLOURS, vmin=low, vmax=high)
    bar = panel.figure.colorbar(
        drawn, ax=panel, location="bottom", shrink=0.8, aspect=25, pad=0.01, label="cosine similarity"
    )
    bar.ax.ticklabel_format(useOffset=False)
    if each.box is not None:
        _outline(panel, each.box)
    if each.point is not None:
        for colour, width in (("white", 3), ("black", 1.4)):
            panel.plot(*each.point, "o", markersize=7, markerfacecolor="none", color=colour, markeredgewidth=width)
    return each.title


def _draw_patches(panel: Axes, values: Any, picture: Picture, **options: Any) -> Any:
    """The patches' values where the patches lie, on the faint image."""
    x1, y1, x2, y2 = _frame(picture.transform)
    if picture.image is not None:
        extent = 0, picture.transform.width, picture.transform.height, 0
        panel.imshow(np.asarray(picture.image.convert("L")), extent=extent, cmap="gray", vmin=0, vmax=255, alpha=0.3)
    drawn = panel.imshow(values, extent=(x1, x2, y2, y1), interpolation="nearest", **options)
    _set_view(panel, picture.transform)
    return drawn


def _ring(outer: XYXY, inner: XYXY, **style: Any) -> PathPatch:
    """A rectangle without the rectangle within it."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    paths = []
    for (x1, y1, x2, y2), order in ((outer, 1), (inner, -1)):  # opposite directions leave a hole
        paths.append(Path([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)][::order], closed=True))
    return PathPatch(Path.make_compound_path(*paths), **style)


def _outline(panel: Axes, box: Box) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    colour, dashes = _STYLES[box.kind]
    x1, y1, x2, y2 = box.xyxy
    halo = withStroke(linewidth=3.4, foreground="white", alpha=0.85)
    style: dict[str, Any] = {"edgecolor": colour, "linewidth": 1.8, "linestyle": dashes, "path_effects": [halo]}
    panel.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def _label(panel: Axes, boxes: Sequence[Box]) -> None:
    """Each box's label in the first of its corners with room within the panel, apart from the others; else none."""
    from matplotlib.transforms import Bbox

    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    taken: list[Bbox] = []
    for box in (box for box in dict.fromkeys(boxes) if box.label):
        x1, y1, x2, y2 = box.xyxy
        if x1 >= right or y1 >= bottom or x2 <= left or y2 <= top:
            continue
        x1, y1, x2, y2 = max(x1, left), max(y1, top), min(x2, right), min(y2, bottom)
        corners = [(x1, y1, 1, 1), (x2, y1, -1, 1), (x1, y2, 1, -1), (x2, y2, -1, -1)]
        for x, y, across, down in corners[::-1] if box.kind == "union" else corners:
            text = panel.annotate(
                box.label,
                (x, y),
                xytext=(4 * across, -4 * down),
                textcoords="offset points",
                ha="left" if across > 0 else "right",
                va="top" if down > 0 else "bottom",
                fontsize=8,
                color="white",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": _STYLES[box.kind][0], "linewidth": 0, "alpha": 0.92},
            )
            text.set_in_layout(False)
            extent = text.get_window_extent()
            inside = panel.bbox.contains(extent.x0, extent.y0) and panel.bbox.contains(extent.x1, extent.y1)
            if inside and not extent.count_overlaps(taken):
                taken.append(extent)
                break
            text.remove()
