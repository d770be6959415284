"""Which outputs a vision transformer has, by the names that ``--output`` takes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from patchbank.config import ExtractConfig
from patchbank.errors import ConfigError
from patchbank.features import CLS, GRID, POOLED, REGISTERS, Input, Output

VARIANTS = ("maskclip", "sclip", "clearclip", "naclip")  # dense variants of CLIP's last block


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a vision transformer computes.

    Attributes:
        blocks, width: how many blocks, and the width of their tokens.
        cls: whether one of the tokens is [CLS].
        registers: how many are registers.
        norm: the last norm's name in the model; empty if the tokens have none.
        projection: the layer's name that maps tokens to the space of images and texts; empty if none does.
        dim: the width of projected tokens; 0 if nothing projects them.
        pooled: the width of the library's own feature of the whole image; 0 if it has none.
        pooling: the names of the layers that give it, after the last block.
        variants: the dense variants that its last block has.
    """

    blocks: int
    width: int
    cls: bool
    registers: int = 0
    norm: str = ""
    projection: str = ""
    dim: int = 0
    pooled: int = 0
    pooling: str = ""
    variants: Sequence[str] = ()

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return self.cls + self.registers

    def names(self) -> list[str]:
        """What ``--output`` takes, but for blocks."""
        has = {CLS: self.cls, REGISTERS: self.registers, POOLED: self.pooled}
        return [GRID, *(name for name, there in has.items() if there), *self.variants]


def chosen(config: ExtractConfig, model: str, made: Architecture, wanted: Input) -> dict[str, Output]:
    """The outputs that a configuration asks for, in its order; patch tokens and [CLS] if it names none.

    Args:
        model: its name, for messages.
        wanted: the model's input, at the size and the pooling of the configuration.

    Raises ConfigError if the model has no such output.
    """
    names = config.output or tuple(name for name in (CLS, GRID) if name in made.names())
    return {name: _output(name, model, made, prod(wanted.grid)) for name in names}


def block_of(name: str) -> tuple[int, bool] | None:
    """``block:6:raw`` -> (6, whether it is raw); None if the name is not a block's."""
    match = re.fullmatch(r"block:([1-9]\d{0,3})(:raw)?", name, re.ASCII)
    return match and (int(match[1]), bool(match[2]))


def _output(name: str, model: str, made: Architecture, tokens: int) -> Output:
    last = Output(shape=(made.dim or made.width,), block=made.blocks, norm=made.norm, projection=made.projection)
    if (block := block_of(name)) is not None:
        number, raw = block
        if number > made.blocks:
            raise ConfigError(f"--output {name}: {model} has {made.blocks} blocks, counted from 1.")
        return Output(shape=(tokens, made.width), block=number, norm="" if raw else made.norm)
    if name not in made.names():
        known = f"{', '.join(made.names())}, block:1 to block:{made.blocks}, and block:1:raw to block:{made.blocks}:raw"
        raise ConfigError(f"--output {name}: {model} has no such output. It has {known}.")
    if name == POOLED:
        return replace(last, shape=(made.pooled,), norm="", projection=made.pooling)
    if name == CLS:
        return last
    if name == REGISTERS:
        return replace(last, shape=(made.registers, *last.shape))
    return replace(last, shape=(tokens, *last.shape), variant="" if name == GRID else name)


def sized(config: ExtractConfig, model: str, own: Input, fraction: float = 1.0) -> Input:
    """A model's own input at the size and with the pooling of a configuration.

    Args:
        own: the input at the model's own size, without `cover`.
        fraction: the part of the resized image's side that is cut out, such as 0.875.

    Raises ConfigError if the size is no multiple of the patch, or the grid none of the pooling.
    """
    made = own
    if (size := config.input_size) is not None and size != own.size:
        if any(side % own.patch for side in size):
            near = "x".join(str(max(1, round(side / own.patch)) * own.patch) for side in size)
            raise ConfigError(
                f"--input-size {size[0]}x{size[1]}: both must be multiples of {model}'s patch, {own.patch} pixels, "
                f"such as {near}."
            )
        made = replace(own, size=size)
    if fraction != 1:  # floored as timm does
        made = replace(made, cover=(int(made.size[0] / fraction), int(made.size[1] / fraction)))
    made = replace(made, pool=config.pool_grid)
    if any(side // own.patch % made.pool for side in made.size):  # a rest of pixels is the model's own affair
        h, w = (side // own.patch for side in made.size)
        fits = "x".join(str(max(1, side // made.cell) * made.cell) for side in made.size)
        raise ConfigError(
            f"--pool-grid {made.pool}: {model}'s grid of {h} x {w} patches is no multiple of it. Add --input-size "
            f"{fits}."
        )
    return made
