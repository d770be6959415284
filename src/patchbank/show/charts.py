"""Histograms as charts: SVG outlines, ticks, and a summary in words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchbank.show.statistics import Histogram, Statistics

_BARS = 48


def charts_of(seen: Statistics) -> list[dict[str, Any]]:
    """The page's charts, in the form of its template."""
    cosines = [
        ("neighbours", seen.neighbours),
        ("half a grid apart", seen.distant),
        ("two images, same place", seen.other_images),
    ]
    return [
        _chart("Token norms", "L2 norm of a token (logarithmic)", [("all tokens", seen.norms)], logarithmic=True)
        | {"healthy": "In a healthy bank the norms are not all 1: that would mean normalised features."},
        _chart("Similarity of patches", "cosine similarity", [each for each in cosines if each[1].counts.sum()])
        | {
            "healthy": "In a healthy bank neighbours are more similar than patches half a grid apart, and patches of "
            "two images are not equal (1)."
        },
    ]


def _chart(title: str, label: str, series: list[tuple[str, Histogram]], *, logarithmic: bool = False) -> dict[str, Any]:
    """Histograms of one unit as outlines over their common range, with ticks and a summary."""
    counted = [histogram for _, histogram in series if histogram.counts.sum()]
    if not counted:
        return {"title": title, "label": label, "lines": [], "ticks": [], "words": "No data"}
    edges = counted[0].edges
    used = np.flatnonzero(sum(histogram.counts for histogram in counted))
    first, last = max(0, int(used[0]) - 1), min(len(edges) - 1, int(used[-1]) + 2)
    width = max(1, -(-(last - first) // _BARS))
    last = min(len(edges) - 1, first + width * -(-(last - first) // width))
    span = np.log(edges[first : last + 1]) if logarithmic else edges[first : last + 1]
    scale = (span - span[0]) / (span[-1] - span[0])
    starts = np.arange(0, last - first, width)
    ends = np.minimum(starts + width, last - first)
    counts = [np.add.reduceat(histogram.counts[first:last], starts) for _, histogram in series]
    heights = np.array([each / max(1, each.sum()) for each in counts]) / (scale[ends] - scale[starts])
    heights /= heights.max()
    lines = [
        {"name": name, "path": _stairs(scale[starts], scale[ends], each)}
        for (name, _), each in zip(series, heights, strict=True)
    ]
    ticks = [(round(place, 4), f"{tick:g}") for tick, place in _ticks(edges[first], edges[last], logarithmic)]
    words = "; ".join(
        f"{name}: median {each.quantile(0.5):.3g}, half between {each.quantile(0.25):.3g} and {each.quantile(0.75):.3g}"
        for name, each in series
    )
    return {"title": title, "label": label, "lines": lines, "ticks": ticks, "words": words}


def _ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, float]]:
    """About five round numbers between two others, with their places from 0 to 1."""
    size = 10 ** np.floor(np.log10((high - low) / 4))
    step = next(size * each for each in (1, 2, 5, 10) if (high - low) / (size * each) <= 6)
    if logarithmic and high > 8 * low:
        exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        factors = (1, 2, 5) if high < 200 * low else (1,)
        every = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    else:
        every = [step * number for number in range(int(np.ceil(low / step)), int(high / step) + 1)]

    def place(value: float) -> float:
        if logarithmic:
            return float(np.log(value / low) / np.log(high / low))
        return (value - low) / (high - low)

    return [(round(tick, 9), place(tick)) for tick in every if low <= tick <= high]


def _stairs(starts: NDArray[np.float64], ends: NDArray[np.float64], heights: NDArray[np.float64]) -> str:
    """A histogram's outline as an SVG path of 400 by 160."""
    points = ["M0 160"]
    for start, end, y in zip(400 * starts, 400 * ends, 160 - 150 * heights, strict=True):
        points += [f"L{start:.1f} {y:.1f}", f"L{end:.1f} {y:.1f}"]
    return " ".join([*points, "L400 160"])
