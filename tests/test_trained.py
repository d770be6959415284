"""Features of trained weights, by the command line: they are timm's, and they mean something, in numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score
from torch import Tensor

from patchbank import Bank, open_bank
from patchbank.encoders import trained
from patchbank.show.maps import principal_colours
from patchbank.transform import ImageTransform
from tests.support import patchbank, photograph, relative_error

# What stands before the rest of a photograph, drawn by hand, x,y in its pixels, and how well the first principal
# component of the trained tokens tells it apart: the area under the ROC curve over the patches, as measured.
SHAPES = {
    "astronaut": (
        "25,512 25,400 45,280 75,240 120,205 125,165 160,150 165,120 153,80 170,50 205,20 245,15 285,40 "
        "301,85 290,115 275,130 265,150 290,180 305,235 340,270 358,345 300,400 280,512",
        0.884,
    ),
    "chelsea": (
        "35,0 40,60 45,120 55,160 90,190 150,230 190,270 260,285 300,260 320,210 352,150 358,100 352,65 330,40 320,0",
        0.989,
    ),
    "coffee": (
        "173,68 180,60 215,30 275,18 340,30 385,60 410,100 460,150 480,225 455,300 400,355 300,388 200,365 "
        "120,300 78,220 85,150 130,95",
        0.963,
    ),
    "rocket": (
        "310,410 311,160 315,135 322,127 330,135 334,160 335,410",
        0.998,
    ),
}
MARGIN = 0.03  # of an area: another machine's rounding, another Pillow


@pytest.fixture(scope="module")
def extracted(trained_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of the photographs, made with the weights as a state dict of torch's."""
    from safetensors.torch import load_file

    place = tmp_path_factory.mktemp("trained")
    (place / "images").mkdir()
    for name in SHAPES:
        photograph(name).save(place / "images" / f"{name}.png")
    torch.save(load_file(trained_weights), place / "dinov2s.pt")
    options = ("--model", trained.MODEL, "--weights", place / "dinov2s.pt", "--batch-size", 2)
    patchbank("extract", "folder", place / "images", *options, "--out", place / "bank", check=0)
    return open_bank(place / "bank")


def of_timm(weights: Path, names: list[str]) -> dict[str, Tensor]:
    """timm's own tokens of the photographs, by its own preprocessing, without [CLS]."""
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(trained.MODEL.removeprefix("timm/")).eval()
    model.load_state_dict(load_file(weights))
    preprocess = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    with torch.no_grad():
        return {name: model.forward_features(preprocess(photograph(name))[None])[0, 1:] for name in names}


def test_patch_tokens_are_timms(extracted: Bank, trained_weights: Path) -> None:
    for name, expected in of_timm(trained_weights, list(SHAPES)).items():
        assert relative_error(extracted[f"{name}.png"], expected) <= 2e-6


def covered(polygon: str, transform: ImageTransform) -> np.ndarray:
    """(N,) bool: the patches whose centres lie within a polygon of the image."""
    mask = Image.new("1", (transform.width, transform.height))
    ImageDraw.Draw(mask).polygon([int(each) for each in polygon.replace(",", " ").split()], fill=1)
    rows, columns = transform.grid
    x, y = transform.points_from_grid([(k % columns + 0.5, k // columns + 0.5) for k in range(rows * columns)]).T
    found: np.ndarray = np.asarray(mask)[y.astype(int), x.astype(int)]
    return found


def told_apart(tokens: np.ndarray, mask: np.ndarray) -> float:
    """How well the first principal component tells a mask apart: an area under the ROC curve, from 0.5 to 1."""
    area = roc_auc_score(mask, principal_colours(tokens)[0][:, 0])
    return float(max(area, 1 - area))


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_principal_component_tells_a_hand_drawn_shape_apart(name: str, extracted: Bank) -> None:
    polygon, measured = SHAPES[name]
    key = f"{name}.png"
    mask = covered(polygon, extracted.transform(key))
    assert told_apart(extracted[key].numpy(), mask) > measured - MARGIN


def test_its_pixels_tell_it_apart_less(extracted: Bank) -> None:
    """The areas are not those of a bright thing before a dark ground."""
    areas = []
    for name, (polygon, _) in SHAPES.items():
        transform = extracted.transform(f"{name}.png")
        rows, columns = transform.grid
        frame = tuple(transform.visible)
        pixels = np.asarray(photograph(name).resize((14 * columns, 14 * rows), box=frame), np.float32)
        patches = pixels.reshape(rows, 14, columns, 14, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        areas.append(told_apart(patches, covered(polygon, transform)))
    assert np.mean(areas) < np.mean([area for _, area in SHAPES.values()]) - 0.2
