"""Dense variants of CLIP's last block: its weights, but another attention, for patch tokens that localise better.

With x the last block's input, q, k, v of ``ln_1(x)`` and s = 1 / sqrt(head width), the patch tokens are, before
``ln_post`` and ``proj``:

- ``maskclip`` (MaskCLIP, arXiv 2112.01071): y = x + out(v), then y + mlp(ln_2(y));
- ``sclip`` (SCLIP, arXiv 2312.01597): the same with (softmax(s q qᵀ) + softmax(s k kᵀ)) v instead of v;
- ``clearclip`` (ClearCLIP, arXiv 2407.12442): out(softmax(s q qᵀ) v), without residual and MLP;
- ``naclip`` (NACLIP, arXiv 2404.08181): out(softmax(s k kᵀ + g) v), likewise, where g is a Gaussian of the distance of
  two patches, of sigma 5 patches and height 1; it is 0 where [CLS] takes part.

[CLS] is among the keys, as in the references, but has no variant itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbank.encoders.attention import attention

if TYPE_CHECKING:
    from patchbank.encoders.tower import Block

_SIGMA = 5.0  # of NACLIP's Gaussian, in patches


def dense(name: str, block: Block, x: Tensor, q: Tensor, k: Tensor, v: Tensor, nearness: Tensor | None) -> Tensor:
    """The patch tokens of a variant of a block: (B, N, width) float32.

    Args:
        x: (B, 1 + N, width) float32, the block's input; it is left alone.
        q, k, v: of the block's attention, (B, heads, 1 + N, head width); the queries are times `block.scale`.
        nearness: for ``naclip``, that of the patches.
    """
    by_queries, by_keys = 1 / block.scale, block.scale
    if name == "maskclip":
        mixed = v[:, :, 1:].transpose(1, 2).flatten(2)
    elif name == "sclip":
        mixed = attention(q[:, :, 1:], q, v, by_queries) + attention(k[:, :, 1:], k, v, by_keys)
    elif name == "clearclip":
        mixed = attention(q[:, :, 1:], q, v, by_queries)
    else:
        mixed = attention(k[:, :, 1:], k, v, by_keys, nearness)
    tokens: Tensor = block(x[:, 1:].clone(), mixed) if name in ("maskclip", "sclip") else block.out(mixed).float()
    return tokens


def gaussian(grid: tuple[int, int]) -> Tensor:
    """NACLIP's nearness of patches, (N, 1 + N) float32: exp(-d² / 2 sigma²) of two at distance d; 0 for [CLS]."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    distances = (places[:, None] - places).square().sum(-1)
    return F.pad(torch.exp(-distances / (2 * _SIGMA**2)), (1, 0))
