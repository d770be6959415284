"""An image's patch tokens in few bytes, so that a browser can compute every similarity among them."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchbank.show.maps import Floats, unit

_LEVELS = 127
_STEPS = 12  # halvings of the interval in which the step is sought


@dataclass(frozen=True)
class Packed:
    """Patch tokens (N, D), quantised.

    Unit tokens are turned into the axes of their own singular vectors, which changes no similarity and puts what
    matters first; each coordinate is rounded to a multiple of one step; what is rounded to 0 throughout is left out.

    Attributes:
        levels: (N, K) int8: coordinates in steps.
        norms: (N,) float32: the tokens' lengths.
        deflated: `levels`, component by component, deflated.
        error: the largest difference of any two patches' cosine similarity from the stored tokens' own.
        typical_error: the root mean square of these differences.
    """

    levels: NDArray[np.int8]
    norms: Floats
    deflated: bytes
    error: float
    typical_error: float

    @property
    def units(self) -> Floats:
        """(N, K): the tokens at unit length, as the browser has them."""
        return unit(self.levels.astype(np.float32))

    def pooled_similarities(self, weights: Floats) -> Floats:
        """(M, N): each patch's cosine similarity to the M means of the tokens with weights (M, N)."""
        units = self.units
        pooled = ((weights * self.norms) @ units).astype(np.float32)
        found: Floats = unit(pooled) @ units.T
        return found

    def to_json(self) -> dict[str, Any]:
        """As the page holds it."""
        return {
            "components": self.levels.shape[1],
            "levels": base64.b64encode(self.deflated).decode(),
            "norms": base64.b64encode(self.norms.astype("<f4").tobytes()).decode(),
            "error": self.error,
            "typicalError": self.typical_error,
        }


def pack(tokens: Floats, most: int) -> Packed:
    """Quantise finite (N, D) patch tokens into `most` bytes, deflated, with the smallest step that fits."""
    exact = tokens.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1)
    units = exact / np.where(lengths > 0, lengths, 1)[:, None]
    cosines = units @ units.T
    values, vectors = np.linalg.eigh(cosines)  # left singular vectors, the largest last; faster than by the SVD
    coordinates = (vectors * np.sqrt(values.clip(0)))[:, ::-1]
    finest = float(np.abs(coordinates).max()) / _LEVELS or 1.0
    low, high = np.log(finest), np.log(finest * _LEVELS)
    best = _deflated(coordinates, finest)
    if len(best[1]) > most:
        best = _deflated(coordinates, float(np.exp(high)))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            tried = _deflated(coordinates, float(np.exp(middle)))
            if len(tried[1]) <= most:
                best, high = tried, middle
            else:
                low = middle
    levels, deflated = best
    rough = unit(levels.astype(np.float32)).astype(np.float64)
    errors = rough @ rough.T - cosines
    largest, typical = float(np.abs(errors).max()), float(np.sqrt((errors**2).mean()))
    return Packed(levels, lengths.astype(np.float32), deflated, largest, typical)


def _deflated(coordinates: NDArray[np.float64], step: float) -> tuple[NDArray[np.int8], bytes]:
    levels = (coordinates / step).round().clip(-_LEVELS, _LEVELS).astype(np.int8)
    used = np.flatnonzero(levels.any(0))
    levels = levels[:, : used[-1] + 1 if len(used) else 1]
    return levels, zlib.compress(levels.T.tobytes(), 6)
