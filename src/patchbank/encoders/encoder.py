"""PatchEncoder: a model, its preprocessing and a device in one object, pixels in and patch tokens out."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank.config import Activation, Precision, ResizeMode
from patchbank.encoders.compiling import Forward, compile_forward
from patchbank.encoders.openai import tower as vit
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual, obtain_checkpoint, resolve_activation
from patchbank.encoders.openai.registry import Model, get_model
from patchbank.errors import ConfigError, PatchbankError
from patchbank.files import bytes_text
from patchbank.preprocess import preprocess

_TOO_LARGE = "A batch did not fit into the memory"

DTYPES: dict[Precision, torch.dtype] = {
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
        batch_size: images a forward pass that it is tuned for; it takes any number.
        compiled: whether `torch.compile` made what batches of that size pass through.
        largest_batch: how many images fit into the device's memory at once, as far as is known.
        notes: what a user should know of how it computes, a sentence each.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        precision: Precision = "fp32",
        device: str = "auto",
        *,
        batch_size: int | None = None,
        compiled: bool = False,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load a checkpoint, or take the parameters that `load_visual` has given (with QuickGELU).

        Raises WeightsError (it is not this model's) and ConfigError (precision or device, or a batch that this machine
        has no memory for).
        """
        self.model = model
        self.checkpoint = checkpoint
        self.precision = precision
        self.device = resolve_device(device, precision)
        self.batch_size = batch_size or auto_batch_size(model, self.device)
        if self.device.type == "cpu":
            _check_memory(model, self.batch_size, DTYPES[precision])
        self.compiled = False
        self.notes: list[str] = []
        self._copies: torch.cuda.Stream | None = None
        self.largest_batch = self.batch_size  # images that have fitted into the device's memory at once
        activation: Activation = "quickgelu" if parameters else resolve_activation(checkpoint, None)
        parameters = parameters or load_visual(model, checkpoint, rounding=True)
        tower = vit.build(model, parameters, activation, DTYPES[precision], self.device, self.batch_size)
        self._forward: Forward = tower
        self._compiled: Forward | None = None  # for batches of exactly `batch_size`
        if precision == "bf16" and self.device.type == "cpu" and not has_bfloat16():
            self.notes.append(
                "This processor has no bfloat16 instructions (AMX or AVX512-BF16): --precision bf16 is slower here "
                "than fp32, and less exact."
            )
        if compiled:
            self._compile()

    def _compile(self) -> None:
        n = self.model.input_size
        blank = torch.zeros(self.batch_size, n, n, 3, dtype=torch.uint8, device=self.device)
        with self._products():
            forward, failure = compile_forward(self._forward, blank)
        self.compiled = failure is None
        if failure:
            self.notes.append(failure)
        else:
            self._compiled = forward

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes what it was made from, and not its weights as this machine has packed them."""
        made = (self.model, self.checkpoint, self.precision, str(self.device))
        return _make, (*made, self.batch_size, self.compiled)

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
            model: one of `patchbank.encoders.openai.registry.MODELS`.
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
        if not len(pixels):
            return torch.empty(0, 1 + self.model.tokens, self.model.output_dim, device=self.device)
        parts = list(torch.split(pixels, self.largest_batch))
        tokens: list[Tensor] = []
        while parts:
            with contextlib.suppress(torch.OutOfMemoryError):
                tokens.append(self._pass(parts[0]))
                parts.pop(0)
                continue
            # Here the failed pass is forgotten, and what it held can be used.
            self._halve(len(parts[0]))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            parts = [half for part in parts for half in torch.split(part, self.largest_batch)]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def submit(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        """Begin a batch, as `all_tokens`; on CUDA, return before it is done.

        Returns:
            A function that waits for the (B, 1 + N, D) tokens, on the CPU and rounded to `dtype`.
        """
        tokens = self.all_tokens(pixels).to(dtype)
        if self.device.type != "cuda":
            return lambda: tokens
        # On a stream of its own, so that the next batch is computed while this one is copied.
        self._copies = self._copies or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            received = torch.empty(tokens.shape, dtype=dtype, pin_memory=True).copy_(tokens, non_blocking=True)
            tokens.record_stream(self._copies)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._copies)

        def wait() -> Tensor:
            done.synchronize()
            return received

        return wait

    def _pass(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), self._products():
            whole = len(pixels) == self.batch_size
            forward = self._compiled if whole and self._compiled is not None else self._forward
            tokens = forward(pixels.to(self.device, non_blocking=True))
            # A compiled forward pass on CUDA gives the same memory each time.
            return tokens.to(torch.float32, copy=self.compiled)

    def _halve(self, failed: int) -> None:
        """After so many images did not fit into the device's memory. Raises PatchbankError where that was one."""
        if failed == 1:
            raise PatchbankError(
                f"{self.device} has not enough free memory for one image of {self.model.name}. Free some (nvidia-smi "
                "lists who uses it), or use another --device."
            )
        self.largest_batch = failed // 2
        self.notes = [note for note in self.notes if not note.startswith(_TOO_LARGE)]
        self.notes.append(
            f"{_TOO_LARGE} of {self.device}: {self.largest_batch} images at a time were computed. "
            "Give a smaller --batch-size next time."
        )

    def _products(self) -> contextlib.AbstractContextManager[None]:
        return float32_products("tf32" if self.precision == "tf32" else "ieee")

    def encode(self, images: Sequence[Image.Image], resize: ResizeMode = "center-crop") -> Tensor:
        """Patch tokens of opened images: (B, N, D) float32 on the CPU. As `__call__`, for a notebook."""
        pixels = [preprocess(image, resize, self.model.input_size) for image in images]
        return self(torch.from_numpy(np.stack(pixels))).cpu()


