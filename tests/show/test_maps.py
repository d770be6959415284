"""Similarities and principal components against the slow, obvious way and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from patchbank.show.maps import principal_colours, similarities, unit


def tokens(count: int = 16, dim: int = 32, seed: int = 0) -> np.ndarray:
    """Tokens with unequal variances and a mean that is not zero."""
    generator = np.random.default_rng(seed)
    spread = np.geomspace(10, 0.1, dim)
    return (generator.normal(size=(count, dim)) * spread + 3).astype(np.float32)


def test_similarities_are_cosines() -> None:
    some = tokens()
    some[3] = 0
    found = similarities(some, some[5])
    for token, value in zip(some, found, strict=True):
        length = np.sqrt((token**2).sum()) * np.sqrt((some[5] ** 2).sum())
        expected = 0.0 if length == 0 else float((token * some[5]).sum() / length)
        assert abs(value - expected) < 1e-5
    assert not unit(np.zeros((2, 3), np.float32)).any()


def test_principal_components_are_scikit_learns() -> None:
    some = tokens()
    valid = np.ones(16, bool)
    valid[[0, 7]] = False
    colours, shares = principal_colours(some, valid)
    reference = PCA(3, svd_solver="full").fit(some[valid])
    assert np.allclose(shares, reference.explained_variance_ratio_, atol=1e-4)
    assert np.isnan(colours[~valid]).all() and colours[valid].min() == 0 and colours[valid].max() == 1
    scores = reference.transform(some[valid])
    for component in range(3):
        order = np.argsort(scores[:, component])
        steps = np.diff(colours[valid][order, component])
        direction = reference.components_[component]
        assert (steps * direction[np.abs(direction).argmax()] >= 0).all()  # the largest loading is positive
    again, _ = principal_colours(-some[:, ::-1], valid)  # other signs and another order of dimensions: other directions
    assert not np.array_equal(again[valid], colours[valid])
    assert np.array_equal(principal_colours(some, valid)[0][valid], colours[valid])


def test_components_of_equal_variance_are_the_same_whatever_the_library_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LAPACK may give any basis of the space of equal eigenvalues, and any sign: the colours are the same."""
    rows, columns = np.mgrid[:8, :8].reshape(2, 64)
    some = np.stack([rows, columns, (rows + columns) % 2, np.ones(64)], axis=1).astype(np.float32)
    expected, shares = principal_colours(some)
    assert shares[0] == pytest.approx(shares[1]) and shares[2] < shares[1] / 2
    eigh = np.linalg.eigh
    for seed in range(5):
        generator = np.random.default_rng(seed)

        def another(matrix: np.ndarray, generator: np.random.Generator = generator) -> tuple[np.ndarray, np.ndarray]:
            values, vectors = eigh(matrix)
            rotation, _ = np.linalg.qr(generator.normal(size=(2, 2)))
            vectors[:, -2:] = vectors[:, -2:] @ rotation
            return values, vectors * generator.choice([-1, 1], len(values))

        monkeypatch.setattr(np.linalg, "eigh", another)
        found, _ = principal_colours(some)
        assert np.allclose(found, expected, atol=1e-5), seed


def test_what_has_no_components_is_grey() -> None:
    same = np.ones((16, 32), np.float32)
    for some in (same, same[:1], np.full((4, 8), np.nan, np.float32)):
        colours, shares = principal_colours(some)
        assert (colours == 0.5).all() and not shares.any()
