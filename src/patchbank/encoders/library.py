"""Encoders whose forward pass is another library's: its own modules, with faster layers in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from patchbank.config import Precision
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.device import DTYPES
from patchbank.encoders.outputs import Architecture, block_of
from patchbank.encoders.packed import pack_model
from patchbank.features import CLS, POOLED, REGISTERS, is_grid


class LibraryEncoder(ABC):
    """A library's model on a device. An `Encoder`; a family says how its library's models are called."""

    def __init__(
        self, spec: EncoderSpec, made: Architecture, model: nn.Module, device: torch.device, batch_size: int
    ) -> None:
        """`model` has its weights, in float32 on the CPU; it is changed."""
        self.input, self.outputs, self.identity = spec.input, spec.outputs, spec.identity
        self.made = made
        h, w = spec.input.size
        tokens = made.prefix + (h // spec.input.patch) * (w // spec.input.patch)
        model = model.requires_grad_(False).eval()
        self.model = pack_model(model, DTYPES[cast(Precision, spec.identity["precision"])], batch_size * tokens, device)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.input.mean, spec.input.std))
        self._scale, self._shift = (1 / (255 * std)).to(device), (-mean / std).to(device)

    @abstractmethod
    def hidden(self, x: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
        """The tokens after some blocks, counted from 1, before any norm.

        (B, 3, h, w) normalised float32 -> block -> (B, T, width): [CLS], registers, patch tokens.
        """

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Tokens (B, T, width) after the last norm; the same if the model has none."""

    def project(self, x: Tensor) -> Tensor:
        """Normed tokens (B, T, width) in the space of images and texts; the same if the model has none."""
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Normed tokens of the last block (B, T, width) -> the library's own feature of the whole image (B, D)."""
        raise NotImplementedError

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, h, w, 3) uint8 on the device -> every output."""
        made = self.made
        asked = {name: block_of(name) or (made.blocks, False) for name in self.outputs}
        x = pixels.permute(0, 3, 1, 2).float() * self._scale + self._shift
        hidden = self.hidden(x, {block for block, _ in asked.values()})
        normed = {block: self.norm(hidden[block]) for block in {each for each, raw in asked.values() if not raw}}
        outputs: dict[str, Tensor] = {}
        for name, output in self.outputs.items():
            block, raw = asked[name]
            if name == POOLED:
                outputs[name] = self.pooled(normed[block])
                continue
            tokens = hidden[block] if raw else normed[block]
            if is_grid(name, output):
                tokens = tokens[:, made.prefix :]
            elif name == REGISTERS:
                tokens = tokens[:, made.cls : made.prefix]
            elif name == CLS:
                tokens = tokens[:, 0]
            outputs[name] = self.project(tokens) if output.projection else tokens
        return outputs
