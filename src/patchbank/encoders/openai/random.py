"""An encoder with random weights, as large and as slow as the real one, for measuring speed."""

from __future__ import annotations

import re
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
        """The model's, with other weights."""
        return {**super().identity, "weights": "random numbers"}

    @property
    def untrained(self) -> bool:
        """Always."""
        return True

    def obtain(self, progress: Progress | None = None) -> RandomSpec:
        """The same: `load` makes the weights."""
        return self

    def load(self, device: torch.device, batch_size: int) -> OpenAIEncoder:
        """The encoder of a real run."""
        values: dict[str, Tensor] = {}
        for name, shape in expected_shapes(self.model).items():
            one = re.sub(r"resblocks\.\d+\.", "resblocks.0.", name)
            values[name] = values[one] if one in values else 0.02 * torch.randn(shape)
        return OpenAIEncoder(self, values, device, batch_size)


def random_spec(model: str, precision: Precision = "fp32") -> RandomSpec:
    """The model of this name. Raises ConfigError if it is unknown."""
    return RandomSpec(get_model(model), precision)
