"""Patch tokens quantised into few bytes. A browser computes every similarity from them."""

from __future__ import annotations

import base64
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchbank.show.maps import Floats, unit

_LEVELS = 127
_STEPS = 4096  # sizes of the step, from the finest to one level alone


@dataclass(frozen=True)
class Packed:
    """Patch tokens (N, D), quantised.

    Unit tokens are rotated to axes along which they are long, the longest first. That changes no similarity, also not
    between images with the same axes. Each coordinate is rounded to a multiple of one step; the last axes, all zero,
    are dropped.

    Attributes:
        levels: (N, K) int8: coordinates in steps.
        norms: (N,) float32: the tokens' L2 norms.
        deflated: `levels`, component by component, deflated.
        error: the largest error of the cosine similarity of two patches.
        typical_error: the root mean square of these errors.
    """

    levels: NDArray[np.int8]
    norms: Floats
    deflated: bytes
    error: float
    typical_error: float

    @property
    def units(self) -> Floats:
        """(N, K): the unit tokens that the browser computes."""
        return unit(self.levels.astype(np.float32))

    def pooled_similarities(self, weights: Floats) -> Floats:
        """(M, N): each patch's cosine similarity to the M means of the tokens with weights (M, N)."""
        units = self.units
        pooled = ((weights * self.norms) @ units).astype(np.float32)
        found: Floats = unit(pooled) @ units.T
        return found

    def to_json(self) -> dict[str, Any]:
        """In the form of the page's data."""
        return {
            "components": self.levels.shape[1],
            "levels": base64.b64encode(self.deflated).decode(),
            "norms": base64.b64encode(self.norms.astype("<f4").tobytes()).decode(),
            "error": self.error,
            "typicalError": self.typical_error,
        }


def pack(tokens: Floats, axes: NDArray[np.float64], most: int) -> Packed:
    """Quantise finite (N, D) patch tokens into `most` bytes, deflated, with the smallest step that fits.

    Args:
        axes: (D, D), orthonormal columns: `Moments.axes` of the unit tokens of all images.
    """
    exact = tokens.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    units = exact / np.where(lengths > 0, lengths, 1)[:, None]
    cosines = units @ units.T
    coordinates = units @ axes
    finest = float(np.abs(coordinates).max()) / _LEVELS or 1.0
    steps = np.geomspace(finest, finest * _LEVELS, _STEPS)
    place = bisect_left(steps, True, key=lambda step: len(_deflated(coordinates, step)[1]) <= most)
    levels, deflated = _deflated(coordinates, steps[min(place, _STEPS - 1)])
    rough = unit(levels.astype(np.float32)).astype(np.float64)
    errors = rough @ rough.T - cosines
    largest, typical = float(np.abs(errors).max()), float(np.sqrt((errors**2).mean()))
    return Packed(levels, lengths.astype(np.float32), deflated, largest, typical)


def _deflated(coordinates: NDArray[np.float64], step: float) -> tuple[NDArray[np.int8], bytes]:
    levels = (coordinates / step).round().clip(-_LEVELS, _LEVELS).astype(np.int8)
    used = np.flatnonzero(levels.any(0))
    levels = levels[:, : used[-1] + 1 if len(used) else 1]
    return levels, zlib.compress(levels.T.tobytes(), 6)
