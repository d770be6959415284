"""Patch tokens as values to draw: similarities, and principal components as colours. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


class Moments:
    """Sums over patch tokens, of which principal components are made: of any number of images, in the memory of one.

    Attributes:
        count: of the tokens added.
        total: (D,) float64, their sum.
        squares: (D, D) float64, the sum of their outer products.
    """

    def __init__(self, dim: int) -> None:
        self.count, self.total, self.squares = 0, np.zeros(dim), np.zeros((dim, dim))

    def add(self, tokens: Floats) -> Moments:
        """Add (N, D) tokens."""
        exact = tokens.astype(np.float64)
        self.count += len(exact)
        self.total += exact.sum(0)
        self.squares += exact.T @ exact
        return self

    def axes(self) -> NDArray[np.float64]:
        """(D, D): as columns, the directions from the origin in which the tokens are longest; the longest is first."""
        return np.linalg.eigh(self.squares)[1][:, ::-1]


@dataclass(frozen=True)
class Components:
    """The first three principal components of patch tokens.

    The largest loading of a component is positive, and the dimensions' order decides between components of equal
    variance: every machine gives the same ones.

    Attributes:
        mean: (D,).
        loadings: (K, D), orthonormal; K is less than 3 where the others have no variance, 0 of nearly equal tokens.
        shares: (3,), each component's share of the variance.
        low, high: (K,), the scores drawn as 0 and as 1.
    """

    mean: NDArray[np.float64]
    loadings: NDArray[np.float64]
    shares: Floats
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Moments, parts: Callable[[], Iterable[Floats]]) -> Components:
        """Of tokens added to moments; `parts` gives them once more, for the range of their scores."""
        count, mean = max(moments.count, 1), moments.total / max(moments.count, 1)
        spread = moments.squares - count * np.outer(mean, mean)
        shares = np.zeros(3, np.float32)
        none = np.zeros(0)
        equal = cls(mean, np.zeros((0, len(mean))), shares, none, none)
        if moments.count < 2 or not np.isfinite(spread).all():
            return equal
        if np.trace(spread) <= _NOISE**2 * np.trace(moments.squares):
            return equal
        squares, vectors = np.linalg.eigh(spread)
        squares, vectors = squares[::-1].clip(0), vectors[:, ::-1]  # the largest first
        kept = min(3, int((squares > 1e-12 * squares[0]).sum()))
        loadings = np.stack([_sign(each) * each for each in _definite(squares, vectors, kept)])
        shares[:kept] = squares[:kept] / squares.sum()
        scores = np.concatenate([(part - mean) @ loadings.T for part in parts()])
        low, high = np.percentile(scores, _PERCENTILES, axis=0)
        return cls(mean, loadings, shares, low, high)

    def colours(self, tokens: Floats) -> Floats:
        """(N, 3) from 0 to 1 of (N, D) tokens: red, green and blue. Missing components are 0.5."""
        colours = np.full((len(tokens), 3), 0.5, np.float32)
        if kept := len(self.loadings):
            scores = (tokens - self.mean) @ self.loadings.T
            colours[:, :kept] = ((scores - self.low) / np.maximum(self.high - self.low, 1e-30)).clip(0, 1)
        return colours


def principal_colours(tokens: Floats, valid: NDArray[np.bool_] | None = None) -> tuple[Floats, Floats]:
    """The first three principal components of an image's patch tokens, as red, green and blue.

    Args:
        tokens: (N, D).
        valid: (N,) bool, the patches to use; None: all.

    Returns:
        (N, 3) float32 from 0 to 1, NaN for the other patches; and (3,) float32, each component's share of the variance.
    """
    chosen = np.ones(len(tokens), bool) if valid is None else valid
    some = tokens[chosen]
    found = Components.of(Moments(tokens.shape[1]).add(some), lambda: [some])
    colours = np.full((len(tokens), 3), np.nan, np.float32)
    colours[chosen] = found.colours(some)
    return colours, found.shares


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
