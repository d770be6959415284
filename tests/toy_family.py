"""A second family, as small as can be: registers, two outputs of different widths, an input that is not square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchbank.encoders.base import Product
from patchbank.features import CLS, GRID, Input, Output

SEEDS = {"toy/small": 0, "toy/other": 1}
REGISTERS = 4


def spec(config: Any, root: object, *, rounding: bool) -> ToySpec:
    """The family's entry point, called by `encoders.find`."""
    return ToySpec(config.model)


def random(config: Any) -> ToySpec:
    """Its weights are random as it is."""
    return ToySpec(config.model)


@dataclass(frozen=True)
class ToySpec:
    """The specification, before the weights are made."""

    name: str
    input: ClassVar[Input] = Input(
        size=(24, 40), patch=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bilinear"
    )
    outputs: ClassVar[dict[str, Output]] = {
        GRID: Output(shape=(15, 6), block=1, norm="norm"),
        CLS: Output(shape=(4,), block=1, norm="norm", projection="head"),
    }
    weights: ClassVar[str | None] = "a seed"
    sources: ClassVar[Sequence[str]] = ()
    untrained: ClassVar[bool] = True
    products: ClassVar[Sequence[Product]] = ()
    sample_bytes: ClassVar[int] = 0

    @property
    def identity(self) -> dict[str, str]:
        return {"family": "toy", "model": self.name, "weights": f"seed {SEEDS[self.name]}", "precision": "fp32"}

    def obtain(self, progress: object = None) -> ToySpec:
        return self

    def load(self, device: torch.device, batch_size: int) -> Toy:
        return Toy(self).to(device)


class Toy(nn.Module):
    """One transformer block on patches, [CLS] and registers."""

    def __init__(self, spec: ToySpec) -> None:
        super().__init__()
        self.input, self.outputs, self.identity = spec.input, spec.outputs, spec.identity
        with torch.random.fork_rng():
            torch.manual_seed(SEEDS[spec.name])
            self.embed = nn.Conv2d(3, 6, 8, 8)
            self.positions = nn.Parameter(torch.randn(15, 6))
            self.extra = nn.Parameter(torch.randn(1 + REGISTERS, 6))
            self.block = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, norm_first=True)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)
        self.eval()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 24, 40, 3) uint8 to both outputs."""
        mean, std = (torch.tensor(each, device=pixels.device) for each in (self.input.mean, self.input.std))
        x = (pixels / 255 - mean) / std
        x = self.embed(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.block(x))
        return {CLS: self.head(x[:, 0]), GRID: x[:, 1 + REGISTERS :]}
