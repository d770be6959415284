"""CLIP's image tower without its numbers: parameters, outputs, matrix products, memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from patchbank.config import Precision
from patchbank.encoders.base import Product
from patchbank.encoders.outputs import VARIANTS, Architecture
from patchbank.encoders.specs import products_of
from patchbank.features import Input


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a CLIP's image tower.

    Attributes:
        blocks, width, heads: the transformer's.
        hidden: the width of its MLPs.
        dim: of the space of images and texts.
        mean: whether an image's feature is the mean of its patch tokens, normed and projected, and not [CLS].
        pre_norm: whether tokens are normed before the first block.
        layer_scale: whether each half of a block is scaled, channel by channel.
    """

    blocks: int
    width: int
    heads: int
    hidden: int
    dim: int
    mean: bool = False
    pre_norm: bool = True
    layer_scale: bool = False

    @property
    def architecture(self) -> Architecture:
        """What ``--output`` may name."""
        return Architecture(
            blocks=self.blocks,
            width=self.width,
            cls=not self.mean,
            norm="ln_post",
            projection="proj",
            dim=self.dim,
            pooled=self.dim,
            pooling="mean, ln_post, proj" if self.mean else "ln_post, proj",
            variants=VARIANTS if self.pre_norm and not self.mean else (),  # as in the references
        )

    def parameters(self, patch: int, patches: int) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape, under OpenAI's names without ``visual.``, for that many patches of an image."""
        width = self.width
        return {
            "class_embedding": (width,),
            "positional_embedding": (1 + patches, width),
            "proj": (width, self.dim),
            "conv1.weight": (width, 3, patch, patch),
            **(_norm("ln_pre", width) if self.pre_norm else {}),
            **transformer_shapes(width, self.blocks, self.hidden, layer_scale=self.layer_scale),
            **_norm("ln_post", width),
        }

    def products(self, made: Input) -> Sequence[Product]:
        """Every matrix product of one sample, but for those of dense variants."""
        width, hidden = self.width, self.hidden
        layers = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)] * self.blocks
        return products_of(made, width, 1, [*layers, (width, self.dim)], [self.heads] * self.blocks)

    def sample_bytes(self, made: Input, precision: Precision) -> int:
        """Memory that a pass takes per sample: about 18 numbers per token and channel."""
        item = 2 if precision in ("fp16", "bf16") else 4
        return (1 + prod(made.size) // made.patch**2) * 18 * self.width * item


def transformer_shapes(
    width: int, blocks: int, hidden: int, *, layer_scale: bool = False
) -> dict[str, tuple[int, ...]]:
    """The parameters of a tower's residual blocks and their shapes; the text tower uses the same names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(blocks):
        block = f"transformer.resblocks.{number}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            **_norm(f"{block}.ln_1", width),
            f"{block}.mlp.c_fc.weight": (hidden, width),
            f"{block}.mlp.c_fc.bias": (hidden,),
            f"{block}.mlp.c_proj.weight": (width, hidden),
            f"{block}.mlp.c_proj.bias": (width,),
            **_norm(f"{block}.ln_2", width),
            **({f"{block}.ls_{half}.gamma": (width,) for half in (1, 2)} if layer_scale else {}),
        }
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
