"""CLIP's vision transformer, from pixels to projected patch tokens.

The same computation as ``VisionTransformer`` in OpenAI's ``clip/model.py``, with ``ln_post`` and ``proj`` applied to
every token as EZ-HOI's fork does, and with each layer as one fused product. Parameters keep OpenAI's names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchbank.models import MEAN, STD, Model


class Attention(nn.Module):
    """Multi-head self-attention with one product for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        batch, tokens, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, width / heads)
        out: Tensor = self.out_proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return out


class MLP(nn.Module):
    """Two linear layers with QuickGELU, x * sigmoid(1.702 x), between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        x = self.c_fc(x)
        out: Tensor = self.c_proj(torch.sigmoid(1.702 * x).mul_(x))
        return out


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, width) -> (B, T, width)."""
        out: Tensor = self.resblocks(x)
        return out


class VisionTransformer(nn.Module):
    """CLIP's image tower of one model; parameters are not initialised, see `build`."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        width = model.width
        self.conv1 = nn.Conv2d(3, width, model.patch_size, model.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(model.tokens + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, model.layers, model.heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, model.output_dim))
        # Kept in float32 whatever the compute precision: pixels are normalised before they are rounded.
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("std", None, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """All tokens of a batch of images.

        Args:
            pixels: (B, n, n, 3) uint8 RGB on the module's device.

        Returns:
            (B, 1 + N, D) in the module's dtype: [CLS], then the row-major patch tokens, all after ``ln_post`` and
            ``proj``, not normalised to unit length.
        """
        # The steps of ToTensor and Normalize, in their order, so that the numbers are theirs to the last bit.
        x = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        x = self.conv1(x.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (B, N, width)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1).add_(self.positional_embedding)
        x = self.transformer(self.ln_pre(x))
        out: Tensor = self.ln_post(x) @ self.proj
        return out


def build(model: Model, parameters: Mapping[str, Tensor]) -> VisionTransformer:
    """The tower with these parameters (as `weights.load_visual` gives them), float32, on the CPU, for inference."""
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        tower = VisionTransformer(model)
    tower.load_state_dict(dict(parameters), strict=True, assign=True)
    tower.mean = torch.tensor(MEAN).view(3, 1, 1)
    tower.std = torch.tensor(STD).view(3, 1, 1)
    return tower.eval().requires_grad_(False)
