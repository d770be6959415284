"""ImageTransform: how one image became the model's input, in numbers. Original pixels -> input -> patch grid, and back.

Coordinates are continuous: pixel (column 0, row 0) covers [0, 1) x [0, 1) and its centre is at (0.5, 0.5). In that
convention a resize is a pure scale, which is how PIL and torchvision sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchbank.config import ResizeMode


@dataclass(frozen=True)
class ImageTransform:
    """The way of one image of `width` x `height` pixels into a square input of `input_size` pixels a side.

    Attributes:
        width, height: the original image's size in pixels, as Pillow opens it (no EXIF rotation).
        mode: ``center-crop``: the shorter side to `input_size`, then the central square, as CLIP's own
            preprocessing does. ``squash``: both sides to `input_size`. ``pad``: the longer side to
            `input_size`, centred on a square of CLIP's mean colour.
        input_size: the side of the model's input in pixels.
        patch_size: the side of a patch in pixels; the grid is ``input_size // patch_size`` a side.
    """

    width: int
    height: int
    mode: ResizeMode
    input_size: int
    patch_size: int

    @property
    def resized(self) -> tuple[int, int]:
        """(width, height) after resizing, before cropping or padding, in pixels.

        ``center-crop`` follows torchvision's ``Resize``: the longer side is ``int(n * long / short)``.
        """
        n, w, h = self.input_size, self.width, self.height
        if self.mode == "squash":
            return n, n
        if self.mode == "pad":
            return (n, max(1, round(n * h / w))) if w >= h else (max(1, round(n * w / h)), n)
        return (n, int(n * h / w)) if w <= h else (int(n * w / h), n)

    @property
    def offset(self) -> tuple[int, int]:
        """(x, y) of the resized image's top-left corner in the input, in pixels: negative where it is cropped.

        ``center-crop`` follows torchvision's ``CenterCrop``: ``int(round((size - n) / 2))`` is cut off.
        """
        width, height = self.resized
        if self.mode == "pad":
            return (self.input_size - width) // 2, (self.input_size - height) // 2
        return -round((width - self.input_size) / 2.0), -round((height - self.input_size) / 2.0)

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y): input pixels an original pixel."""
        width, height = self.resized
        return width / self.width, height / self.height

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw): rows and columns of patches."""
        side = self.input_size // self.patch_size
        return side, side

    @property
    def visible(self) -> tuple[float, float, float, float]:
        """What the model saw of the image: xyxy in original pixels, within the image."""
        x1, y1, x2, y2 = self.to_original([[0, 0], [self.input_size, self.input_size]]).ravel().tolist()
        return max(x1, 0.0), max(y1, 0.0), min(x2, float(self.width)), min(y2, float(self.height))

    def to_input(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points (..., 2), (x, y) in original pixels, to the model's input in pixels.

        A box is two points: ``to_input(boxes.reshape(-1, 2, 2)).reshape(-1, 4)``. Points outside the crop land
        outside ``[0, input_size]``.
        """
        return np.asarray(points, dtype=np.float64) * self.scale + self.offset

    def to_original(self, points: ArrayLike) -> NDArray[np.float64]:
        """The inverse of `to_input`: points (..., 2) in input pixels to original pixels."""
        return (np.asarray(points, dtype=np.float64) - self.offset) / self.scale

    def to_grid(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points (..., 2) in original pixels to the patch grid: patch (row r, column c) covers x in [c, c + 1)
        and y in [r, r + 1)."""
        return self.to_input(points) / self.patch_size
