"""CLIP's vision transformer, from pixels to projected patch tokens, with as little work per batch as possible.

The same function as ``VisionTransformer`` in OpenAI's ``clip/model.py`` and in open_clip, with ``ln_post`` and ``proj``
applied to every token as EZ-HOI's fork of the former does. What does not depend on the image is computed once, in
float64, when the tower is built:

- (p - mean) / std, for pixels p of 0..255, is folded into the patch embedding. Only the mean's whole number of each
  colour is subtracted from the pixels: the rest is small, and whole numbers are exact in every dtype;
- [CLS] and the patch embedding's share of the mean are folded into the positional embedding;
- QuickGELU, x sigmoid(1.702 x), is silu(1.702 x) / 1.702: both factors are folded into the layers around it (GELU,
  x Phi(x), stays as it is: oneDNN fuses it into the layer before);
- the attention's factor, 1 / sqrt(head width), is folded into the queries (of 64, it is a power of two, so nothing is
  rounded), and a layer scale into the layer before.

bfloat16 and float16 are for the matrix products and the attention only; the residual stream and the norms stay in
float32, which costs nothing measurable and leaves two thirds of the error.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchbank.config import Activation, Precision
from patchbank.encoders.attention import attention
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.device import DTYPES
from patchbank.encoders.packed import Linear
from patchbank.encoders.variants import dense, gaussian
from patchbank.features import CLS, POOLED, Input, Output

_QUICK = 1.702  # QuickGELU's factor


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

    def __init__(
        self, parameters: Mapping[str, Tensor], name: str, heads: int, activation: Activation, dtype: torch.dtype
    ) -> None:
        super().__init__()
        p = {key.removeprefix(name): value for key, value in parameters.items() if key.startswith(name)}
        for layer, gamma in (("attn.out_proj", "ls_1.gamma"), ("mlp.c_proj", "ls_2.gamma")):
            if gamma in p:
                p[f"{layer}.weight"] = p[f"{layer}.weight"].double() * p[gamma][:, None]
                p[f"{layer}.bias"] = p[f"{layer}.bias"].double() * p[gamma]
        width = p["attn.out_proj.bias"].numel()
        self.heads, self.scale = heads, (width // heads) ** -0.5

        def scaled(name: str) -> Tensor:
            queries, rest = p[name][:width], p[name][width:]
            return torch.cat([_double(queries).mul_(self.scale).to(dtype), rest.to(dtype)])

        self.ln_1, self.ln_2 = Norm(p, "ln_1", dtype), Norm(p, "ln_2", dtype)
        self.qkv = Linear(scaled("attn.in_proj_weight"), scaled("attn.in_proj_bias"), dtype)
        self.out = Linear(p["attn.out_proj.weight"], p["attn.out_proj.bias"], dtype)
        quick = activation == "quickgelu"
        factor = _QUICK if quick else 1.0
        self.fc = Linear(
            _double(p["mlp.c_fc.weight"]).mul_(factor),
            p["mlp.c_fc.bias"].double() * factor,
            dtype,
            activation="silu" if quick else "gelu",
        )
        self.proj = Linear(_double(p["mlp.c_proj.weight"]).div_(factor), p["mlp.c_proj.bias"], dtype)

    def attended(self, x: Tensor) -> Tensor:
        """x (B, T, width) float32 -> (3, B, heads, T, head width): queries, times `scale`, keys and values."""
        qkv: Tensor = self.qkv(self.ln_1(x))
        return qkv.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x (B, T, width) float32, and what the attention mixed for each token, likewise -> the same.

        Overwrites `x`.
        """
        x = self.out(mixed, x)
        out: Tensor = self.proj(self.fc(self.ln_2(x)), x)
        return out


def _double(parameter: Tensor) -> Tensor:
    """A copy in float64."""
    return parameter.to(torch.float64, copy=True)


def positions_at(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """The positional embedding (1 + N, width) of a square grid, at another one: as open_clip's `resize_pos_embed`."""
    side = isqrt(len(positions) - 1)
    if grid == (side, side):
        return positions
    square = positions[1:].view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, grid, mode="bicubic", antialias=True)
    return torch.cat([positions[:1], resized[0].flatten(1).t()])


