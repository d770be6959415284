"""What `show` draws, against reference pictures: synthetic images and features of a fixed pattern."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.testing.compare import compare_images
from packaging.version import Version
from PIL import Image

from patchbank.show.figure import Box, Map, Picture, draw
from patchbank.show.maps import similarities
from patchbank.transform import ImageTransform

REFERENCES = Path(__file__).parent / "references"
TOLERANCE = 8  # of grey levels, root mean square: fonts and edges differ a little between versions


def picture(mode: str, width: int, height: int, **changes: object) -> Picture:
    """A gradient with a disc, and features that separate disc and ground."""
    transform = ImageTransform(width, height, mode, (32, 32), 4)  # type: ignore[arg-type]
    y, x = np.mgrid[:height, :width]
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    pixels = np.stack([255 * x / width, 255 * y / height, np.where(disc, 220, 60)], axis=-1).astype(np.uint8)
    rows, columns = np.mgrid[:8, :8].reshape(2, 64)
    inside = (rows - 3.5) ** 2 + (columns - 3.5) ** 2 < 7
    # Rows vary more than columns, so that no two components have the same variance.
    tokens = np.stack([inside + 0.5, ~inside * 1.0, rows / 6, columns / 10], axis=1).astype(np.float32)
    values: dict[str, object] = {
        "title": f"{mode}.jpg",
        "tokens": tokens,
        "transform": transform,
        "image": Image.fromarray(pixels),
        "maps": [
            Map(
                # A patch off the middle and off the diagonal, among the disc's.
                "Similarity to the patch in row 3, column 4",
                similarities(tokens, tokens[28]) - (np.arange(64) == 12) * 0.9,
                point=tuple(transform.points_from_grid([4.5, 3.5])),
            )
        ],
        "footnote": "tiny, untrained weights",
    }
    return Picture(**{**values, **changes})  # type: ignore[arg-type]


PICTURES = {
    "crop": picture(
        "center-crop",
        300,
        180,
        boxes=[
            Box("human", (20, 20, 120, 160)),
            Box("object", (150, 40, 280, 170), "bicycle"),
            Box("union", (20, 20, 280, 170), "ride"),
        ],
    ),
    "pad": picture("pad", 120, 200),
    "squash": picture("squash", 240, 240, image=None, maps=()),
}


@pytest.mark.skipif(Version(matplotlib.__version__) < Version("3.11"), reason="matplotlib 3.11 drew the references")
@pytest.mark.parametrize("name", PICTURES)
def test_the_figures_are_those_that_were_looked_at(name: str, tmp_path: Path) -> None:
    draw(PICTURES[name]).savefig(tmp_path / f"{name}.png", dpi=50)
    difference = compare_images(str(REFERENCES / f"{name}.png"), str(tmp_path / f"{name}.png"), tol=TOLERANCE)
    assert difference is None, difference


TITLES = {
    "short": ("name_of_an_image.jpg", "Similarity to the pooled union\n(text), 42% of the box seen"),
    "long": ("a_name_without_end_" * 15 + ".jpg", "Similarity to “" + "a person who rides a motorcycle " * 10 + "”"),
    "Chinese": ("一个人骑着自行车穿过城市的街道" * 12 + ".jpg", "Similarity to “" + "一个人骑着自行车" * 15 + "”"),
}


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")  # of a machine without a Chinese font
@pytest.mark.parametrize("titles", TITLES)
def test_no_text_lies_upon_another_and_none_is_cut(titles: str) -> None:
    """Titles, labels and legend of figures with one to six panels, whatever the image's shape."""
    for shape in ((300, 180), (180, 300), (900, 200), (200, 900), (240, 240)):
        for count in (0, 1, 2, 4) if titles == "short" else (1,):
            each = picture("center-crop", *shape, boxes=[Box("human", (5, 5, 90, 90), "person")])
            title, of_map = TITLES[titles]
            maps = [Map(of_map, each.maps[0].values) for _ in range(count)]
            figure = draw(Picture(title, each.tokens, each.transform, each.image, each.boxes, maps, each.footnote))
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
            texts = [figure._suptitle, *figure.legends]
            for axes in figure.axes:
                texts += [axes.title, axes.xaxis.label]
            extents = [
                text.get_window_extent(renderer) for text in texts if text is not None and getattr(text, "_text", "x")
            ]
            extents += [
                axis.get_tightbbox(renderer) for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)
            ]  # numbers
            assert len(extents) >= 4 + 2 + 2 * count  # with title and legend; titles; of maps, the bar's label too
            width, height = figure.canvas.get_width_height()
            for index, extent in enumerate(extents):
                assert extent.x0 >= -1 and extent.y0 >= -1 and extent.x1 <= width + 1 and extent.y1 <= height + 1, (
                    shape,
                    count,
                )
                for other in extents[index + 1 :]:
                    assert not _overlap(extent, other), (shape, count, extent, other)


