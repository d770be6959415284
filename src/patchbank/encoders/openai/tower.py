"""CLIP's vision transformer, from pixels to projected patch tokens, with as little work per batch as possible.

The same function as ``VisionTransformer`` in OpenAI's ``clip/model.py``, with ``ln_post`` and ``proj`` applied to every
token as EZ-HOI's fork does. With GELU it is LAION's and DataComp's (open_clip's class of that name). What does not
depend on the image is computed once, in float64, when the tower is built:

- (p - mean) / std, for pixels p of 0..255, is folded into the patch embedding. Only the mean's whole number of each
  colour is subtracted from the pixels: the rest is small, and whole numbers are exact in every dtype;
- [CLS] and the patch embedding's share of the mean are folded into the positional embedding;
- QuickGELU, x sigmoid(1.702 x), is silu(1.702 x) / 1.702: both factors are folded into the layers around it (GELU,
  x Phi(x), stays as it is: oneDNN fuses it into the layer before);
- the attention's factor, 1 / sqrt(64), is folded into the queries (it is a power of two, so nothing is rounded).

bfloat16 and float16 are for the matrix products and the attention only; the residual stream and the norms stay in
float32, which costs nothing measurable and leaves two thirds of the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchbank.config import Activation
from patchbank.encoders.openai.registry import HEAD, MEAN, STD, Model
from patchbank.encoders.packed import Linear

_QUICK = 1.702  # QuickGELU's factor
_SCORE_BYTES = 4 << 20  # of attention scores at a time: about a core's cache


class Norm(nn.Module):
    """Layer normalisation in float32; rounds its output to `dtype`."""

    def __init__(self, parameters: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(parameters[f"{name}.weight"], requires_grad=False)
        self.bias = nn.Parameter(parameters[f"{name}.bias"], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) float32 -> (..., width)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias).to(self.dtype)


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, parameters: Mapping[str, Tensor], name: str, activation: Activation, dtype: torch.dtype) -> None:
        super().__init__()
        p = {key.removeprefix(name): value for key, value in parameters.items() if key.startswith(name)}
        width = p["attn.out_proj.bias"].numel()
        scale = torch.ones(3 * width, dtype=torch.float64)
        scale[:width] = HEAD**-0.5
        self.ln_1, self.ln_2 = Norm(p, "ln_1", dtype), Norm(p, "ln_2", dtype)
        self.qkv = Linear(p["attn.in_proj_weight"] * scale[:, None], p["attn.in_proj_bias"] * scale, dtype)
        self.out = Linear(p["attn.out_proj.weight"], p["attn.out_proj.bias"], dtype)
        quick = activation == "quickgelu"
        factor = _QUICK if quick else 1.0
        self.fc = Linear(
            p["mlp.c_fc.weight"].double() * factor,
            p["mlp.c_fc.bias"].double() * factor,
            dtype,
            activation="silu" if quick else "gelu",
        )
        self.proj = Linear(p["mlp.c_proj.weight"].double() / factor, p["mlp.c_proj.bias"], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, width) float32 -> the same. Overwrites `x`."""
        x = self.out(attention(self.qkv(self.ln_1(x))), x)
        out: Tensor = self.proj(self.fc(self.ln_2(x)), x)
        return out


def attention(qkv: Tensor) -> Tensor:
    """Multi-head self-attention; the queries are already scaled.

    (B, T, 3 width): the heads' queries, keys and values -> (B, T, width).
    """
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    qkv = qkv.view(batch, tokens, 3, width // HEAD, HEAD)
    if qkv.device.type == "cpu" and qkv.dtype != torch.float32:
        return _attention_on_cpu(qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # (B, heads, T, 64)
    return x.transpose(1, 2).reshape(batch, tokens, width)


def _attention_on_cpu(qkv: Tensor) -> Tensor:
    """Batched products of a few images at a time, so that the scores stay in the cache.

    In bfloat16 this takes half as long as torch's `scaled_dot_product_attention` (``python -m benchmarks.encoder``).
    """
    batch, tokens, _, heads, _ = qkv.shape
    images = max(1, _SCORE_BYTES // (heads * tokens * tokens * qkv.itemsize))
    out = qkv.new_empty(batch, tokens, heads, HEAD)
    for first in range(0, batch, images):
        q, k, v = qkv[first : first + images].permute(2, 0, 3, 1, 4).reshape(3, -1, tokens, HEAD)
        x = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)  # (images * heads, T, 64)
        out[first : first + images] = x.view(-1, heads, tokens, HEAD).transpose(1, 2)
    return out.view(batch, tokens, heads * HEAD)


class VisionTransformer(nn.Module):
    """CLIP's image tower."""

    whole: Tensor
    positions: Tensor

    def __init__(
        self, model: Model, parameters: Mapping[str, Tensor], activation: Activation, dtype: torch.dtype
    ) -> None:
        """Make the tower of the parameters of `checkpoints.load_visual`, to compute in `dtype`; on the CPU."""
        super().__init__()
        self.patch_size = model.patch_size
        std = torch.tensor(STD).double().view(3, 1, 1)  # as float32 has them: OpenAI's loader divides in float32
        mean = 255 * torch.tensor(MEAN).double().view(3, 1, 1)
        whole = mean.round()
        conv = parameters["conv1.weight"] / (255 * std)  # (width, 3, p, p)
        positions = parameters["positional_embedding"].double()
        positions[0] += parameters["class_embedding"]
        positions[1:] += (conv * (whole - mean)).sum((1, 2, 3))
        self.register_buffer("whole", whole.flatten().to(dtype), persistent=False)
        self.register_buffer("positions", positions.float(), persistent=False)
        self.embed = Linear(conv.permute(0, 2, 3, 1).flatten(1), None, dtype)
        self.ln_pre, self.ln_post = Norm(parameters, "ln_pre", torch.float32), Norm(parameters, "ln_post", dtype)
        names = (f"transformer.resblocks.{layer}." for layer in range(model.layers))
        self.blocks = nn.ModuleList(Block(parameters, name, activation, dtype) for name in names)
        self.proj = Linear(parameters["proj"].t(), None, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """All tokens of a batch of images.

        Args:
            pixels: (B, n, n, 3) uint8 RGB on the tower's device.

        Returns:
            (B, 1 + N, D) in the tower's dtype: [CLS], then the row-major patch tokens, all after ``ln_post`` and
            ``proj``, not normalised to unit length.
        """
        x = self.embed(self._patches(pixels))  # (B, N, width)
        x = F.pad(x, (0, 0, 1, 0)) + self.positions  # float32 from here on
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.proj(self.ln_post(x))
        return out

    def _patches(self, pixels: Tensor) -> Tensor:
        """(B, n, n, 3) uint8 -> (B, N, p * p * 3), one row per patch."""
        batch, n, patch = pixels.shape[0], pixels.shape[1], self.patch_size
        x = pixels.to(self.whole.dtype).sub_(self.whole)
        side = n // patch
        return x.view(batch, side, patch, side, patch, 3).transpose(2, 3).reshape(batch, side * side, -1)

    def pack(self, batch_size: int) -> Self:
        """The tower itself, with every layer's weights packed for batches of about this size, if oneDNN can."""
        rows = batch_size * self.positions.shape[0]
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.pack(rows)
        return self
