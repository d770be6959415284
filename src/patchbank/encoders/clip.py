"""CLIP's image tower as a specification knows it: its outputs, matrix products and memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from patchbank.config import Precision
from patchbank.encoders.base import Product
from patchbank.encoders.outputs import VARIANTS, Architecture
from patchbank.features import Input


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a CLIP's image tower.

    Attributes:
        blocks, width, heads: the transformer's.
        hidden: the width of its MLPs.
        dim: of the space of images and texts.
        mean: whether an image's feature is the mean of its patch tokens, normed and projected, and not [CLS].
        variants: whether the last block is that of CLIP, for which the dense variants were made.
    """

    blocks: int
    width: int
    heads: int
    hidden: int
    dim: int
    mean: bool = False
    variants: bool = True

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
            variants=VARIANTS if self.variants else (),
        )

    def products(self, made: Input) -> Sequence[Product]:
        """Every matrix product of one sample, but for those of dense variants."""
        patches, width = prod(made.size) // made.patch**2, self.width
        tokens = 1 + patches
        return [
            Product(1, patches, 3 * made.patch**2, width),  # patch embedding
            Product(self.blocks, tokens, width, 3 * width),  # queries, keys, values
            Product(self.blocks, tokens, width // self.heads, tokens, "attention", self.heads),
            Product(self.blocks, tokens, width, width),
            Product(self.blocks, tokens, width, self.hidden),
            Product(self.blocks, tokens, self.hidden, width),
            Product(1, tokens, width, self.dim),
        ]

    def sample_bytes(self, made: Input, precision: Precision) -> int:
        """Memory that a pass takes per sample: about 18 numbers per token and channel."""
        item = 2 if precision in ("fp16", "bf16") else 4
        return (1 + prod(made.size) // made.patch**2) * 18 * self.width * item
