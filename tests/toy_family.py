"""A second family, as small as can be: registers, two blocks, no joint space, an input that is not square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from patchbank.config import ExtractConfig
from patchbank.encoders.base import Description, Product
from patchbank.encoders.outputs import Architecture, block_of, chosen, sized
from patchbank.features import CLS, GRID, POOLED, REGISTERS, Input, Output

PACKAGES = ("msgspec",)  # a bank and its runs note their versions
SEEDS = {"toy/small": 0, "toy/other": 1}
OWN = Input(size=(24, 40), patch=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bilinear")
MADE = Architecture(blocks=2, width=6, cls=True, registers=4, norm="norm", pooled=4, pooling="head")


def spec(config: Any, root: object = None, *, rounding: bool = False) -> ToySpec:
    """The family's entry point, called by `encoders.find`."""
    wanted = sized(config, config.model, OWN)
    return ToySpec(config.model, wanted, chosen(config, config.model, MADE, wanted))


def random(config: Any) -> ToySpec:
    """Its weights are random as it is."""
    return spec(config)


def names() -> list[str]:
    """Its two models."""
    return list(SEEDS)


def describe(name: str) -> Description | None:
    """One of them."""
    found = toy(name)
    return Description(name, found.input.size, found.input.grid, MADE.width, MADE.prefix, text=False)


def toy(name: str = "toy/small", **options: Any) -> ToySpec:
    """The specification of options, by their names in `ExtractConfig`."""
    return spec(ExtractConfig(model=name, **options))


@dataclass(frozen=True)
class ToySpec:
    """The specification, before the weights are made."""

    name: str
    input: Input
    outputs: dict[str, Output] = field(hash=False)
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
    """Two transformer blocks on patches, [CLS] and registers."""

    def __init__(self, spec: ToySpec) -> None:
        super().__init__()
        self.input, self.outputs, self.identity = spec.input, spec.outputs, spec.identity
        with torch.random.fork_rng():
            torch.manual_seed(SEEDS[spec.name])
            self.embed = nn.Conv2d(3, 6, 8, 8)
            self.positions = nn.Parameter(torch.randn(1, 6, 3, 5))
            self.extra = nn.Parameter(torch.randn(1 + MADE.registers, 6))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, norm_first=True) for _ in range(2)
            )
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)
        self.eval()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, h, w, 3) uint8 to the outputs of the specification."""
        mean, std = (torch.tensor(each, device=pixels.device) for each in (self.input.mean, self.input.std))
        x = self.embed(((pixels / 255 - mean) / std).permute(0, 3, 1, 2))
        x = x + interpolate(self.positions, x.shape[2:], mode="bicubic", antialias=True)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        after = [x]
        for block in self.blocks:
            after.append(block(after[-1]))
        last = self.norm(after[-1])
        found = {CLS: last[:, 0], REGISTERS: last[:, 1:5], GRID: last[:, 5:], POOLED: self.head(last[:, 0])}
        for name in self.outputs.keys() - found.keys():
            number, raw = block_of(name) or (0, True)
            found[name] = (after[number] if raw else self.norm(after[number]))[:, 5:]
        return {name: found[name] for name in self.outputs}
