"""Features of regions: patch tokens pooled over boxes, and over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import roi_align

from patchbank.geometry import ImageTransform


def pool_regions(
    patch_tokens: Tensor,
    boxes: Tensor | Sequence[Tensor],
    transform: ImageTransform | Sequence[ImageTransform],
    output_size: int | tuple[int, int] = 7,
    reduce: Literal["mean", "max", None] = "mean",
) -> Tensor:
    """The features of boxes: RoIAlign (He et al. 2017, aligned, of as many samples as a bin has patches) on the grid.

    Of each box counts the part that the model saw. A box of which it saw nothing has the feature 0: its
    ``transform.coverage(boxes)`` is 0, and it is to be left out of what is made of it. On a ``squash`` bank this is
    what EZ-HOI pools: boxes brought to the input's size, and a `spatial_scale` of 14/224 or 24/336.

    Args:
        patch_tokens: (N, D) of one image, or (B, N, D) of several; on any device, of any float dtype. Gradients lead
            back to them.
        boxes: xyxy in original pixels: (K, 4) of one image; of several, B of them, (K_b, 4) each.
        transform: how the image became the grid; of several, B of them.
        output_size: bins a side, or (height, width).
        reduce: ``mean`` or ``max`` over the bins; None leaves them.

    Returns:
        (K, D), or (K, D, height, width) without `reduce`, in the tokens' dtype; K is that of all images together, in
        order.

    Raises:
        ValueError: the numbers of images, or the shapes, do not fit together.
    """
    if patch_tokens.ndim == 2:
        patch_tokens, boxes, transform = patch_tokens[None], [boxes], [transform]  # type: ignore[list-item]
    if isinstance(transform, ImageTransform) or not len(patch_tokens) == len(boxes) == len(transform):
        raise ValueError(
            f"of {len(patch_tokens)} images, as many sets of boxes and transforms are needed, not {len(boxes)} and "
            f"{1 if isinstance(transform, ImageTransform) else len(transform)}"
        )
    if wrong := [tuple(each.shape) for each in boxes if each.shape != (len(each), 4)]:
        raise ValueError(f"boxes (K, 4) are needed, not {wrong[0]}")
    if reduce not in ("mean", "max", None):
        raise ValueError(f"reduce is mean, max or None, not {reduce!r}")
    # Boxes in float32 at least: float16 has no room for pixels and their fractions.
    own = [each.to(patch_tokens.device, torch.promote_types(each.dtype, torch.float32)) for each in boxes]
    grids = _grids(patch_tokens, transform[0].grid)
    # roi_align takes no bfloat16, and wants boxes of the tokens' dtype.
    exact = torch.promote_types(patch_tokens.dtype, torch.float32)
    inside = [each.boxes_to_grid(each.clip(box)).to(exact) for each, box in zip(transform, own, strict=True)]
    bins = roi_align(grids.to(exact), inside, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=True)
    seen = torch.cat([each.coverage(box) for each, box in zip(transform, own, strict=True)]) > 0
    pooled = bins if reduce is None else bins.mean((2, 3)) if reduce == "mean" else bins.amax((2, 3))
    seen = seen.view(-1, *[1] * (pooled.ndim - 1))
    return torch.where(seen, pooled, 0.0).to(patch_tokens.dtype)


def global_context(patch_tokens: Tensor, transform: ImageTransform | Sequence[ImageTransform] | None = None) -> Tensor:
    """The mean over an image's patch tokens, as EZ-HOI takes it for the whole image.

    Args:
        patch_tokens: (N, D), or (B, N, D).
        transform: of the image, or B of them: patches that are mostly padding (`ImageTransform.valid`) do not count.
            None: all count.

    Returns:
        (D,), or (B, D).
    """
    if transform is None:
        return patch_tokens.mean(dim=-2)
    transforms = [transform] if isinstance(transform, ImageTransform) else transform
    masks = torch.stack([torch.from_numpy(each.valid.copy()).flatten() for each in transforms])
    weights = (masks / masks.sum(1, keepdim=True)).to(patch_tokens)
    if patch_tokens.ndim == 2:
        weights = weights[0]
    return (weights[..., None] * patch_tokens).sum(dim=-2)


def _grids(patch_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, D) row-major to (B, D, Gh, Gw)."""
    if patch_tokens.ndim != 3 or patch_tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"patch tokens (B, {grid[0] * grid[1]}, D) are needed, not {tuple(patch_tokens.shape)}")
    return patch_tokens.transpose(1, 2).reshape(len(patch_tokens), -1, *grid)
