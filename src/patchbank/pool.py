"""Features of regions: patch tokens pooled over boxes, and over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from patchbank.transform import ImageTransform


def pool_regions(
    patch_tokens: Tensor,
    boxes: Tensor | Sequence[Tensor],
    transform: ImageTransform | Sequence[ImageTransform],
    output_size: int | tuple[int, int] = 7,
    reduce: Literal["mean", "max", None] = "mean",
) -> Tensor:
    """The features of boxes: RoIAlign (He et al. 2017) on the grid, as torchvision's with ``aligned=True``.

    Only the visible part of a box counts. A box outside it has the feature 0, and ``transform.visible_fraction(boxes)``
    is 0: leave it out. On a ``squash`` bank this equals EZ-HOI's pooling: boxes scaled to the input, and a
    `spatial_scale` of 14/224 or 24/336.

    Args:
        patch_tokens: (N, D) of one image, or (B, N, D) of several; on any device, of any float dtype. Gradients flow
            back to them.
        boxes: xyxy in original pixels: (K, 4) for one image; for several, a sequence of B, (K_b, 4) each.
        transform: how the image became the grid; for several, a sequence of B.
        output_size: bins a side, or (height, width).
        reduce: ``mean`` or ``max`` over the bins; None keeps them.

    Returns:
        (K, D), or (K, D, height, width) without `reduce`, in the tokens' dtype; K counts the boxes of all images, in
        order.

    Raises:
        ValueError: the numbers of images or the shapes do not match; boxes are not finite, or not xyxy.
    """
    if patch_tokens.ndim == 2:
        patch_tokens, boxes, transform = patch_tokens[None], [boxes], [transform]  # type: ignore[list-item]
    transforms = _of_each(transform, patch_tokens)
    if len(boxes) != len(transforms):
        raise ValueError(f"of {len(transforms)} images, as many sets of boxes are needed, not {len(boxes)}")
    if reduce not in ("mean", "max", None):
        raise ValueError(f"reduce is mean, max or None, not {reduce!r}")
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"output_size is a number of bins, or (height, width), not {output_size!r}")
    if not transforms:
        shape = () if reduce else size
        return patch_tokens.new_zeros(0, patch_tokens.shape[-1], *shape)
    # At least float32: float16 cannot represent fractions of pixels, and roi_align does not take bfloat16.
    exact = torch.promote_types(patch_tokens.dtype, torch.float32)
    tokens, grid = patch_tokens.to(exact), transforms[0].grid
    inside = [each.boxes_to_grid(each.clip(_boxes(box, tokens))) for each, box in zip(transforms, boxes, strict=True)]
    with torch.autocast(tokens.device.type, enabled=False):  # which would multiply in half precision
        pooled = _pooled(tokens, grid, inside, size, reduce)
    return pooled.to(patch_tokens.dtype)


def _of_each(transform: ImageTransform | Sequence[ImageTransform], patch_tokens: Tensor) -> list[ImageTransform]:
    """The transforms of (B, N, D) patch tokens. Raises ValueError if their number or their grid is another."""
    transforms = [transform] if isinstance(transform, ImageTransform) else list(transform)
    if (isinstance(transform, ImageTransform) and len(patch_tokens) != 1) or len(transforms) != len(patch_tokens):
        raise ValueError(f"of {len(patch_tokens)} images, as many transforms are needed, not {len(transforms)}")
    grids = {each.grid for each in transforms}
    if len(grids) > 1:
        raise ValueError(f"images of one model are needed, and these have grids of {sorted(grids)}")
    for rows, columns in grids:
        if patch_tokens.ndim != 3 or patch_tokens.shape[1] != rows * columns:
            raise ValueError(f"patch tokens (B, {rows * columns}, D) are needed, not {tuple(patch_tokens.shape)}")
    if not patch_tokens.is_floating_point():
        raise ValueError(f"patch tokens are floats, not {patch_tokens.dtype}")
    return transforms


def _boxes(boxes: Tensor, tokens: Tensor) -> Tensor:
    """(K, 4) in the tokens' dtype and on their device."""
    boxes = torch.as_tensor(boxes).to(tokens.device, tokens.dtype)
    if not boxes.numel():
        return boxes.reshape(0, 4)
    if boxes.shape != (len(boxes), 4):
        raise ValueError(f"boxes (K, 4) are needed, not {tuple(boxes.shape)}")
    if not boxes.isfinite().all():
        raise ValueError("boxes must be finite numbers")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("boxes are [x1, y1, x2, y2] in original pixels, and in some of these x2 < x1 or y2 < y1")
    return boxes


