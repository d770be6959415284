"""PatchEncoder: a model, its preprocessing and a device in one object, pixels in and patch tokens out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank.config import Precision, ResizeMode
from patchbank.encoder import vit
from patchbank.encoder.weights import Checkpoint, load_visual, obtain_checkpoint
from patchbank.errors import ConfigError
from patchbank.models import Model, get_model
from patchbank.preprocess import preprocess

_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class PatchEncoder:
    """A frozen CLIP image tower on one device.

    Attributes:
        model: which model it is.
        checkpoint: the file its weights came from.
        precision: what it computes in.
        device: where it computes.
    """

    def __init__(
        self, model: Model, checkpoint: Checkpoint, precision: Precision = "fp32", device: str = "auto"
    ) -> None:
        """Load a checkpoint. Raises WeightsError (not this model's) and ConfigError (precision or device)."""
        self.model = model
        self.checkpoint = checkpoint
        self.precision = precision
        self.device = resolve_device(device, precision)
        tower = vit.build(model, load_visual(model, checkpoint)).to(self.device)
        for parameter in tower.parameters():  # not the buffers: pixels are normalised in float32
            parameter.data = parameter.data.to(_DTYPES[precision])
        self._tower = tower

    @classmethod
    def load(
        cls,
        model: str = "ViT-B/16",
        *,
        weights: str | Path | None = None,
        checkpoints: str | Path | None = None,
        precision: Precision = "fp32",
        device: str = "auto",
    ) -> PatchEncoder:
        """The encoder of a model's name.

        Args:
            model: one of `patchbank.models.MODELS`.
            weights: a checkpoint of your own; None looks the official one up, and downloads it if need be.
            checkpoints: the directory looked in first.

        Raises:
            WeightsError: there is no checkpoint, or it is damaged or another model's.
            ConfigError: no such model or device, or a precision that the device cannot compute in.
        """
        chosen = get_model(model)
        checkpoint = obtain_checkpoint(
            chosen,
            None if weights is None else Path(weights).expanduser(),
            None if checkpoints is None else Path(checkpoints).expanduser(),
        )
        return cls(chosen, checkpoint, precision, device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Patch tokens of a batch.

        Args:
            pixels: (B, n, n, 3) uint8 RGB, n being ``model.input_size``, on any device.

        Returns:
            (B, N, D) float32 on the encoder's device, row-major, [CLS] dropped, not normalised to unit length. No
            gradient leads back through the encoder; one can lead on from here.

        Raises:
            ValueError: the pixels are of another shape or dtype.
        """
        return self.all_tokens(pixels)[:, 1:]

    def all_tokens(self, pixels: Tensor) -> Tensor:
        """As `__call__`, with the [CLS] token's feature in front: (B, 1 + N, D).

        That one is what ``encode_image`` gives in OpenAI's package: CLIP's feature of the whole image.
        """
        n = self.model.input_size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (n, n, 3):
            raise ValueError(f"pixels must be uint8 (B, {n}, {n}, 3), not {pixels.dtype} {tuple(pixels.shape)}")
        with torch.no_grad(), _float32_products("tf32" if self.precision == "tf32" else "ieee"):
            tokens: Tensor = self._tower(pixels.to(self.device, non_blocking=True)).float()
        return tokens

    def encode(self, images: Sequence[Image.Image], resize: ResizeMode = "center-crop") -> Tensor:
        """Patch tokens of opened images: (B, N, D) float32 on the CPU. As `__call__`, for a notebook."""
        pixels = [preprocess(image, resize, self.model.input_size) for image in images]
        return self(torch.from_numpy(np.stack(pixels))).cpu()


def resolve_device(device: str, precision: Precision) -> torch.device:
    """``auto`` or a device's name to the device. Raises ConfigError if it is not there or cannot compute so."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"There is no device {device!r}. Use auto, cpu, cuda or cuda:N.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"The device {device!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices on this "
            "machine. Use --device cpu, or check the driver and that torch is a CUDA build."
        )
    if resolved.type == "cpu" and precision in ("fp16", "tf32"):
        raise ConfigError(f"--precision {precision} needs CUDA. On the CPU use fp32, or bf16.")
    return resolved


def auto_batch_size(model: Model, device: torch.device) -> int:
    """Images a forward pass where none is asked for: about 64k tokens on a GPU, which fills one."""
    if device.type == "cpu":
        return 8
    return int(min(256, 1 << ((65536 // (model.tokens + 1)).bit_length() - 1)))


@contextlib.contextmanager
def _float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """float32 products in full precision or in TF32, whatever the program around this has chosen for itself."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        before_cudnn = torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
            torch.backends.cudnn.allow_tf32 = before_cudnn
        return
    cudnn: Any = torch.backends.cudnn  # torch's annotations lack what the documentation names
    mkldnn: Any = torch.backends.mkldnn
    backends = [torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul]
    chosen = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee" if backend is mkldnn.matmul else precision
        yield
    finally:
        for backend, own in zip(backends, chosen, strict=True):
            backend.fp32_precision = own
