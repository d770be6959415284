"""Boxes: unions, and pairs as UPT and EZ-HOI form them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from patchbank import human_object_pairs, union_boxes


def iou(first: list[float], second: list[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inner = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return inner / (areas - inner)


def in_words(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, nms: float, least: int, most: int
) -> list[tuple[int, int]]:
    """The pairs, one detection at a time."""
    order = sorted(range(len(boxes)), key=lambda index: -float(scores[index]))
    left: list[int] = []
    for index in order:
        rivals = [other for other in left if labels[other] == labels[index]]
        if all(iou(boxes[index].tolist(), boxes[other].tolist()) <= nms for other in rivals):
            left.append(index)
    chosen: list[int] = []
    for human in (True, False):
        kind = [index for index in left if (int(labels[index]) == 0) == human]
        good = [index for index in kind if float(scores[index]) >= threshold]
        count = len(good)
        if count < least:
            good = kind[:least]
        chosen += good[:most]
    humans = [index for index in chosen if int(labels[index]) == 0]
    return [(human, other) for human in humans for other in chosen if other != human]


@pytest.mark.parametrize("seed", range(12))
def test_pairs_are_those_of_the_description(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    count = [0, 1, 5, 40, 60, 80][seed % 6]
    corners = torch.rand(count, 2, 2, generator=random).sort(dim=1).values
    boxes = (corners * 100).reshape(count, 4)
    scores = torch.rand(count, generator=random) ** (1 if seed < 6 else 8)  # few good ones, in the second half
    labels = torch.randint(0, 3, (count,), generator=random)
    pairs = human_object_pairs(boxes, scores, labels)
    assert list(zip(pairs.human.tolist(), pairs.object.tolist(), strict=True)) == in_words(
        boxes, scores, labels, 0.2, 0.5, 3, 15
    )
    other = human_object_pairs(
        boxes, scores, labels, score_threshold=0.6, nms_threshold=0.3, min_instances=1, max_instances=4
    )
    assert list(zip(other.human.tolist(), other.object.tolist(), strict=True)) == in_words(
        boxes, scores, labels, 0.6, 0.3, 1, 4
    )


def test_suppression_is_torchvisions() -> None:
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 1, 2, generator=random) * 100
    boxes = torch.cat([corners, corners + 20 + 40 * torch.rand(200, 1, 2, generator=random)], dim=1).reshape(200, 4)
    boxes[:2] = boxes[2:4, [0, 1, 0, 1]]  # without area
    scores, labels = torch.rand(200, generator=random), torch.randint(0, 3, (200,), generator=random)
    for threshold in (0.0, 0.3, 0.5, 1.0):
        pairs = human_object_pairs(
            *(boxes, scores, labels), score_threshold=0, nms_threshold=threshold, max_instances=200
        )
        assert pairs.object.unique().tolist() == sorted(batched_nms(boxes, scores, labels, threshold).tolist())


def test_humans_first_and_no_self_pairs() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([5, 1, 1])
    pairs = human_object_pairs(boxes, scores, labels, human_label=1)
    assert list(zip(pairs.human.tolist(), pairs.object.tolist(), strict=True)) == [(1, 2), (1, 0), (2, 1), (2, 0)]
    assert boxes[pairs.human].shape == (4, 4)
    nobody = human_object_pairs(boxes, scores, labels, human_label=3)
    assert nobody.human.shape == nobody.object.shape == (0,)
    assert nobody.human.dtype == torch.int64


def test_without_suppression_doubles_stay() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 2 + [[20, 0, 30, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1])
    assert len(human_object_pairs(boxes, scores, labels).human) == 1
    assert len(human_object_pairs(boxes, scores, labels, nms_threshold=None).human) == 4


def test_the_threshold_itself_is_enough() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    scores, labels = torch.tensor([0.5, 0.5, 0.25]), torch.tensor([0, 1, 1])
    pairs = human_object_pairs(boxes, scores, labels, score_threshold=0.5, min_instances=0)
    assert (pairs.human.tolist(), pairs.object.tolist()) == ([0], [1])


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        human_object_pairs(torch.zeros(1, 4), torch.tensor([float("nan")]), torch.zeros(1))
    with pytest.raises(ValueError, match="min_instances at most max_instances"):
        human_object_pairs(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1), min_instances=20)
    with pytest.raises(ValueError, match=r"boxes \(M, 4\), scores \(M,\) and labels \(M,\) are needed"):
        human_object_pairs(torch.zeros(3, 4), torch.zeros(2), torch.zeros(2))


def test_union_boxes() -> None:
    first = torch.tensor([[0.0, 10, 5, 20], [3, 3, 4, 4]])
    second = torch.tensor([[2.0, 8, 9, 12], [1, 1, 9, 9]])
    assert union_boxes(first, second).tolist() == [[0, 8, 9, 20], [1, 1, 9, 9]]
    assert union_boxes(first[:0], second[:0]).shape == (0, 4)