class VisionTransformer(nn.Module):
    """CLIP's image tower."""

    whole: Tensor
    positions: Tensor
    nearness: Tensor | None

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        made: Input,
        outputs: Mapping[str, Output],
        dtype: torch.dtype,
        *,
        heads: int,
        activation: Activation,
    ) -> None:
        """Make the tower of float32 parameters under OpenAI's names without ``visual.``; on the CPU.

        Blocks after the last one that `outputs` need are left out.

        Args:
            made: its size, patch, mean and std count. Positions are interpolated to its grid.
            dtype: of the products.
            heads: of each block's attention.
            activation: of the MLPs.
        """
        super().__init__()
        self.outputs, self.patch_size = outputs, made.patch
        self.grid = made.patches
        std = torch.tensor(made.std).double().view(3, 1, 1)  # as float32 has them: OpenAI's loader divides in float32
        mean = 255 * torch.tensor(made.mean).double().view(3, 1, 1)
        whole = mean.round()
        conv = parameters["conv1.weight"] / (255 * std)  # (width, 3, p, p)
        positions = positions_at(parameters["positional_embedding"], self.grid).double()
        positions[0] += parameters["class_embedding"]
        positions[1:] += (conv * (whole - mean)).sum((1, 2, 3))
        # For a patch's row: broadcast over the colours alone, the subtraction takes ten times as long on the CPU.
        self.register_buffer("whole", whole.flatten().repeat(made.patch).to(dtype), persistent=False)
        self.register_buffer("positions", positions.float(), persistent=False)
        self.register_buffer("nearness", gaussian(self.grid) if "naclip" in outputs else None, persistent=False)
        self.embed = Linear(conv.permute(0, 2, 3, 1).flatten(1), None, dtype)
        has_norm = "ln_pre.weight" in parameters
        self.ln_pre = Norm(parameters, "ln_pre", torch.float32) if has_norm else nn.Identity()
        self.ln_post = Norm(parameters, "ln_post", dtype)
        depth = max(each.block for each in outputs.values())
        names = (f"transformer.resblocks.{layer}." for layer in range(depth))
        self.blocks = nn.ModuleList(Block(parameters, name, heads, activation, dtype) for name in names)
        self.proj = Linear(parameters["proj"].t(), None, dtype)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every output of a batch of images.

        Args:
            pixels: (B, h, w, 3) uint8 RGB on the tower's device.

        Returns:
            name -> (B, ...), in the tower's dtype or in float32, not normalised to unit length.
        """
        x = self.embed(self._patches(pixels))  # (B, N, width)
        x = F.pad(x, (0, 0, 1, 0)) + self.positions  # float32 from here on
        x = self.ln_pre(x)
        found: dict[str, Tensor] = {}
        for number, block in enumerate(cast("list[Block]", self.blocks), 1):
            q, k, v = block.attended(x)
            wanted = {name: each for name, each in self.outputs.items() if each.block == number}
            for each in filter(None, (each.variant for each in wanted.values())):
                found[each] = self.proj(self.ln_post(dense(each, block, x, q, k, v, self.nearness)))
            x = block(x, attention(q, k, v))
            found |= self._after(x, {name: each for name, each in wanted.items() if not each.variant})
        return {name: found[name] for name in self.outputs}

    def _after(self, x: Tensor, wanted: Mapping[str, Output]) -> dict[str, Tensor]:
        """The outputs of a block, whose tokens are x (B, T, width) float32."""
        found: dict[str, Tensor] = {}
        normed = projected = x
        if any(each.norm or each.projection for each in wanted.values()):
            normed = self.ln_post(x)
        if any(each.projection for each in wanted.values()):
            projected = self.proj(normed)
        for name, each in wanted.items():
            if name == POOLED and each.projection.startswith("mean"):
                found[name] = self.proj(self.ln_post(x[:, 1:].mean(1)))
            elif name in (CLS, POOLED):
                found[name] = projected[:, 0]
            elif each.projection:
                found[name] = projected[:, 1:]
            else:  # the next block overwrites x
                found[name] = normed[:, 1:] if each.norm else x[:, 1:].clone()
        return found

    def _patches(self, pixels: Tensor) -> Tensor:
        """(B, h, w, 3) uint8 -> (B, N, p * p * 3), one row per patch."""
        (rows, columns), patch = self.grid, self.patch_size
        x = pixels.to(self.whole.dtype).view(-1, rows, patch, columns, 3 * patch).sub_(self.whole)
        return x.transpose(2, 3).reshape(len(x), rows * columns, -1)

    def pack(self, batch_size: int) -> Self:
        """The tower itself, with every layer's weights packed for batches of about this size, if oneDNN can."""
        rows = batch_size * self.positions.shape[0]
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.pack(rows)
        return self


class TowerEncoder:
    """A CLIP's image tower on a device. An `Encoder`."""

    concurrent = True

    def __init__(
        self,
        spec: EncoderSpec,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        batch_size: int,
        *,
        heads: int,
        activation: Activation,
    ) -> None:
        """`parameters`, `heads` and `activation` as the tower takes them."""
        self.input, self.outputs, self.identity = spec.input, spec.outputs, spec.identity
        dtype = DTYPES[cast(Precision, spec.identity["precision"])]
        tower = VisionTransformer(parameters, spec.input, spec.outputs, dtype, heads=heads, activation=activation)
        self.tower = tower.to(device).eval().pack(batch_size)

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, h, w, 3) uint8 on the device -> every output, (B, ...)."""
        found: dict[str, Tensor] = self.tower(pixels)
        return found
