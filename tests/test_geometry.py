"""ImageTransform: torchvision's sizes, exact inverses, and the pixels where it says they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torchvision.transforms import CenterCrop, Resize

from patchbank import ImageTransform
from patchbank.config import ResizeMode
from patchbank.preprocess import preprocess

sides = st.integers(1, 5000)
modes = st.sampled_from(["center-crop", "squash", "pad"])


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 224, 336]))
def test_center_crop_is_torchvisions(width: int, height: int, size: int) -> None:
    transform = ImageTransform(width, height, "center-crop", size, 16)
    resized = Resize(size)(Image.new("L", (width, height)))
    assert transform.resized == resized.size
    # Each pixel of a ramp tells its own place: the first of the crop tells the offset.
    x, y = transform.offset
    ramp = Image.fromarray(np.arange(resized.width * resized.height, dtype=np.int32).reshape(resized.size[::-1]))
    assert CenterCrop(size)(ramp).getpixel((0, 0)) == -y * resized.width - x


@pytest.mark.parametrize(
    ("size", "mode", "resized", "offset"),
    [
        ((640, 480), "pad", (224, 168), (0, 28)),
        ((480, 640), "pad", (168, 224), (28, 0)),
        ((100, 33), "pad", (224, 74), (0, 75)),  # 73.92 is rounded up
        ((100, 31), "pad", (224, 69), (0, 77)),  # 69.44 down; an odd row of padding goes to the bottom
        ((1000, 1), "pad", (224, 1), (0, 111)),
        ((640, 480), "squash", (224, 224), (0, 0)),
        ((640, 480), "center-crop", (298, 224), (-37, 0)),
        ((427, 640), "center-crop", (224, 335), (0, -56)),  # 55.5 is rounded to even
        ((431, 640), "center-crop", (224, 332), (0, -54)),
    ],
)
def test_values_worked_out_by_hand(
    size: tuple[int, int], mode: ResizeMode, resized: tuple[int, int], offset: tuple[int, int]
) -> None:
    transform = ImageTransform(*size, mode, 224, 16)
    assert transform.resized == resized
    assert transform.offset == offset


@given(sides, sides, modes, st.floats(-100, 6000), st.floats(-100, 6000))
def test_there_and_back(width: int, height: int, mode: ResizeMode, x: float, y: float) -> None:
    transform = ImageTransform(width, height, mode, 224, 16)
    assert np.allclose(transform.to_original(transform.to_input([x, y])), [x, y], atol=1e-6)
    assert np.allclose(transform.to_grid([x, y]) * 16, transform.to_input([x, y]))


@given(sides, sides, modes)
def test_what_is_visible(width: int, height: int, mode: ResizeMode) -> None:
    transform = ImageTransform(width, height, mode, 224, 16)
    x1, y1, x2, y2 = transform.visible
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    if mode != "center-crop":
        assert (x1, y1, x2, y2) == pytest.approx((0, 0, width, height))
    inside = transform.to_input([[x1, y1], [x2, y2]])
    assert (inside >= -1e-6).all()
    assert (inside <= 224 + 1e-6).all()


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(640, 427), (300, 500), (225, 224)])
def test_a_mark_is_found_where_the_transform_says(mode: ResizeMode, size: tuple[int, int]) -> None:
    width, height = size
    box = (0.4 * width, 0.3 * height, 0.6 * width, 0.7 * height)
    box = tuple(round(value) for value in box)
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="red")
    red = preprocess(image, mode, 224)[:, :, 0] / 255

    seen = red > 0.6  # the padding's red is 123
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    corners = np.array(box, dtype=float).reshape(2, 2)
    expected = ImageTransform(width, height, mode, 224, 16).to_input(corners).ravel()
    assert np.abs(np.array(found) - expected).max() <= 1.0
