"""RoIAlign as in its paper, in nested loops: the reference for pooling."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from patchbank.transform import ImageTransform

Grid = NDArray[np.float64]


def pooled(grid: Grid, box: NDArray[np.float64], transform: ImageTransform, bins: int) -> Grid:
    """(D, bins, bins) of one box, xyxy in original pixels, on a grid (Gh, Gw, D)."""
    x1, y1, x2, y2 = box
    left, top, right, bottom = transform.visible
    x1, x2 = (min(max(x, left), right) for x in (x1, x2))
    y1, y2 = (min(max(y, top), bottom) for y in (y1, y2))
    result = np.zeros((grid.shape[2], bins, bins))
    if x2 <= x1 or y2 <= y1:
        return result
    # Original pixels to the grid, a step at a time: scale, offset, patches.
    (scale_x, scale_y), (offset_x, offset_y), patch = transform.scale, transform.offset, transform.patch_size
    x1, x2 = ((x * scale_x + offset_x) / patch for x in (x1, x2))
    y1, y2 = ((y * scale_y + offset_y) / patch for y in (y1, y2))
    samples_x, samples_y = math.ceil((x2 - x1) / bins), math.ceil((y2 - y1) / bins)
    for row in range(bins):
        for column in range(bins):
            total = np.zeros(grid.shape[2])
            for i in range(samples_y):
                for j in range(samples_x):
                    y = y1 + (y2 - y1) / bins * (row + (i + 0.5) / samples_y)
                    x = x1 + (x2 - x1) / bins * (column + (j + 0.5) / samples_x)
                    total += bilinear(grid, x, y)
            result[:, row, column] = total / (samples_x * samples_y)
    return result


def bilinear(grid: Grid, x: float, y: float) -> Grid:
    """(D,): the grid at a point, patches' centres at halves; beyond the outermost centres it stays as it is."""
    rows, columns, _ = grid.shape
    y, x = min(max(y - 0.5, 0), rows - 1), min(max(x - 0.5, 0), columns - 1)
    top, left = int(y), int(x)
    below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    dy, dx = y - top, x - left
    above = grid[top, left] * (1 - dx) + grid[top, right] * dx
    beneath = grid[below, left] * (1 - dx) + grid[below, right] * dx
    value: Grid = above * (1 - dy) + beneath * dy
    return value
