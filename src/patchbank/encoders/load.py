"""`load_encoder`: an encoder by name, for a notebook or a program of one's own."""

from __future__ import annotations

from pathlib import Path

from patchbank import encoders
from patchbank.config import Activation, ExtractConfig, Precision
from patchbank.encoders.device import resolve_device
from patchbank.encoders.runner import Runner


def load_encoder(
    model: str = "ViT-B/16",
    *,
    weights: str | Path | None = None,
    checkpoints: str | Path | None = None,
    activation: Activation | None = None,
    round_weights: bool = False,
    precision: Precision = "fp32",
    device: str = "auto",
) -> Runner:
    """A model's encoder on a device: ``load_encoder("ViT-B/16").encode([image])["patch_tokens"]``.

    Args:
        model: a name as ``--model`` takes it.
        weights: a checkpoint; None looks the official one up, and downloads it if need be.
        checkpoints: the directory looked in first.
        activation: of a checkpoint that does not say it.
        round_weights: round float32 weights to float16, as ``clip.load`` does.

    Raises:
        WeightsError: there is no checkpoint, or it is damaged or another model's.
        ConfigError: no such model or device, or a precision that the device cannot compute in.
    """
    config = ExtractConfig(
        model=model,
        weights=None if weights is None else Path(weights),
        checkpoints=None if checkpoints is None else Path(checkpoints),
        activation=activation,
        round_weights=round_weights,
        precision=precision,
        device=device,
    )
    return Runner(encoders.find(config).obtain(), resolve_device(device, precision))
