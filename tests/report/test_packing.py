"""Tokens in few bytes: the error that is stated is that which is made, and there is room for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchbank.geometry import ImageTransform
from patchbank.pictures.maps import similarities
from patchbank.regions import _mean_weights, pool_regions
from patchbank.report.packing import pack


def tokens(count: int, dim: int, decay: float) -> np.ndarray:
    generator = np.random.default_rng(count)
    mixed = generator.normal(size=(count, min(count, dim))) * np.geomspace(1, decay, min(count, dim))
    return (5 * mixed @ generator.normal(size=(min(count, dim), dim)) + 2).astype(np.float32)


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
        alone = np.zeros(count, np.float32)
        alone[query] = 1
        found = packed.similarities(alone)
        assert found.argmax() == query
        largest = max(largest, float(np.abs(found - similarities(some, some[query])).max()))
    assert largest <= packed.error + 1e-5
    assert largest > packed.error / 20


def test_what_is_pooled_is_what_the_library_pools() -> None:
    some, transform = tokens(196, 512, 0.01), ImageTransform(640, 480, "center-crop", 224, 16)
    packed = pack(some, 22_000)
    for box in ([100, 50, 400, 300], [0, 0, 640, 480], [300.5, 200.25, 310, 210]):
        pooled = pool_regions(torch.from_numpy(some), torch.tensor([box]), transform)[0].numpy()
        grid = transform.boxes_to_grid(transform.clip([box]))
        weights = _mean_weights(torch.from_numpy(grid), transform.grid, (7, 7))[0].numpy()
        assert np.abs(packed.similarities(weights) - similarities(some, pooled)).max() < 2 * packed.error


def test_little_room_costs_precision_and_not_the_page() -> None:
    some = tokens(576, 768, 0.5)
    rough, fine = pack(some, 4_000), pack(some, 60_000)
    assert len(rough.deflated) <= 4_000 < len(fine.deflated)
    assert rough.error > fine.error
    same = pack(np.ones((16, 32), np.float32), 1_000)
    assert same.error < 1e-5
    assert pack(np.zeros((16, 32), np.float32), 1_000).levels.shape[0] == 16
