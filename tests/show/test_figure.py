"""What `show` draws, against reference pictures: synthetic images and features of a fixed pattern."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.testing.compare import compare_images
from PIL import Image

from patchbank.show.figure import Box, Map, Picture, draw
from patchbank.show.maps import similarities
from patchbank.transform import ImageTransform

REFERENCES = Path(__file__).parent / "references"
TOLERANCE = 8  # of grey levels, root mean square: fonts and edges differ a little between versions


def picture(mode: str, width: int, height: int, **changes: object) -> Picture:
    """A gradient with a disc, and features that tell disc and ground."""
    transform = ImageTransform(width, height, mode, 32, 4)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("name", PICTURES)
def test_the_figures_are_those_that_were_looked_at(name: str, tmp_path: Path) -> None:
    draw(PICTURES[name]).savefig(tmp_path / f"{name}.png", dpi=50)
    difference = compare_images(str(REFERENCES / f"{name}.png"), str(tmp_path / f"{name}.png"), tol=TOLERANCE)
    assert difference is None, difference


def test_no_text_lies_upon_another_and_none_is_cut() -> None:
    """Titles, labels and legend of figures with one to six panels, whatever the image's shape."""
    for shape in ((300, 180), (180, 300), (900, 200), (240, 240)):
        for count in (0, 1, 2, 4):
            each = picture("center-crop", *shape, boxes=[Box("human", (5, 5, 90, 90), "person")])
            maps = [
                Map(f"Similarity to the pooled union\n(text {n}), 42% of the box seen", each.maps[0].values)
                for n in range(count)
            ]
            figure = draw(
                Picture(
                    "name_of_an_image.jpg", each.tokens, each.transform, each.image, each.boxes, maps, each.footnote
                )
            )
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            renderer = canvas.get_renderer()
            texts = [figure._suptitle, *figure.legends]
            for axes in figure.axes:
                texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
            extents = [
                text.get_window_extent(renderer) for text in texts if text is not None and getattr(text, "_text", "x")
            ]
            width, height = figure.canvas.get_width_height()
            for index, extent in enumerate(extents):
                assert extent.x0 >= -1 and extent.y0 >= -1 and extent.x1 <= width + 1 and extent.y1 <= height + 1, (
                    shape,
                    count,
                )
                for other in extents[index + 1 :]:
                    assert not _overlap(extent, other), (shape, count, extent, other)


def _overlap(first: object, second: object) -> bool:
    across = min(first.x1, second.x1) - max(first.x0, second.x0)  # type: ignore[attr-defined]
    down = min(first.y1, second.y1) - max(first.y0, second.y0)  # type: ignore[attr-defined]
    return across > 1 and down > 1


if __name__ == "__main__":  # to make them anew, and then to look at them
    REFERENCES.mkdir(exist_ok=True)
    for each, drawn in PICTURES.items():
        draw(drawn).savefig(REFERENCES / f"{each}.png", dpi=50)
