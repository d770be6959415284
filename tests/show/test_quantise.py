"""Tokens in few bytes: the stated error is the largest one, and the size fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchbank.boxes import union_boxes
from patchbank.pool import pool_regions, pooling_weights
from patchbank.show import gallery
from patchbank.show.maps import Moments, similarities, unit
from patchbank.show.quantise import Packed
from patchbank.show.quantise import pack as pack_on
from patchbank.transform import ImageTransform


def tokens(count: int, dim: int, decay: float) -> np.ndarray:
    generator = np.random.default_rng(count)
    mixed = generator.normal(size=(count, min(count, dim))) * np.geomspace(1, decay, min(count, dim))
    return (5 * mixed @ generator.normal(size=(min(count, dim), dim)) + 2).astype(np.float32)


def pack(some: np.ndarray, most: int) -> Packed:
    """On the tokens' own axes."""
    return pack_on(some, Moments(some.shape[1]).add(unit(some)).axes(), most)


@pytest.mark.parametrize(
    ("count", "dim", "decay", "worst"), [(196, 512, 0.01, 0.02), (576, 768, 0.01, 0.3), (16, 32, 1.0, 0.02)]
)
def test_the_stated_error_is_the_largest_one(count: int, dim: int, decay: float, worst: float) -> None:
    some = tokens(count, dim, decay)
    packed = pack(some, 22_000)
    assert len(packed.deflated) <= 22_000
    assert packed.levels.dtype == np.int8 and 0 < packed.typical_error < packed.error / 2 < worst / 2
    largest = 0.0
    for query in range(0, count, 7):
        found = packed.pooled_similarities(np.eye(1, count, query, dtype=np.float32))[0]
        assert found.argmax() == query
        largest = max(largest, float(np.abs(found - similarities(some, some[query])).max()))
    assert largest <= packed.error + 1e-5
    assert largest > packed.error / 20


def test_what_is_pooled_is_what_the_library_pools() -> None:
    some, transform = tokens(196, 512, 0.01), ImageTransform(640, 480, "center-crop", (224, 224), 16)
    packed = pack(some, 22_000)
    boxes = torch.tensor([[100, 50, 400, 300], [0, 0, 640, 480], [300.5, 200.25, 310, 210]])
    weights = pooling_weights(boxes, transform)
    pooled = pool_regions(torch.from_numpy(some), boxes, transform)
    assert torch.allclose(weights @ torch.from_numpy(some), pooled, rtol=1e-5, atol=1e-4)
    found = packed.pooled_similarities(weights.numpy())
    for box in range(3):
        assert np.abs(found[box] - similarities(some, pooled[box].numpy())).max() < 2 * packed.error


def test_the_stated_error_of_boxes_is_that_of_the_worst_union() -> None:
    some, transform = tokens(196, 512, 0.01), ImageTransform(640, 480, "center-crop", (224, 224), 16)
    some[::2] *= 1e4  # of tokens so unlike in length, some hide others in what is pooled
    packed = pack(some, 6_000)
    boxes = [[100.0, 50.0, 400.0, 300.0], [300.0, 200.0, 310.0, 210.0], [0.0, 0.0, 10.0, 10.0]]  # the last is not seen
    stated = gallery._box_error(some, packed, boxes, transform)
    largest = 0.0
    for first in range(3):
        for second in range(3):
            one, other = torch.tensor([boxes[first]]), torch.tensor([boxes[second]])
            box = union_boxes(one, other)
            if transform.visible_fraction(box)[0] > 0:
                weights = pooling_weights(box, transform).numpy()
                pooled = pool_regions(torch.from_numpy(some), box, transform)[0].numpy()
                errors = packed.pooled_similarities(weights)[0] - similarities(some, pooled)
                largest = max(largest, float(np.abs(errors).max()))
    assert abs(stated - largest) < 1e-4 < largest


def test_little_room_costs_precision_and_not_the_page() -> None:
    some = tokens(576, 768, 0.5)
    rough, fine = pack(some, 4_000), pack(some, 60_000)
    assert len(rough.deflated) <= 4_000 < len(fine.deflated)
    assert rough.error > fine.error
    same = pack(np.ones((16, 32), np.float32), 1_000)
    assert same.error < 1e-5
    assert pack(np.zeros((16, 32), np.float32), 1_000).levels.shape[0] == 16
