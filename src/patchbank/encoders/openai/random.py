"""Random numbers for weights: an encoder as large and as slow as the real one, to measure speeds with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchbank.config import Precision
from patchbank.encoders.base import Progress
from patchbank.encoders.openai import OpenAIEncoder, OpenAISpec
from patchbank.encoders.openai.registry import get_model
from patchbank.encoders.openai.shapes import expected_shapes
from patchbank.features import Identity


@dataclass(frozen=True)
class RandomSpec(OpenAISpec):
    """One of the models, with the same random numbers in every layer."""

    @property
    def identity(self) -> Identity:
        """The weights are named for what they are."""
        return {**super().identity, "weights": "random numbers"}

    @property
    def untrained(self) -> bool:
        """They are."""
        return True

    def obtain(self, progress: Progress | None = None) -> RandomSpec:
        """They are made when they are loaded."""
        return self

    def load(self, device: torch.device, batch_size: int) -> OpenAIEncoder:
        """The encoder that a run would use."""
        return OpenAIEncoder(self, self._parameters(), device, batch_size)

    def _parameters(self) -> Mapping[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, shape in expected_shapes(self.model).items():
            one = re.sub(r"resblocks\.\d+\.", "resblocks.0.", name)
            values[name] = values[one] if one in values else 0.02 * torch.randn(shape)
        return values


def random_spec(model: str, precision: Precision = "fp32") -> RandomSpec:
    """Of a model's name. Raises ConfigError where there is none."""
    return RandomSpec(get_model(model), precision)
