"""What `show` puts into a figure, against the slow, obvious way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchbank import extract, load_dataset, open_bank, pool_regions
from patchbank.boxes import union_boxes
from patchbank.config import ExtractConfig
from patchbank.errors import ConfigError
from patchbank.show import showing
from patchbank.transform import ImageTransform, ResizeMode
from tests.support import hico_root, photographs

TOKENS = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)


def cosines(query: np.ndarray) -> np.ndarray:
    return np.array([token @ query / (np.linalg.norm(token) * np.linalg.norm(query)) for token in TOKENS])


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(200, 120), (120, 200)])
def test_a_point_is_in_the_patch_that_covers_it(mode: ResizeMode, size: tuple[int, int]) -> None:
    transform = ImageTransform(*size, mode, (32, 32), 8)
    for token in np.flatnonzero(transform.valid):
        row, column = divmod(int(token), 4)
        for inside in (0.4, 0.6):
            x, y = transform.points_from_grid([column + inside, row + inside])
            found = showing.at_point(TOKENS, transform, (x, y))
            assert np.abs(found.values - cosines(TOKENS[token])).max() < 1e-6
            assert found.point == (x, y) and f"row {row}, column {column}" in found.title
    x1, y1, x2, y2 = transform.visible
    for corner, token in (((x1, y1), 0), ((x2, y2), -1)):  # the very ends belong to the outermost patches
        valid = np.flatnonzero(transform.valid)
        found = showing.at_point(TOKENS, transform, corner)
        if mode != "pad":
            assert found.values.argmax() == valid[token]
    with pytest.raises(ConfigError, match="outside the part that the model saw"):
        showing.at_point(TOKENS, transform, (x2 + 1, y1))
    middle = showing.middle(transform)
    assert showing.at_point(TOKENS, transform, middle).values.argmax() in np.flatnonzero(transform.valid)


@pytest.mark.parametrize("size", [(20_000, 20), (20, 20_000), (1, 1)])
@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
def test_any_image_has_a_middle(size: tuple[int, int], mode: ResizeMode) -> None:
    transform = ImageTransform(*size, mode, (224, 224), 16)
    x1, y1, x2, y2 = transform.visible
    x, y = showing.middle(transform)
    assert x1 <= x <= x2 and y1 <= y <= y2


def test_boxes_are_pooled_and_those_that_were_not_seen_are_refused() -> None:
    # Resized to 53 x 32; the crop removes 10 columns at the left and 11 at the right.
    transform = ImageTransform(200, 120, "center-crop", (32, 32), 8)
    left, right = 10 * 200 / 53, 42 * 200 / 53
    boxes = [showing.box_of("box", each, "box 1") for each in ([50, 10, 90, 70], [100, 60, 199, 119])]
    maps = showing.in_boxes(torch.from_numpy(TOKENS), transform, boxes)
    for found, box in zip(maps, boxes, strict=True):
        pooled = pool_regions(torch.from_numpy(TOKENS), torch.tensor([box.xyxy]), transform)[0].numpy()
        assert np.abs(found.values - cosines(pooled)).max() < 1e-6
        assert found.box is not None and found.box.xyxy == box.xyxy
    assert np.abs(maps[0].values - maps[1].values).max() > 0.1
    assert "50,10,90,70 (box 1)" in maps[0].title and "visible" not in maps[0].title
    assert f"{(right - 100) / 99:.0%} of the box visible" in maps[1].title
    [edge] = showing.in_boxes(torch.from_numpy(TOKENS), transform, [showing.box_of("box", [0, 0, left + 0.1, 120])])
    assert "less than 1% of the box visible" in edge.title
    for unseen in ([0, 0, 30, 30], [-5, 10, left, 100], [right, 0, 200, 120]):  # the latter two touch what was seen
        with pytest.raises(ConfigError, match="outside the part that the model saw"):
            showing.in_boxes(torch.from_numpy(TOKENS), transform, [showing.box_of("box", unseen)])


def test_pairs_are_the_annotated_ones_by_name(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    root = hico_root(tmp_path, 4, splits=["train"])
    dataset = load_dataset("hicodet", root, "train")
    key = next(sample.key for sample in dataset.with_pairs().samples)
    target = dataset.target(key)
    human, thing, union = showing.pairs_of(key, dataset)
    assert (human.kind, thing.kind, union.kind) == ("human", "object", "union")
    assert human.xyxy == tuple(target.boxes_h[0].tolist()) and thing.xyxy == tuple(target.boxes_o[0].tolist())
    assert union.xyxy == tuple(union_boxes(target.boxes_h, target.boxes_o)[0].tolist())
    assert (thing.label, union.label) == ("motorcycle", "race")
    assert showing.pairs_of("none.jpg", dataset) == showing.pairs_of(key, None) == []


def test_each_text_has_its_own_map_on_one_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: ExtractConfig
) -> None:
    root = hico_root(tmp_path, 1, splits=["train"])
    extract(load_dataset("hicodet", root, "train"), tmp_path / "bank", tiny_config)
    bank = open_bank(tmp_path / "bank")
    features = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32))
    monkeypatch.setattr("patchbank.encoders.encode_texts", lambda spec, texts: features[: len(texts)])
    texts = ["a cat", "a\x07dog"]
    first, second = showing.to_texts(bank, "patch_tokens", next(iter(bank)), TOKENS, texts, tiny_config, None)
    for found, feature in ((first, features[0]), (second, features[1])):
        assert np.abs(found.values - cosines(feature.numpy())).max() < 1e-6
    both = np.stack([first.values, second.values])
    assert first.scale == second.scale == (both.min(), both.max())
    assert "“a cat”" in first.title and "“a\\x07dog”" in second.title


def test_a_family_without_texts_is_refused_before_weights_are_looked_for(
    tmp_path: Path, tiny_config: ExtractConfig
) -> None:
    pytest.importorskip("timm")
    photographs(tmp_path / "images", 1)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    bank = open_bank(tmp_path / "bank")
    bank.manifest = replace(bank.manifest, identity={**bank.manifest.identity, "model": "timm/no_such_model"})
    with pytest.raises(ConfigError, match=r"timm/no_such_model has none\. timm has image towers alone"):
        showing.to_texts(bank, "patch_tokens", next(iter(bank)), TOKENS, ["a cat"], ExtractConfig(), None)


def test_the_image_is_that_which_was_encoded(tmp_path: Path) -> None:
    transform = ImageTransform(30, 20, "center-crop", (32, 32), 8)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    found = showing.image_of("a.png", tmp_path / "a.png", None, transform)
    assert found is not None and found.size == (30, 20)
    dataset = load_dataset("folder", tmp_path)
    assert showing.image_of("a.png", None, dataset, transform) is not None
    (tmp_path / "a.png").unlink()
    assert showing.image_of("a.png", None, dataset, transform) is None  # gone: it is left out
    assert showing.image_of("b.png", None, dataset, transform) is None
