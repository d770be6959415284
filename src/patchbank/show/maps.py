"""Patch tokens as values to draw: similarities, and principal components as colours. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_NOISE = 0.01  # tokens that vary by less, of their norm, have no components: only rounding differs in a blank image
_EQUAL = 1e-6  # values that differ by less, of the greatest, count as equal: that is rounding
_PERCENTILES = 1, 99  # of a component over the patches; they become 0 and 1


def unit(vectors: Floats) -> Floats:
    """(..., D) vectors divided by their L2 norms, float32. Zero vectors stay zero, NaN stays NaN."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def similarities(tokens: Floats, query: Floats) -> Floats:
    """(N,): the cosine similarity of each of (N, D) patch tokens to a vector (D,). 0 where either is zero."""
    found: Floats = unit(tokens) @ unit(query)
    return found


def principal_colours(tokens: Floats, valid: NDArray[np.bool_] | None = None) -> tuple[Floats, Floats]:
    """The first three principal components of an image's patch tokens, as red, green and blue.

    Args:
        tokens: (N, D).
        valid: (N,) bool, the patches to use; None: all.

    Returns:
        (N, 3) float32 from 0 to 1, NaN for the other patches; and (3,) float32, each component's share of the variance.
        The largest loading of a component is positive, and the patches' order decides between components of equal
        variance: every machine gives the same colours. Missing components are 0.5: all are if the tokens are nearly
        equal.
    """
    chosen = np.ones(len(tokens), bool) if valid is None else valid
    some = tokens[chosen].astype(np.float64)
    centred = some - some.mean(0) if len(some) else some
    colours = np.full((len(tokens), 3), np.nan, np.float32)
    shares = np.zeros(3, np.float32)
    colours[chosen] = 0.5
    if len(some) < 2 or not np.isfinite(centred).all() or np.linalg.norm(centred) <= _NOISE * np.linalg.norm(some):
        return colours, shares
    squares, left = np.linalg.eigh(centred @ centred.T)  # faster than an SVD
    squares, left = squares[::-1].clip(0), left[:, ::-1]  # the largest first
    count = min(3, int((squares > 1e-12 * squares[0]).sum()))
    for component, scores in enumerate(_definite(squares, left, count)):
        loadings = scores @ centred
        score = _sign(loadings) * scores
        low, high = np.percentile(score, _PERCENTILES)
        if high > low:
            colours[chosen, component] = ((score - low) / (high - low)).clip(0, 1)
        shares[component] = squares[component] / squares.sum()
    return colours, shares


def _definite(squares: NDArray[np.float64], vectors: NDArray[np.float64], count: int) -> list[NDArray[np.float64]]:
    """The first `count` eigenvectors, the same ones from every linear algebra library.

    Eigenvectors of equal values may be any orthonormal basis of their space. This one comes from pivoted Gram-Schmidt
    on the space's projector, which does not depend on the basis. The first of nearly equal pivots counts.

    Args:
        squares: eigenvalues, the largest first.
        vectors: their eigenvectors, as columns.
    """
    chosen: list[NDArray[np.float64]] = []
    while len(chosen) < count:
        first = len(chosen)
        equal = (np.abs(squares - squares[first]) <= _EQUAL * squares[0]) & (np.arange(len(squares)) >= first)
        space = vectors[:, equal]
        for _ in range(min(count - first, space.shape[1])):
            projector = space @ space.T
            pivot = int((projector.diagonal() >= projector.diagonal().max() * (1 - _EQUAL)).argmax())
            vector = projector[:, pivot] / np.sqrt(projector[pivot, pivot])
            chosen.append(vector)
            space = space - np.outer(vector, vector @ space)
    return chosen


def _sign(loadings: NDArray[np.float64]) -> float:
    """The sign of the largest loading; the first of nearly equal ones counts."""
    sizes = np.abs(loadings)
    return float(np.sign(loadings[(sizes >= sizes.max() * (1 - _EQUAL)).argmax()]))
