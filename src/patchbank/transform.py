"""The geometry of one image: original pixels -> encoder's input -> patch grid, and back.

Coordinates are continuous: pixel (column 0, row 0) covers [0, 1) x [0, 1) and its centre is at (0.5, 0.5). In that
convention a resize is a pure scale, which is how PIL and torchvision sample. Boxes are xyxy.

Points and boxes are numpy arrays, or torch tensors on any device; the result is of the same kind. (This module does not
import torch, so that a bank's description can be read without it.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from patchbank.config import ResizeMode, Rounding
from patchbank.notebook import facts, geometry, shown


@dataclass(frozen=True)
class ImageTransform:
    """How one image of `width` x `height` pixels becomes an input of `input_size` pixels.

    Attributes:
        width: of the original image in pixels, as Pillow opens it (no EXIF rotation).
        height: likewise.
        mode: ``center-crop``: resized to cover the input, then its centre. ``squash``: both sides to the input's.
            ``pad``: resized to fit into the input, centred, the rest in the mean colour.
        input_size: (h, w) of the encoder's input in pixels.
        patch_size: the side of a patch, or of a square of pooled ones, in pixels; the grid is ``h // patch_size`` x
            ``w // patch_size``.
        mirrored: whether the grid, and the image that coordinates refer to, are flipped left to right.
        cover: (h, w) to resize to instead of the input's, before its centre is cut out; not with ``pad``.
        crop: how half a pixel at the cut is rounded: ``nearest`` even one, or ``down``.
    """

    width: int
    height: int
    mode: ResizeMode
    input_size: tuple[int, int]
    patch_size: int
    mirrored: bool = False
    cover: tuple[int, int] | None = None
    crop: Rounding = "nearest"

    def __post_init__(self) -> None:
        sizes = self.width, self.height, *self.input_size, self.patch_size
        if min(sizes) < 1 or self.mode not in get_args(ResizeMode):
            raise ValueError(f"sizes must be positive, and the mode one of {get_args(ResizeMode)}: {self}")

    @property
    def resized(self) -> tuple[int, int]:
        """(width, height) after resizing, before cropping or padding, in pixels.

        ``center-crop`` follows torchvision's ``Resize``: the side longer than the input is ``int(n * long / short)``;
        for an input that is not square, it follows timm's ``ResizeKeepRatio``, which rounds both.
        """
        h, w = self.cover or self.input_size
        if self.mode == "squash":
            return w, h
        wide = self.width * h >= self.height * w  # wider than the input
        if self.mode == "pad":
            if wide:
                return w, max(1, round(w * self.height / self.width))
            return max(1, round(h * self.width / self.height)), h
        if h != w:
            ratio = min(self.height / h, self.width / w)
            return round(self.width / ratio), round(self.height / ratio)
        if wide and self.width > self.height:
            return int(h * self.width / self.height), h
        return w, int(w * self.height / self.width)

    @property
    def offset(self) -> tuple[int, int]:
        """(x, y) of the resized image's top-left corner in the input, in pixels; negative if it is cropped.

        ``center-crop`` follows torchvision's ``CenterCrop``: ``int(round((size - n) / 2))`` is cut off; or
        transformers', ``(size - n) // 2``.
        """
        width, height = self.resized
        h, w = self.input_size
        if self.mode == "pad":
            x, y = (w - width) // 2, (h - height) // 2
        elif self.crop == "down":
            x, y = -((width - w) // 2), -((height - h) // 2)
        else:
            x, y = -round((width - w) / 2.0), -round((height - h) / 2.0)
        return (w - width - x if self.mirrored else x), y

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y): input pixels per original pixel."""
        width, height = self.resized
        return width / self.width, height / self.height

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw): rows and columns of patches."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def visible(self) -> tuple[float, float, float, float]:
        """The part of the image that the model saw: xyxy in original pixels, within the image."""
        x1, y1, x2, y2 = self.boxes_from_input([0, 0, self.input_size[1], self.input_size[0]]).tolist()
        return max(x1, 0.0), max(y1, 0.0), min(x2, float(self.width)), min(y2, float(self.height))

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(Gh, Gw): the patches of which the image covers half or more: all, except in the borders of ``pad``.

        If there is none, because the image is very elongated: the patches that it touches.
        """
        if self.mirrored:
            return self.mirror().valid[:, ::-1]
        x1, y1, x2, y2 = self.boxes_to_grid([0, 0, self.width, self.height])
        inside: NDArray[np.bool_] = np.outer(_shown(y1, y2, self.grid[0]), _shown(x1, x2, self.grid[1]))
        return inside

    def points_to_input(self, points: Any) -> Any:
        """Points (..., 2), (x, y), or boxes (..., 4), xyxy, in original pixels to the input in pixels.

        Nothing is clipped: what is cropped is outside the input. `boxes_to_input` is another name of it, as
        `boxes_to_grid`, `boxes_from_input` and `boxes_from_grid` are of the three below.
        """
        points = _floats(points)
        return points * _like(points, self.scale) + _like(points, self.offset)

    def points_from_input(self, points: Any) -> Any:
        """The inverse of `points_to_input`."""
        points = _floats(points)
        return (points - _like(points, self.offset)) / _like(points, self.scale)

    def points_to_grid(self, points: Any) -> Any:
        """Points (..., 2) or boxes (..., 4) in original pixels to the patch grid; not clipped.

        Patch (row r, column c) covers x in [c, c + 1) and y in [r, r + 1).
        """
        return self.points_to_input(points) / self.patch_size

    def points_from_grid(self, points: Any) -> Any:
        """The inverse of `points_to_grid`."""
        return self.points_from_input(_floats(points) * self.patch_size)

    boxes_to_input, boxes_from_input = points_to_input, points_from_input
    boxes_to_grid, boxes_from_grid = points_to_grid, points_from_grid

    def clip(self, boxes: Any) -> Any:
        """The visible part of boxes (..., 4), xyxy in original pixels; without area if nothing is visible."""
        boxes = _floats(boxes)
        x1, y1, x2, y2 = self.visible
        return boxes.clip(_like(boxes, (x1, y1, x1, y1)), _like(boxes, (x2, y2, x2, y2)))

    def visible_fraction(self, boxes: Any) -> Any:
        """The visible fraction of each box (..., 4), xyxy in original pixels: (...), 0 to 1 of its area.

        With ``squash`` and ``pad`` it is 1, unless a part of the box is outside the image, or the centre is cut out. A
        box without area, or with corners in the wrong order, has 0.
        """
        boxes = _floats(boxes)
        area, seen = _area(boxes), _area(self.clip(boxes))
        return seen / (area + (area == 0))

    def mirror(self) -> ImageTransform:
        """The transform of the flipped grid, for boxes in the flipped image: ``(W - x2, y1, W - x1, y2)``."""
        return replace(self, mirrored=not self.mirrored)

    def _repr_html_(self) -> str:
        h, w = self.input_size
        seen = " to ".join(f"({x:.0f}, {y:.0f})" for x, y in (self.visible[:2], self.visible[2:]))
        values = {
            "image": f"{self.width} x {self.height} pixels",
            "input": f"{h}x{w} (height x width), {self.mode}{', mirrored' * self.mirrored}",
            "grid": f"{self.grid[0]} rows, {self.grid[1]} columns",
            "seen": seen,
        }
        return shown("ImageTransform", facts(values), geometry(self))


def _shown(first: float, last: float, cells: int) -> NDArray[np.bool_]:
    """Along one side: the cells with their centre in [first, last); if there is none, those that it touches."""
    starts = np.arange(cells)
    half: NDArray[np.bool_] = (starts + 0.5 >= first) & (starts + 0.5 < last)
    return half if half.any() else (starts + 1 > first) & (starts < last)


def _floats(values: Any) -> Any:
    """A tensor in float32 at least, since halves are too coarse for pixels; anything else as an array of float64."""
    if hasattr(values, "new_tensor"):
        return values if values.is_floating_point() and values.itemsize >= 4 else values.float()
    return np.asarray(values, dtype=np.float64)


def _like(values: Any, numbers: tuple[float, ...]) -> Any:
    """The numbers as an array or a tensor, repeated up to the last dimension of `values`."""
    numbers *= values.shape[-1] // len(numbers)
    return values.new_tensor(numbers) if hasattr(values, "new_tensor") else np.asarray(numbers)


def _area(boxes: Any) -> Any:
    sides = (boxes[..., 2:] - boxes[..., :2]).clip(min=0)
    return sides[..., 0] * sides[..., 1]
