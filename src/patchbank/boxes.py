"""Boxes, xyxy: unions, and the human-object pairs among detections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def union_boxes(boxes_h: Tensor, boxes_o: Tensor) -> Tensor:
    """(..., 4): the smallest box around each pair of boxes (..., 4) and (..., 4), in their frame."""
    first = torch.minimum(boxes_h[..., :2], boxes_o[..., :2])
    last = torch.maximum(boxes_h[..., 2:], boxes_o[..., 2:])
    return torch.cat([first, last], dim=-1)


class HumanObjectPairs(NamedTuple):
    """Pairs among the detections of one image.

    Attributes:
        human, object: (P,) int64, indices of the given detections: ``boxes[pairs.human]`` is (P, 4).
    """

    human: Tensor
    object: Tensor


def human_object_pairs(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    human_label: int = 0,
    score_threshold: float = 0.2,
    nms_threshold: float | None = 0.5,
    min_instances: int = 3,
    max_instances: int = 15,
) -> HumanObjectPairs:
    """Every human with everything else, as UPT and EZ-HOI form pairs; a second human is an object too.

    Humans come first, then objects, each by descending score; pairs are ordered by their human, then by their object.

    Args:
        boxes: (M, 4) xyxy, the detections in one image.
        scores: (M,).
        labels: (M,) integers.
        human_label: the label of a person.
        score_threshold: the least score, except for the best `min_instances`.
        nms_threshold: of two boxes with one label and a greater overlap (intersection over union), only the better one
            counts; None keeps all.
        min_instances, max_instances: the least (if there are so many) and greatest number of humans to keep, and of
            objects.

    Raises:
        ValueError: the shapes do not match, a score is not finite, or `min_instances` is greater than `max_instances`.
    """
    if boxes.shape != (len(boxes), 4) or scores.shape != labels.shape or scores.shape != (len(boxes),):
        raise ValueError(
            f"boxes (M, 4), scores (M,) and labels (M,) are needed, not {tuple(boxes.shape)}, {tuple(scores.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if not scores.isfinite().all() or not 0 <= min_instances <= max_instances:
        raise ValueError("scores must be finite numbers, and min_instances at most max_instances")
    order = scores.argsort(descending=True, stable=True)
    if nms_threshold is not None:
        order = order[_unsuppressed(boxes[order], labels[order], nms_threshold)]
    is_human = labels[order] == human_label
    kept: list[Tensor] = []
    for of_kind in (order[is_human], order[~is_human]):
        above = int((scores[of_kind] >= score_threshold).sum())
        kept.append(of_kind[: min(max(above, min_instances), max_instances)])
    instances = torch.cat(kept)
    humans, count = len(kept[0]), len(instances)
    human = torch.arange(humans, device=boxes.device).repeat_interleave(count)
    other = torch.arange(count, device=boxes.device).repeat(humans)
    different = human != other
    return HumanObjectPairs(instances[human[different]], instances[other[different]])


def _unsuppressed(boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """(M,) bool: which of the boxes, (M, 4) and the best first, overlap no better one of their label that is kept.

    Non-maximum suppression as torchvision's `batched_nms`, whose package would pin torch's version.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    first = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    last = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    both = (last - first).clamp(min=0).prod(2)  # (M, M)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    rivals = (both / (area[:, None] + area - both) > threshold) & (labels[:, None] == labels)
    rivals, kept = rivals.triu(1).cpu(), torch.ones(len(boxes), dtype=torch.bool)
    for box, worse in enumerate(rivals):
        if kept[box]:
            kept &= ~worse
    return kept.to(boxes.device)
