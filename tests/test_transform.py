"""ImageTransform: torchvision's sizes, exact inverses, and the pixels where it says they are."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms import functional as F

from patchbank import ImageTransform
from patchbank.config import ResizeMode
from patchbank.encoders.openai.registry import MEAN, STD
from patchbank.features import Input
from patchbank.preprocess import preprocess
from tests.support import photograph

sides = st.integers(1, 5000)
INPUT = Input(size=(224, 224), patch=16, mean=MEAN, std=STD)
modes = st.sampled_from(["center-crop", "squash", "pad"])


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 224, 336]))
def test_center_crop_is_torchvisions(width: int, height: int, size: int) -> None:
    transform = ImageTransform(width, height, "center-crop", (size, size), 16)
    resized = Resize(size)(Image.new("L", (width, height)))
    assert transform.resized == resized.size
    # Each pixel of a ramp is its own index, so the first one of the crop gives the offset.
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
    transform = ImageTransform(*size, mode, (224, 224), 16)
    assert transform.resized == resized
    assert transform.offset == offset


@given(sides, sides, modes, st.floats(-100, 6000), st.floats(-100, 6000))
def test_there_and_back(width: int, height: int, mode: ResizeMode, x: float, y: float) -> None:
    transform = ImageTransform(width, height, mode, (224, 224), 16)
    assert np.allclose(transform.points_from_input(transform.points_to_input([x, y])), [x, y], atol=1e-6)
    assert np.allclose(transform.points_to_grid([x, y]) * 16, transform.points_to_input([x, y]))


@given(sides, sides, modes)
def test_what_is_visible(width: int, height: int, mode: ResizeMode) -> None:
    transform = ImageTransform(width, height, mode, (224, 224), 16)
    x1, y1, x2, y2 = transform.visible
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    if mode != "center-crop":
        assert (x1, y1, x2, y2) == pytest.approx((0, 0, width, height))
    inside = transform.points_to_input([[x1, y1], [x2, y2]])
    assert (inside >= -1e-6).all()
    assert (inside <= 224 + 1e-6).all()


@pytest.mark.parametrize("cover", [None, (256, 272)])
@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(640, 427), (300, 500), (225, 224)])
def test_a_mark_is_found_where_the_transform_says(
    mode: ResizeMode, size: tuple[int, int], cover: tuple[int, int] | None
) -> None:
    wanted = replace(INPUT, resize=mode, cover=None if mode == "pad" else cover)
    width, height = size
    box = (0.4 * width, 0.3 * height, 0.6 * width, 0.7 * height)
    box = tuple(round(value) for value in box)
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="red")
    red = preprocess(image, wanted)[:, :, 0] / 255

    seen = red > 0.6  # the padding's red is 123
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    expected = wanted.transform(size).boxes_to_input(box)
    assert np.abs(np.array(found) - expected).max() <= 1.0


boxes = st.tuples(*[st.floats(-200, 900)] * 4).map(
    lambda box: (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
)


@given(st.integers(1, 700), st.integers(1, 700), modes, boxes, st.booleans())
def test_boxes_are_two_points_there_and_back(
    width: int, height: int, mode: ResizeMode, box: tuple[float, float, float, float], mirrored: bool
) -> None:
    transform = ImageTransform(width, height, mode, (224, 224), 16, mirrored)
    corners = np.array(box).reshape(2, 2)
    assert np.array_equal(transform.boxes_to_input(box), transform.points_to_input(corners).ravel())
    assert np.array_equal(transform.boxes_to_grid(box), transform.points_to_grid(corners).ravel())
    assert np.allclose(transform.boxes_from_input(transform.boxes_to_input(box)), box, atol=1e-6)
    assert np.allclose(transform.boxes_from_grid(transform.boxes_to_grid(box)), box, atol=1e-6)
    assert np.allclose(transform.points_from_grid(transform.points_to_grid(corners)), corners, atol=1e-6)


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
def test_tensors_give_what_arrays_give(mode: ResizeMode) -> None:
    transform = ImageTransform(640, 427, mode, (224, 224), 16)
    array = np.random.default_rng(0).uniform(-50, 700, (3, 5, 2, 2))
    array = np.sort(array, axis=2).reshape(3, 5, 4)
    tensor = torch.from_numpy(array)
    for name in ("boxes_to_input", "boxes_from_input", "boxes_to_grid", "boxes_from_grid", "clip", "visible_fraction"):
        expected, found = getattr(transform, name)(array), getattr(transform, name)(tensor)
        assert isinstance(found, torch.Tensor) and found.shape == expected.shape
        assert np.allclose(found.numpy(), expected, atol=1e-9)
        single = getattr(transform, name)(tensor.float())
        assert single.dtype == torch.float32 and np.allclose(single.numpy(), expected, atol=1e-3)
    whole = transform.boxes_to_input(tensor.long())
    assert whole.dtype == torch.float32 and torch.equal(whole, transform.boxes_to_input(tensor.trunc().float()))


def test_what_is_no_transform() -> None:
    for wrong in ((0, 5, "pad", (224, 224), 16), (5, 5, "squish", (224, 224), 16), (5, 5, "pad", (224, 224), 0)):
        with pytest.raises(ValueError, match="sizes must be positive, and the mode one of"):
            ImageTransform(*wrong)  # type: ignore[arg-type]
    half = torch.tensor([[0, 0, 639, 426], [0, 0, 300, 300]]).half()
    assert ImageTransform(640, 427, "squash", (224, 224), 16).visible_fraction(half).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("mode", "box", "visible"),
    [
        # 640 x 224 to 224 x 224: the crop is x from 208 to 432.
        ("center-crop", (208, 0, 432, 224), 1),
        ("center-crop", (0, 0, 640, 224), 224 / 640),
        ("center-crop", (0, 0, 208, 224), 0),
        ("center-crop", (198, 100, 218, 120), 0.5),
        ("squash", (0, 0, 640, 224), 1),
        ("pad", (0, 0, 640, 224), 1),
        ("squash", (600, 0, 680, 224), 0.5),  # half of it is outside of the image
        ("squash", (10, 10, 10, 20), 0),  # no area
        ("squash", (20, 10, 10, 20), 0),  # no box
    ],
)
def test_the_visible_fraction(mode: ResizeMode, box: tuple[float, ...], visible: float) -> None:
    assert ImageTransform(640, 224, mode, (224, 224), 16).visible_fraction(box) == pytest.approx(visible)


def test_the_visible_fraction_is_counted_by_pixels() -> None:
    transform = ImageTransform(300, 500, "center-crop", (224, 224), 16)
    white = Image.new("L", (300, 500), 0)
    box = (100, 60, 200, 180)
    ImageDraw.Draw(white).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    seen = preprocess(white, INPUT)[:, :, 0] / 255
    scale_x, scale_y = transform.scale
    assert seen.sum() / (scale_x * scale_y) / (100 * 120) == pytest.approx(
        float(transform.visible_fraction(box)), abs=0.01
    )


def test_valid_cells_are_those_that_show_the_image() -> None:
    for mode in ("center-crop", "squash"):
        assert ImageTransform(640, 427, mode, (224, 224), 16).valid.all()  # type: ignore[arg-type]
    white = preprocess(Image.new("L", (640, 320), 255), INPUT, "pad")[:, :, 0]
    shown = (white == 255).reshape(14, 16, 14, 16).mean(axis=(1, 3))
    valid = ImageTransform(640, 320, "pad", (224, 224), 16).valid
    assert valid.shape == (14, 14)
    assert (shown[valid] >= 0.5).all() and (shown[~valid] <= 0.5).all()
    assert valid.sum() == 7 * 14


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(641, 427), (301, 500), (500, 333), (320, 640)])
def test_the_mirrored_grid_has_mirrored_boxes(mode: ResizeMode, size: tuple[int, int]) -> None:
    transform = ImageTransform(*size, mode, (224, 224), 16)
    box, side = np.array([20.0, 30, 200, 150]), 14
    flipped = np.array([size[0] - 200.0, 30, size[0] - 20, 150])
    x1, y1, x2, y2 = transform.boxes_to_grid(box)
    assert np.allclose(transform.mirror().boxes_to_grid(flipped), [side - x2, y1, side - x1, y2])
    assert transform.mirror().visible_fraction(flipped) == pytest.approx(transform.visible_fraction(box))
    assert np.array_equal(transform.mirror().valid, transform.valid[:, ::-1])
    assert transform.mirror().mirror() == transform


# Inputs that are not square: (h, w) of a wide one, an upright one, and one that is no multiple of the patch.
OBLONG = [(32, 64), (112, 48), (37, 53)]
oblong = st.sampled_from(OBLONG)
PICTURES = [(640, 427), (300, 500), (97, 90), (64, 32), (48, 112)]


@given(st.integers(1, 300), st.integers(1, 300), oblong)
def test_an_oblong_input_is_covered_as_timm_does_and_its_centre_is_torchvisions(
    width: int, height: int, size: tuple[int, int]
) -> None:
    h, w = size
    transform = ImageTransform(width, height, "center-crop", size, 8)
    assert transform.resized == tuple(ResizeKeepRatio.get_params(Image.new("L", (width, height)), size, 0.0)[::-1])
    resized_width, resized_height = transform.resized
    x, y = transform.offset
    ramp = Image.fromarray(np.arange(resized_width * resized_height, dtype=np.int32).reshape(resized_height, -1))
    assert F.center_crop(ramp, [h, w]).getpixel((0, 0)) == -y * resized_width - x


@given(st.integers(1, 300), st.integers(1, 300), oblong)
def test_a_picture_is_padded_to_an_oblong_input_as_pillow_contains_it(
    width: int, height: int, size: tuple[int, int]
) -> None:
    h, w = size
    transform = ImageTransform(width, height, "pad", size, 8)
    resized_width, resized_height = transform.resized
    assert (resized_width == w and resized_height <= h) or (resized_height == h and resized_width <= w)
    shorter = Fraction(w * height, width) if width * h >= height * w else Fraction(h * width, height)
    if shorter >= 1 and shorter.denominator != 2:  # Pillow leaves nothing of thinner ones; halves go either way
        assert transform.resized == ImageOps.contain(Image.new("L", (width, height)), (w, h)).size
    assert transform.offset == ((w - resized_width) // 2, (h - resized_height) // 2)


@pytest.mark.parametrize("size", OBLONG)
@pytest.mark.parametrize("picture", PICTURES)
def test_pixels_of_an_oblong_input_are_timms_and_pillows(size: tuple[int, int], picture: tuple[int, int]) -> None:
    h, w = size
    image = photograph("coffee").resize(picture)
    wanted = Input(size=size, patch=8, mean=MEAN, std=STD)

    squashed = F.resize(image, [h, w], InterpolationMode.BICUBIC)
    assert np.array_equal(preprocess(image, wanted, "squash"), np.asarray(squashed))

    cropped = F.center_crop(ResizeKeepRatio(size, interpolation="bicubic")(image), [h, w])
    assert np.array_equal(preprocess(image, wanted), np.asarray(cropped))

    inside = ImageOps.contain(image, (w, h), Image.Resampling.BICUBIC)
    left, top = (w - inside.width) // 2, (h - inside.height) // 2
    borders = [left, top, w - inside.width - left, h - inside.height - top]
    padded = F.pad(inside, borders, fill=(123, 117, 104))
    assert np.array_equal(preprocess(image, wanted, "pad"), np.asarray(padded))


@given(sides, sides, modes, oblong, boxes, st.booleans())
def test_boxes_on_an_oblong_grid_there_and_back(
    width: int, height: int, mode: ResizeMode, size: tuple[int, int], box: tuple[float, ...], mirrored: bool
) -> None:
    transform = ImageTransform(width, height, mode, size, 8, mirrored)
    assert transform.grid == (size[0] // 8, size[1] // 8)
    assert transform.valid.shape == transform.grid
    assert np.allclose(transform.boxes_from_input(transform.boxes_to_input(box)), box, atol=1e-6)
    assert np.allclose(transform.boxes_from_grid(transform.boxes_to_grid(box)), box, atol=1e-6)
    assert np.allclose(transform.boxes_to_grid(box) * 8, transform.boxes_to_input(box))
    x1, y1, x2, y2 = transform.visible
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
    seen = transform.boxes_to_input([x1, y1, x2, y2])
    assert seen.min() >= -1e-6 and (seen <= np.array([*size[::-1], *size[::-1]]) + 1e-6).all()
    assert transform.visible_fraction([x1, y1, x2, y2]) == pytest.approx(1)
    if mode != "center-crop":
        assert (x1, y1, x2, y2) == pytest.approx((0, 0, width, height))


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(160, 320), (256, 128)])
@pytest.mark.parametrize("picture", [(640, 427), (300, 500), (321, 160)])
def test_a_mark_is_found_in_an_oblong_input(mode: ResizeMode, size: tuple[int, int], picture: tuple[int, int]) -> None:
    width, height = picture
    transform = ImageTransform(width, height, mode, size, 16)
    x1, y1, x2, y2 = transform.visible
    box = [
        round(x1 + 0.4 * (x2 - x1)),
        round(y1 + 0.3 * (y2 - y1)),
        round(x1 + 0.6 * (x2 - x1)),
        round(y1 + 0.7 * (y2 - y1)),
    ]
    image = Image.new("RGB", picture, "black")
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="red")
    pixels = preprocess(image, Input(size=size, patch=16, mean=MEAN, std=STD), mode)
    assert pixels.shape == (*size, 3)
    seen = pixels[:, :, 0] > 153  # the padding's red is 123
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(found - transform.boxes_to_input(box)).max() <= 1.0
    mirrored = transform.mirror().boxes_to_input([width - box[2], box[1], width - box[0], box[3]])
    expected = [size[1] - found[2], found[1], size[1] - found[0], found[3]]
    assert np.abs(mirrored - expected).max() <= 1.0


@pytest.mark.parametrize("size", [(160, 320), (256, 128)])
@pytest.mark.parametrize("picture", [(640, 640), (300, 500), (640, 200)])
def test_valid_cells_of_an_oblong_input_are_those_that_show_the_image(
    size: tuple[int, int], picture: tuple[int, int]
) -> None:
    transform = ImageTransform(*picture, "pad", size, 16)
    wanted = Input(size=size, patch=16, mean=MEAN, std=STD)
    white = preprocess(Image.new("L", picture, 255), wanted, "pad")[:, :, 0]
    rows, columns = transform.grid
    shown = (white == 255).reshape(rows, 16, columns, 16).mean(axis=(1, 3))
    assert (shown[transform.valid] >= 0.5).all() and (shown[~transform.valid] <= 0.5).all()
    assert np.array_equal(transform.mirror().valid, transform.valid[:, ::-1])
