"""The dense variants of CLIP's last block, in plain lines: image by image, head by head, patch by patch."""

from __future__ import annotations

from math import exp

import torch
from torch import Tensor, nn


def patch_tokens(name: str, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A variant's patch tokens (N, width) of the block's input x (1 + N, width); `block`: OpenAI's or open_clip's."""
    attention = block.attn
    q, k, v = (block.ln_1(x) @ attention.in_proj_weight.t() + attention.in_proj_bias).chunk(3, dim=1)
    heads, mixed = attention.num_heads, torch.empty_like(v)
    width = v.shape[1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        qq, kk = (each[:, part] @ each[:, part].t() / width**0.5 for each in (q, k))
        if name == "naclip":
            for i in range(grid[0] * grid[1]):
                for j in range(grid[0] * grid[1]):
                    down, right = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
                    kk[1 + i, 1 + j] += exp(-(down**2 + right**2) / (2 * 5**2))
        weights = {
            "maskclip": torch.eye(len(x)),
            "sclip": qq.softmax(1) + kk.softmax(1),
            "clearclip": qq.softmax(1),
            "naclip": kk.softmax(1),
        }[name]
        mixed[:, part] = weights @ v[:, part]
    y = attention.out_proj(mixed)
    if name in ("maskclip", "sclip"):
        y = x + y
        y = y + block.mlp(block.ln_2(y))
    return y[1:]
