"""An encoder as large and as slow as the real one, without a checkpoint: to measure speeds with."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from patchbank.config import UNKNOWN, Precision
from patchbank.encoders.encoder import PatchEncoder
from patchbank.encoders.openai.checkpoints import Checkpoint
from patchbank.encoders.openai.registry import Model
from patchbank.encoders.openai.shapes import expected_shapes


def random_encoder(
    model: Model, precision: Precision, device: torch.device, batch_size: int | None = None, *, compiled: bool = False
) -> PatchEncoder:
    """The encoder that a run would use, with random weights: the same in every layer."""
    values: dict[str, Tensor] = {}
    for name, shape in expected_shapes(model).items():
        one = re.sub(r"resblocks\.\d+\.", "resblocks.0.", name)
        values[name] = values[one] if one in values else 0.02 * torch.randn(shape)
    nowhere = Checkpoint(Path("random numbers"), UNKNOWN)
    return PatchEncoder(
        *(model, nowhere, precision, str(device)), batch_size=batch_size, compiled=compiled, parameters=values
    )