def _make(*made: Any) -> PatchEncoder:
    *first, batch_size, compiled = made
    return PatchEncoder(*first, batch_size=batch_size, compiled=compiled)


_SEVERAL = re.compile(r"(cpu|cuda):(\d+(?:,\d+)+)")


def resolve_devices(device: str, precision: Precision) -> list[torch.device]:
    """What a run computes on: ``cuda`` (and ``auto``, where there is one) is all GPUs, ``cuda:0,1`` two of them.

    Raises ConfigError as `resolve_device` does.
    """
    if several := _SEVERAL.fullmatch(device):
        indices = list(dict.fromkeys(int(index) for index in several[2].split(",")))
        return [resolve_device(f"{several[1]}:{index}", precision) for index in indices]
    first = resolve_device(device, precision)
    if device in ("auto", "cuda") and first.type == "cuda" and (count := torch.cuda.device_count()) > 1:
        return [torch.device("cuda", index) for index in range(count)]
    return [first]


def resolve_device(device: str, precision: Precision) -> torch.device:
    """``auto`` or a device's name to the device. Raises ConfigError if it is not there or cannot compute so."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"There is no device {device!r}. Use auto, cpu, cuda, cuda:N, or cuda:N,M for several."
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"The device {device!r} is not supported. Use auto, cpu, cuda or cuda:N.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices on this "
            "machine. Use --device cpu, or check the driver and that torch is a CUDA build."
        )
    check_precision(resolved, precision)
    return resolved


def check_precision(device: torch.device, precision: Precision) -> None:
    """Raise ConfigError where a kind of device does not compute so."""
    if device.type == "cpu" and precision in ("fp16", "tf32"):
        raise ConfigError(f"--precision {precision} needs CUDA. On the CPU use fp32, or bf16.")


def auto_batch_size(model: Model, device: torch.device) -> int:
    """Images a forward pass where none is asked for: about 64k tokens on a GPU, which fills one."""
    if device.type == "cpu":
        return 8
    return int(min(256, 1 << ((65536 // (model.tokens + 1)).bit_length() - 1)))


def _check_memory(model: Model, batch_size: int, dtype: torch.dtype) -> None:
    """Raise ConfigError where a batch would not fit: a pass holds about 18 numbers for each of a token's width."""
    if not hasattr(os, "sysconf"):
        return
    needed = batch_size * (model.tokens + 1) * 18 * model.width * dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"--batch-size {batch_size:,} would need about {bytes_text(needed)} of memory, and this machine has "
            f"{bytes_text(memory)}. Leave it out: on the CPU, {auto_batch_size(model, torch.device('cpu'))} is enough."
        )


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    cpu: Any = torch.cpu
    amx = getattr(cpu, "_is_amx_tile_supported", lambda: False)()
    avx512 = getattr(cpu, "_is_avx512_bf16_supported", lambda: True)()
    return bool(amx or avx512) or platform.machine() in ("arm64", "aarch64")


@contextlib.contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
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