@pytest.mark.parametrize("shape", [(300, 180), (180, 300), (900, 200), (200, 900)])
@pytest.mark.parametrize("mode", ["center-crop", "pad", "squash"])
def test_panels_are_equal_aligned_and_undistorted(mode: str, shape: tuple[int, int]) -> None:
    """Each panel is as large as the others, in one line with its neighbours, its colour bar below it."""
    each = picture(mode, *shape)
    maps = [
        Map("one line", each.maps[0].values),
        Map("a\nb\nc", each.maps[0].values),
        Map("two\nlines", each.maps[0].values),
    ]
    figure = draw(Picture("a.jpg", each.tokens, each.transform, each.image, maps=maps, footnote="weights"))
    panels, bars = figure.axes[:5], figure.axes[5:]
    boxes = [axes.get_window_extent() for axes in panels]
    for axes, box in zip(panels, boxes, strict=True):
        assert abs(box.width - boxes[0].width) < 1 and abs(box.height - boxes[0].height) < 1
        assert max(box.width, box.height) > 2.3 * figure.dpi
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert box.width / (right - left) == pytest.approx(box.height / (bottom - top), rel=1e-3)
    columns = 2 if abs(boxes[1].y0 - boxes[2].y0) > 1 else 3
    for start in range(0, 5, columns):
        assert max(box.y0 for box in boxes[start : start + columns]) - boxes[start].y0 < 1
    for box, bar in zip(boxes[2:], bars, strict=True):
        bar_box = bar.get_window_extent()
        assert bar_box.y1 < box.y0 and box.x0 <= bar_box.x0 < bar_box.x1 <= box.x1
        assert bar.get_xlabel() == "cosine similarity"


def test_labels_of_boxes_stay_within_the_panel_and_apart() -> None:
    """Also those of boxes that reach beyond the image, and of many boxes at one place; none of one outside."""
    boxes = [
        Box("human", (-50, -50, 40, 60), "human"),
        Box("object", (280, 150, 400, 300), "motorcycle"),
        Box("union", (-50, -50, 400, 300), "ride"),
        Box("box", (400, 10, 500, 50), "outside"),
        *(Box("object", (100 + n, 80, 140, 110), f"thing {n}") for n in range(6)),
        Box("object", (10, 10, 30, 30), "a label that is much longer than the panel is wide" * 3),
    ]
    figure = draw(picture("squash", 300, 180, boxes=boxes))
    figure.draw_without_rendering()
    panel = figure.axes[0]
    extents = [text.get_window_extent() for text in panel.texts]
    shown = [text.get_text() for text in panel.texts]
    assert {"human", "motorcycle", "ride", "thing 0"} <= set(shown) and "outside" not in shown and len(shown) < 9
    for index, extent in enumerate(extents):
        assert panel.bbox.x0 <= extent.x0 < extent.x1 <= panel.bbox.x1
        assert panel.bbox.y0 <= extent.y0 < extent.y1 <= panel.bbox.y1
        assert not any(_overlap(extent, other) for other in extents[index + 1 :])


def _overlap(first: object, second: object) -> bool:
    across = min(first.x1, second.x1) - max(first.x0, second.x0)  # type: ignore[attr-defined]
    down = min(first.y1, second.y1) - max(first.y0, second.y0)  # type: ignore[attr-defined]
    return across > 1 and down > 1


if __name__ == "__main__":  # makes them again: look at them
    REFERENCES.mkdir(exist_ok=True)
    for each, drawn in PICTURES.items():
        draw(drawn).savefig(REFERENCES / f"{each}.png", dpi=50)
