"""Regions of images: a box, what is in it, and how it is cut out. Boxes are xyxy in original pixels, 0-based."""

from __future__ import annotations

import re
from math import isfinite
from typing import NamedTuple

Box = tuple[float, float, float, float]
Rectangle = tuple[int, int, int, int]

IMAGE, HUMAN, OBJECT, UNION = "image", "human", "object", "union"  # names of regions, the last three with a number
PERSON = 0  # a human's label, of COCO's 80
GRID_CUT = "grid"  # a region is not cut out: its features are pooled from a grid of the whole image
_MOST_PIXELS = 1 << 28  # of a picture that is cut out, black ones included


class Region(NamedTuple):
    """A part of an image.

    Attributes:
        box: xyxy in original pixels, 0-based; None is the whole image.
        label: the class of what is in it: of annotated pairs, one of COCO's 80 (a person is 0).
        score: a detector's.
        verb, hoi: the classes of a pair, of the union of its boxes.
    """

    box: Box | None = None
    label: int | None = None
    score: float | None = None
    verb: int | None = None
    hoi: int | None = None


def region_key(image: str, name: str) -> str:
    """The key of a region: ``a.jpg#union-0``."""
    return f"{image}#{name}"


def image_of(key: str) -> str:
    """The key of a region's image."""
    return key.rpartition("#")[0] or key


def name_of(key: str) -> str:
    """A region's name, such as ``union-0``."""
    return key.rpartition("#")[2]


def pair_name(kind: str, number: int) -> str:
    """The name of a region of an annotated pair: ``union-0``."""
    return f"{kind}-{number}"


def pair_of(name: str) -> tuple[str, int] | None:
    """The inverse of `pair_name`; None for another region's name."""
    match = re.fullmatch(rf"({HUMAN}|{OBJECT}|{UNION})-(\d+)", name)
    return match and (match[1], int(match[2]))


def parse_cut(text: str) -> str:
    """How boxes are cut out: ``pad``, ``squash`` or ``context=1.5``. Raises ValueError on anything else."""
    if text in ("pad", "squash"):
        return text
    if match := re.fullmatch(r"context=(\d+(?:\.\d+)?)", text):
        if 1 <= (factor := float(match[1])) <= 16:
            return f"context={factor:g}"
        raise ValueError("context must be between 1 and 16")
    raise ValueError(f"pad, squash or context=FACTOR, such as context=1.5, and not {text!r}")


def fault_of(box: Box, size: tuple[int, int]) -> str:
    """Why a box of an image of (width, height) pixels cannot be used; empty if it can."""
    x1, y1, x2, y2 = box
    shown = "(" + ", ".join(f"{each:g}" for each in box) + ")"
    if not all(map(isfinite, box)):
        return f"the box {shown} holds a number that is not finite"
    if x2 < x1 or y2 < y1:
        return f"the corners of the box {shown} are swapped: xyxy is needed, with x1 < x2 and y1 < y2"
    if x2 == x1 or y2 == y1:
        return f"the box {shown} has no area"
    width, height = size
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return f"the box {shown} is outside of the image of {width} x {height} pixels"
    return ""


def rectangle(box: Box, cut: str, size: tuple[int, int]) -> Rectangle:
    """What is cut out of an image of (width, height), in whole pixels: with ``pad``, less than its square.

    Rounded as `PIL.Image.crop` rounds. Raises ValueError if nothing of the image is left, or too much is asked.
    """
    if cut.startswith("context="):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        half = float(cut.removeprefix("context=")) * max(box[2] - box[0], box[3] - box[1]) / 2
        box = (x - half, y - half, x + half, y + half)
    left, top, right, bottom = (round(each) for each in box)
    if not (max(left, 0) < min(right, size[0]) and max(top, 0) < min(bottom, size[1])):
        raise ValueError("nothing is left of the box when its corners are rounded to whole pixels")
    side = max(right - left, bottom - top)
    if side * (side if cut == "pad" else min(right - left, bottom - top)) > _MOST_PIXELS:
        raise ValueError(f"the box is too large: {right - left} x {bottom - top} pixels")
    return left, top, right, bottom


def cut_size(box: Box, cut: str, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the picture that is encoded, in original pixels. Raises ValueError as `rectangle`."""
    left, top, right, bottom = rectangle(box, cut, size)
    width, height = right - left, bottom - top
    return (max(width, height),) * 2 if cut == "pad" else (width, height)


def visible_fraction(box: Box, size: tuple[int, int]) -> float:
    """The part of a box that lies in an image of (width, height) pixels, 0 to 1."""
    x1, y1, x2, y2 = box
    width, height = size
    seen = max(0.0, min(x2, width) - max(x1, 0.0)) * max(0.0, min(y2, height) - max(y1, 0.0))
    area = (x2 - x1) * (y2 - y1)
    return seen / area if area > 0 else 0.0
