"""A bank's features computed anew from the images' pixels, to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from patchbank.bank.manifest import Manifest
from patchbank.budget import ByteBudget
from patchbank.config import UNKNOWN, Decode, Precision, ResizeMode
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Failure
from patchbank.encoders.encoder import PatchEncoder, resolve_device
from patchbank.encoders.openai.checkpoints import CHECKPOINTS, Checkpoint, obtain_checkpoint
from patchbank.encoders.openai.registry import Model
from patchbank.errors import ConfigError, WeightsError
from patchbank.preprocess import load

_BYTES = 2 << 30  # of a picture being decoded


def recompute(
    dataset: Dataset, encoder: PatchEncoder, resize: ResizeMode = "center-crop", decode: Decode = "exact"
) -> Callable[[str], Tensor | None]:
    """A function of an image's key that gives its (N, D) float32 patch tokens on the CPU; None if it cannot be read."""
    samples = {sample.key: sample for sample in dataset.samples}

    def function(key: str) -> Tensor | None:
        image = load(samples[key], resize, encoder.model.input_size, ByteBudget(_BYTES), decode)
        if isinstance(image, Failure):
            return None
        return encoder(torch.from_numpy(image.pixels.copy())[None])[0].cpu()

    return function


def encoder_of(
    model: Model,
    bank: Manifest | None,
    root: Path | None,
    *,
    weights: Path | None = None,
    checkpoints: Path | None = None,
    device: str = "auto",
) -> PatchEncoder:
    """The encoder that made a bank, as far as the bank says and this machine can.

    Args:
        bank: None of features that somebody else made.
        root: the EZ-HOI checkout whose checkpoints are looked in.

    Raises:
        WeightsError: there is no checkpoint, or it is another than the bank's.
        ConfigError: there is no such device.
    """
    precision: Precision = "fp32"
    if bank is not None and bank.fingerprint.precision in ("bf16", "fp16", "tf32"):
        precision = bank.fingerprint.precision  # type: ignore[assignment]
        try:
            resolve_device(device, precision)
        except ConfigError:
            precision = "fp32"  # what it stands for
    checkpoint = checkpoint_of(model, bank, root, weights=weights, checkpoints=checkpoints)
    return PatchEncoder(model, checkpoint, precision, device)


def checkpoint_of(
    model: Model, bank: Manifest | None, root: Path | None, *, weights: Path | None, checkpoints: Path | None
) -> Checkpoint:
    """The checkpoint that a bank was made with, as far as the bank says. Raises WeightsError; as `encoder_of`."""
    if checkpoints is None and root is not None:
        checkpoints = root / CHECKPOINTS
    known = bank.fingerprint.weights_sha256 if bank else UNKNOWN
    if weights is None and known not in (UNKNOWN, model.sha256):
        raise WeightsError(
            f"The bank was made with a checkpoint that is not OpenAI's (SHA-256 {known}): give it with --weights."
        )
    checkpoint = obtain_checkpoint(model, weights, checkpoints)
    if known not in (UNKNOWN, checkpoint.sha256):
        raise WeightsError(
            f"The bank was made with other weights than {checkpoint.path}: their SHA-256 is {known}, this "
            f"file's {checkpoint.sha256}. Give the right file with --weights."
        )
    return checkpoint