def _pooled(
    tokens: Tensor, grid: tuple[int, int], inside: list[Tensor], size: tuple[int, ...], reduce: str | None
) -> Tensor:
    rows, columns = _bin_weights(torch.cat(inside), grid, size)
    counts = [len(boxes) for boxes in inside]
    if reduce == "mean":
        weights = torch.split(_mean_weights(rows, columns), counts)
        return torch.cat([weight @ of_image for weight, of_image in zip(weights, tokens, strict=True)])
    pictures = tokens.reshape(len(tokens), *grid, -1)
    of_images = zip(torch.split(rows, counts), pictures, torch.split(columns, counts), strict=True)
    bins = torch.cat([torch.einsum("kir,rcd,kjc->kdij", *of_image) for of_image in of_images])
    return bins if reduce is None else bins.amax((2, 3))


def pooling_weights(boxes: Tensor, transform: ImageTransform) -> Tensor:
    """(K, N): the weight of each patch token in a box's feature from `pool_regions`; rows sum to 1, or to 0.

    Args:
        boxes: (K, 4), xyxy in original pixels.
        transform: how the image became the grid.
    """
    inside = transform.boxes_to_grid(transform.clip(boxes.to(torch.float32)))
    return _mean_weights(*_bin_weights(inside, transform.grid, (7, 7)))


def _mean_weights(rows: Tensor, columns: Tensor) -> Tensor:
    """(K, N): the weight of each patch in the mean over a box's bins: that mean is linear in the tokens."""
    return (rows.mean(1)[:, :, None] * columns.mean(1)[:, None, :]).flatten(1)


def _bin_weights(boxes: Tensor, grid: tuple[int, int], bins: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The weights of rows, (K, bins down, Gh), and of columns, (K, bins across, Gw), in the bins of K boxes.

    A bin's samples are all pairs of a row and a column, so a bin is the tokens times both.

    Args:
        boxes: (K, 4) xyxy on the grid, inside it.
    """
    rows = _sample_weights(boxes[:, 1], boxes[:, 3], grid[0], bins[0])
    return rows, _sample_weights(boxes[:, 0], boxes[:, 2], grid[1], bins[1])


def _sample_weights(first: Tensor, last: Tensor, cells: int, bins: int) -> Tensor:
    """(K, bins, cells): the mean of linear interpolation's weights over RoIAlign's samples along a side of K boxes."""
    first, last = (each[:, None, None] - 0.5 for each in (first, last))  # cells' centres become whole numbers
    count = ((last - first) / bins).ceil().clamp(min=0)  # of a bin; 0 along a side without length
    most = -(-cells // bins) + 1  # one more: rounding may make a box of all cells longer
    step, sample, centre = (torch.arange(each, device=first.device, dtype=first.dtype) for each in (bins, most, cells))
    place = first + (last - first) * (step[:, None] + (sample + 0.5) / count.clamp(min=1)) / bins
    near = 1 - (place.clamp(0, cells - 1)[..., None] - centre).abs()  # constant beyond the outermost centres
    taken = (sample < count)[..., None]
    return (near.clamp(min=0) * taken).sum(2) / count.clamp(min=1)


def global_context(patch_tokens: Tensor, transform: ImageTransform | Sequence[ImageTransform] | None = None) -> Tensor:
    """The mean over an image's patch tokens, EZ-HOI's feature of the whole image.

    Args:
        patch_tokens: (N, D), or (B, N, D).
        transform: of the image, or a sequence of B: patches that are mostly padding (`ImageTransform.valid`) do not
            count. None: all count.

    Returns:
        (D,), or (B, D).

    Raises:
        ValueError: the numbers of images or the shapes do not match.
    """
    if transform is None:
        return patch_tokens.mean(dim=-2)
    if patch_tokens.ndim == 2:
        return global_context(patch_tokens[None], transform)[0]
    transforms = _of_each(transform, patch_tokens)
    if not transforms:
        return patch_tokens.new_zeros(0, patch_tokens.shape[-1])
    masks = torch.stack([torch.from_numpy(each.valid.copy()).flatten() for each in transforms]).to(patch_tokens.device)
    exact = torch.promote_types(patch_tokens.dtype, torch.float32)
    total = (masks[..., None] * patch_tokens.to(exact)).sum(dim=1)
    return (total / masks.sum(1, keepdim=True)).to(patch_tokens.dtype)
