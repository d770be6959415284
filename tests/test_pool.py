"""Regions: pooling against nested loops, against RoIAlign as EZ-HOI calls it, and a mark found where it was drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import roi_align

from patchbank import ImageTransform, Runner, global_context, pool_regions
from patchbank.config import ResizeMode
from patchbank.encoders.openai import OpenAISpec
from patchbank.encoders.openai.checkpoints import Checkpoint
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.features import GRID
from patchbank.files import sha256_of
from patchbank.preprocess import preprocess
from tests.reference import regions as reference
from tests.support import TINY, TINY_VOCABULARY

MODES: list[ResizeMode] = ["center-crop", "squash", "pad"]
SIZES = [(640, 427), (300, 500), (224, 224)]


def random_boxes(count: int, width: int, height: int, seed: int = 0, spill: float = 0.0) -> torch.Tensor:
    """(K, 4) float32, reaching out of the image by up to `spill` of its sides."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=random).sort(dim=1).values
    corners = corners * (1 + 2 * spill) - spill
    return (corners * torch.tensor([width, height])).reshape(count, 4)


def random_tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def roi_aligned(tokens: torch.Tensor, boxes: torch.Tensor, transform: ImageTransform, bins: object = 7) -> torch.Tensor:
    """The visible part of the boxes, pooled by torchvision: (K, D, height, width)."""
    grid = tokens.T.reshape(1, -1, *transform.grid)
    return roi_align(grid, [transform.boxes_to_grid(transform.clip(boxes))], bins, aligned=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_nested_loops_give_the_same(mode: ResizeMode, size: tuple[int, int]) -> None:
    transform = ImageTransform(*size, mode, (224, 224), 16)
    tokens = random_tokens(196, 6)
    boxes = random_boxes(12, *size, spill=0.2)
    grid = tokens.double().numpy().reshape(14, 14, 6)
    expected = np.stack([reference.pooled(grid, box, transform, 7) for box in boxes.double().numpy()])
    bins = pool_regions(tokens, boxes, transform, reduce=None)
    assert bins.shape == (12, 6, 7, 7)
    assert np.abs(bins.numpy() - expected).max() <= 1e-5
    assert np.abs(pool_regions(tokens, boxes, transform).numpy() - expected.mean((2, 3))).max() <= 1e-5
    assert np.abs(pool_regions(tokens, boxes, transform, reduce="max").numpy() - expected.max((2, 3))).max() <= 1e-5
    three = np.stack([reference.pooled(grid, box, transform, 3) for box in boxes.double().numpy()])
    assert np.abs(pool_regions(tokens, boxes, transform, 3, None).numpy() - three).max() <= 1e-5


@pytest.mark.parametrize(("input_size", "patch_size"), [(224, 16), (336, 14)])
def test_a_squashed_bank_is_pooled_as_ez_hoi_pools(input_size: int, patch_size: int) -> None:
    side, (width, height) = input_size // patch_size, (640, 427)
    tokens = random_tokens(side * side, 8)
    boxes = random_boxes(20, width, height)
    squashed = boxes * torch.tensor([input_size / width, input_size / height] * 2)
    grid = tokens.T.reshape(1, 8, side, side)
    expected = roi_align(grid, [squashed], (7, 7), spatial_scale=side / input_size, aligned=True).flatten(2).mean(-1)
    found = pool_regions(tokens, boxes, ImageTransform(width, height, "squash", (input_size, input_size), patch_size))
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("bins", [1, 2, 7, 16, (3, 9)])
@pytest.mark.parametrize("side", [7, 14, 24])
def test_bins_and_their_mean_are_roi_aligns(bins: int | tuple[int, int], side: int) -> None:
    transform = ImageTransform(640, 427, "squash", (side * 16, side * 16), 16)
    tokens, boxes = random_tokens(side * side, 8), random_boxes(40, 640, 427)
    boxes[0] = torch.tensor([0, 0, 640, 427])
    boxes[1] = torch.tensor([3, 3, 3.5, 3.2])
    expected = roi_aligned(tokens, boxes, transform, bins)
    assert (pool_regions(tokens, boxes, transform, bins, reduce=None) - expected).abs().max() <= 1e-5
    found = pool_regions(tokens, boxes, transform, bins)
    assert (found - expected.mean((2, 3))).abs().max() <= 1e-5
    alone = torch.cat([pool_regions(tokens, box[None], transform, bins) for box in boxes])
    assert (found - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_of_equal_patches_is_theirs_whatever_rounding_does(mode: ResizeMode) -> None:
    tokens = torch.ones(196, 2)
    for width in range(101, 701, 7):
        transform = ImageTransform(width, 427, mode, (224, 224), 16)
        boxes = torch.tensor([[0, 0, width, 427], [-5, -5, width + 5, 430], [width / 3, 142, width / 2, 284]])
        assert torch.allclose(pool_regions(tokens, boxes, transform), torch.ones(3, 2), atol=1e-5)


def test_gradients_are_roi_aligns() -> None:
    transform, boxes = ImageTransform(640, 427, "pad", (224, 224), 16), random_boxes(6, 640, 427)
    mean, bins, theirs = (random_tokens(196, 4).requires_grad_() for _ in range(3))
    weights = random_tokens(6, 4, seed=1)
    (pool_regions(mean, boxes, transform) * weights).sum().backward()
    (pool_regions(bins, boxes, transform, reduce=None).mean((2, 3)) * weights).sum().backward()
    (roi_aligned(theirs, boxes, transform).mean((2, 3)) * weights).sum().backward()
    assert theirs.grad is not None
    for found in (mean.grad, bins.grad):
        assert found is not None and (found - theirs.grad).abs().max() <= 1e-6


def test_a_batch_is_its_images_one_by_one() -> None:
    transforms = [ImageTransform(*size, mode, (224, 224), 16) for size, mode in zip(SIZES, MODES, strict=True)]
    tokens = random_tokens(3, 196, 5)
    boxes = [random_boxes(count, *size, seed=count) for count, size in zip((4, 0, 2), SIZES, strict=True)]
    together = pool_regions(tokens, boxes, transforms)
    assert together.shape == (6, 5)
    alone = [pool_regions(*each) for each in zip(tokens, boxes, transforms, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert pool_regions(tokens[0], torch.zeros(0, 4), transforms[0]).shape == (0, 5)


def test_what_the_model_did_not_see_is_nothing_and_not_invented() -> None:
    transform = ImageTransform(640, 224, "center-crop", (224, 224), 16)  # it saw x from 208 to 432
    tokens = random_tokens(196, 4)
    boxes = torch.tensor([[0.0, 0, 208, 224], [450, 10, 640, 100], [100, 50, 250, 150], [208, 50, 250, 150]])
    pooled = pool_regions(tokens, boxes, transform)
    assert torch.equal(pooled[:2], torch.zeros(2, 4))
    no_boxes = torch.tensor([[250.0, 50, 250, 150], [300, 50, 350, 50], [-9, -9, -5, -5]])
    for way in ("mean", "max"):
        assert torch.equal(pool_regions(tokens, no_boxes, transform, reduce=way), torch.zeros(3, 4))  # type: ignore[arg-type]
    assert torch.equal(pooled[2], pooled[3])  # of a box that leaves the crop counts what is in it
    assert pooled[2].abs().sum() > 0
    assert transform.visible_fraction(boxes).tolist() == pytest.approx([0, 0, 42 / 150, 1])


def test_gradients_lead_back_to_the_tokens_and_only_where_boxes_are() -> None:
    transform = ImageTransform(224, 224, "squash", (224, 224), 16)
    tokens = random_tokens(196, 3).requires_grad_()
    pool_regions(tokens, torch.tensor([[32.0, 32, 96, 96]]), transform).sum().backward()
    assert tokens.grad is not None
    touched = tokens.grad.abs().sum(1).reshape(14, 14).nonzero()
    assert touched.min() >= 1 and touched.max() <= 6
    assert float(tokens.grad.sum()) == pytest.approx(3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    transform = ImageTransform(640, 427, "squash", (224, 224), 16)
    tokens, boxes = random_tokens(196, 4, dtype=dtype), random_boxes(5, 640, 427)
    found = pool_regions(tokens, boxes, transform)
    assert found.dtype == dtype
    expected = pool_regions(tokens.float(), boxes, transform)
    assert torch.allclose(found.float(), expected, atol=1e-2)
    whole = pool_regions(tokens.float(), boxes.round().long(), transform)
    assert torch.equal(whole, pool_regions(tokens.float(), boxes.round(), transform))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_gives_the_same() -> None:
    transform, tokens, boxes = (
        ImageTransform(640, 427, "squash", (224, 224), 16),
        random_tokens(196, 8),
        random_boxes(9, 640, 427),
    )
    found = pool_regions(tokens.cuda(), boxes.cuda(), transform)
    assert found.is_cuda
    assert torch.allclose(found.cpu(), pool_regions(tokens, boxes, transform), atol=1e-5)
    pad = ImageTransform(640, 427, "pad", (224, 224), 16)
    assert torch.allclose(global_context(tokens.cuda(), pad).cpu(), global_context(tokens, pad), atol=1e-5)


def test_what_does_not_fit_together() -> None:
    transform = ImageTransform(640, 427, "squash", (224, 224), 16)
    tokens, boxes = random_tokens(2, 196, 4), [random_boxes(1, 640, 427)] * 2
    with pytest.raises(ValueError, match="of 2 images, as many transforms are needed, not 1"):
        pool_regions(tokens, boxes, transform)
    with pytest.raises(ValueError, match="of 2 images, as many transforms are needed, not 1"):
        global_context(tokens, transform)
    with pytest.raises(ValueError, match="of 1 images, as many transforms are needed, not 2"):
        global_context(tokens[0], [transform] * 2)
    with pytest.raises(ValueError, match="images of one model are needed"):
        pool_regions(tokens, boxes, [transform, ImageTransform(640, 427, "squash", (224, 224), 32)])
    for way in ("mean", "max", None):
        with pytest.raises(ValueError, match="boxes must be finite numbers"):
            pool_regions(tokens[0], torch.tensor([[0, float("nan"), 9, 9]]), transform, reduce=way)  # type: ignore[arg-type]
        assert len(pool_regions(tokens[:0], [], [], reduce=way)) == 0  # type: ignore[arg-type]
        assert len(pool_regions(tokens[0], torch.tensor([]), transform, reduce=way)) == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x2 < x1"):
        pool_regions(tokens[0], torch.tensor([[0.5, 0.5, 0.2, 0.2]]), transform)  # centre and size, 0 to 1
    for wrong in (0, (7,), (7, -1)):
        with pytest.raises(ValueError, match="output_size is a number of bins"):
            pool_regions(tokens[0], boxes[0], transform, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patch tokens are floats"):
        pool_regions(tokens[0].long(), boxes[0], transform)
    with pytest.raises(ValueError, match="of 2 images, as many sets of boxes are needed"):
        pool_regions(tokens, boxes[:1], [transform] * 2)
    with pytest.raises(ValueError, match=r"\(B, 196, D\) are needed, not \(1, 195, 4\)"):
        pool_regions(tokens[0, 1:], boxes[0], transform)
    with pytest.raises(ValueError, match="reduce is mean, max or None"):
        pool_regions(tokens[0], boxes[0], transform, reduce="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"boxes \(K, 4\)"):
        pool_regions(tokens[0], torch.zeros(4), transform)


def test_autocast_changes_nothing() -> None:
    transform, tokens, boxes = (
        ImageTransform(640, 427, "squash", (224, 224), 16),
        random_tokens(196, 8),
        random_boxes(9, 640, 427),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pool_regions(tokens, boxes, transform)
        context = global_context(tokens, transform)
    assert torch.equal(found, pool_regions(tokens, boxes, transform))
    assert torch.equal(context, global_context(tokens, transform))


def test_lists_and_arrays_are_boxes_too() -> None:
    transform, tokens = ImageTransform(640, 427, "squash", (224, 224), 16), random_tokens(196, 8)
    box = [[10.0, 20.0, 300.0, 200.0]]
    expected = pool_regions(tokens, torch.tensor(box), transform)
    assert torch.equal(pool_regions(tokens, np.array(box), transform), expected)  # type: ignore[arg-type]
    assert torch.equal(pool_regions(tokens, box, transform), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (10000, 3)])
def test_the_context_of_a_thread_is_that_of_the_patches_it_touches(size: tuple[int, int]) -> None:
    transform = ImageTransform(*size, "pad", (224, 224), 16)
    assert 14 <= transform.valid.sum() <= 28
    assert torch.allclose(global_context(torch.ones(196, 2), transform), torch.ones(2))


def test_global_context_is_the_mean_of_what_shows_the_image() -> None:
    tokens = random_tokens(2, 196, 5)
    assert torch.equal(global_context(tokens), tokens.mean(1))
    assert torch.equal(global_context(tokens[0]), tokens[0].mean(0))
    pad, squash = ImageTransform(640, 320, "pad", (224, 224), 16), ImageTransform(640, 320, "squash", (224, 224), 16)
    grid = tokens.reshape(2, 14, 14, 5)
    # Of 14 rows the picture takes 7: the fourth and the eleventh show it by half, and half is enough for one of them.
    expected = torch.stack([grid[0, 3:10].mean((0, 1)), grid[1].mean((0, 1))])
    assert pad.valid.sum() == 7 * 14
    rows = np.flatnonzero(pad.valid[:, 0])
    expected[0] = grid[0, rows].mean((0, 1))
    assert torch.allclose(global_context(tokens, [pad, squash]), expected, atol=1e-6)
    assert torch.allclose(global_context(tokens[0], pad), expected[0], atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("size", "place"), [((640, 480), (0.3, 0.2)), ((480, 640), (0.55, 0.6)), ((400, 400), (0.1, 0.7))]
)
def test_a_mark_is_found_by_pooling_where_it_was_drawn(
    mode: ResizeMode, size: tuple[int, int], place: tuple[float, float], tmp_path: Path
) -> None:
    # The tiny model, with a grid fine enough to look for something on: 12 x 12.
    model = replace(TINY, name="fine", input_size=96)
    write_untrained(model, tmp_path / "fine.pt", vocabulary=TINY_VOCABULARY)
    spec = OpenAISpec(model, checkpoint=Checkpoint(tmp_path / "fine.pt", sha256_of(tmp_path / "fine.pt")))
    runner = Runner(spec, torch.device("cpu"), batch_size=2)
    wanted = replace(spec.input, resize=mode)
    transform = wanted.transform(size)
    left, top, right, bottom = transform.visible
    x, y = left + place[0] * (right - left), top + place[1] * (bottom - top)
    box = torch.tensor([x, y, x + 0.25 * (right - left), y + 0.2 * (bottom - top)]).round()
    plain = Image.new("RGB", size, (90, 110, 100))
    marked = plain.copy()
    x1, y1, x2, y2 = box.int().tolist()
    ImageDraw.Draw(marked).rectangle((x1, y1, x2 - 1, y2 - 1), fill=(255, 40, 20))
    pixels = np.stack([preprocess(image, wanted) for image in (plain, marked)])
    tokens = runner(torch.from_numpy(pixels))[GRID]
    # Windows of the box's size all over what the model saw, the box among them: it differs most in the box.
    shifts = [
        torch.tensor([dx, dy, dx, dy])
        for dx in np.linspace(left - x1, right - x2, 9)
        for dy in np.linspace(top - y1, bottom - y2, 9)
    ]
    windows = torch.stack([box, *(box + shift for shift in shifts)]).float()
    before, after = (pool_regions(each, windows, transform) for each in tokens)
    differences = (after - before).norm(dim=1)
    best = windows[differences.argmax()]
    # A window's own size is less than a step: the best one is the box, or its nearest neighbour.
    assert torch.maximum((best - box).abs()[0] / (right - left), (best - box).abs()[1] / (bottom - top)) <= 0.08
    far = windows[(windows[:, 0] >= x2) | (windows[:, 2] <= x1) | (windows[:, 1] >= y2) | (windows[:, 3] <= y1)]
    elsewhere = (pool_regions(tokens[1], far, transform) - pool_regions(tokens[0], far, transform)).norm(dim=1)
    assert differences[0] > 1.5 * elsewhere.max()
