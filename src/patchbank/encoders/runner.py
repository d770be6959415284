"""An encoder at work on a device: batches of any size, memory that runs out, streams, `torch.compile`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank.config import ResizeMode
from patchbank.encoders.base import Encoder, EncoderSpec
from patchbank.encoders.compiling import Forward, compile_forward
from patchbank.encoders.device import auto_batch_size, check_memory, float32_products, has_bfloat16
from patchbank.errors import PatchbankError
from patchbank.preprocess import preprocess

_TOO_LARGE = "A batch did not fit into the memory"


class Runner:
    """Runs an encoder on one device.

    Attributes:
        spec: what it was loaded from.
        encoder: the encoder.
        device: where it computes.
        batch_size: samples of a forward pass that it is tuned for; it takes any number.
        largest_batch: samples that fit into the device's memory at once, as far as is known.
        notes: what a user should know of how it computes, a sentence each.
    """

    def __init__(
        self, spec: EncoderSpec, device: torch.device, *, batch_size: int | None = None, compiled: bool = False
    ) -> None:
        """Load an encoder. Raises WeightsError, and ConfigError where this machine has no memory for a batch."""
        self.spec = spec
        self.device = device
        self.batch_size = batch_size or auto_batch_size(spec.input.grid, device)
        if device.type == "cpu":
            check_memory(spec, self.batch_size)
        self.largest_batch = self.batch_size
        self.notes: list[str] = []
        self._copies: torch.cuda.Stream | None = None
        self._tf32 = spec.identity.get("precision") == "tf32"
        self.encoder: Encoder = spec.load(device, self.batch_size)
        self._compiled: Forward | None = None  # for batches of exactly `batch_size`
        if spec.identity.get("precision") == "bf16" and device.type == "cpu" and not has_bfloat16():
            self.notes.append(
                "This processor has no bfloat16 instructions (AMX or AVX512-BF16): --precision bf16 is slower here "
                "than fp32, and less exact."
            )
        if compiled:
            self._compile()

    def _compile(self) -> None:
        blank = torch.zeros(self.batch_size, *self.spec.input.size, 3, dtype=torch.uint8, device=self.device)
        with self._products():
            forward, failure = compile_forward(self.encoder, blank)
        if failure:
            self.notes.append(failure)
        else:
            self._compiled = forward

    @property
    def compiled(self) -> bool:
        """Whether `torch.compile` made what batches of `batch_size` pass through."""
        return self._compiled is not None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets what it was made from, and not the weights as this machine has packed them."""
        return _make, (self.spec, self.device, self.batch_size, self.compiled)

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every output of a batch.

        Args:
            pixels: (B, h, w, 3) uint8 RGB of the input's size, on any device.

        Returns:
            name -> (B, ...) float32 on the encoder's device, not normalised to unit length; patch tokens are row-major.
            No gradient leads back through the encoder.

        Raises:
            ValueError: the pixels have another shape or dtype.
        """
        shape = (*self.spec.input.size, 3)
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != shape:
            raise ValueError(
                f"pixels must be uint8 (B, {', '.join(map(str, shape))}), not {pixels.dtype} {tuple(pixels.shape)}"
            )
        if not len(pixels):
            return {name: torch.empty(0, *each.shape, device=self.device) for name, each in self.spec.outputs.items()}
        left = list(torch.split(pixels, self.largest_batch))
        done: list[dict[str, Tensor]] = []
        while left:
            with contextlib.suppress(torch.OutOfMemoryError):
                done.append(self._pass(left[0]))
                left.pop(0)
                continue
            # Here the failed pass is forgotten, and its memory is free again.
            self._halve(len(left[0]))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            left = [half for part in left for half in torch.split(part, self.largest_batch)]
        if len(done) == 1:
            return done[0]
        return {name: torch.cat([each[name] for each in done]) for name in done[0]}

    def submit(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], dict[str, Tensor]]:
        """Begin a batch, as `__call__`; on CUDA, return before it is done.

        Returns:
            A function that waits for the outputs, on the CPU and rounded to `dtype`.
        """
        outputs = {name: value.to(dtype) for name, value in self(pixels).items()}
        if self.device.type != "cuda":
            return lambda: outputs
        # On a stream of its own, so that the next batch is computed while this one is copied.
        self._copies = self._copies or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        received: dict[str, Tensor] = {}
        with torch.cuda.stream(self._copies):
            for name, value in outputs.items():
                received[name] = torch.empty(value.shape, dtype=dtype, pin_memory=True).copy_(value, non_blocking=True)
                value.record_stream(self._copies)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._copies)

        def wait() -> dict[str, Tensor]:
            done.synchronize()
            return received

        return wait

    def encode(self, images: Sequence[Image.Image], resize: ResizeMode | None = None) -> dict[str, Tensor]:
        """Every output of opened images, float32 on the CPU: for a notebook."""
        pixels = [preprocess(image, self.spec.input, resize) for image in images]
        return {name: value.cpu() for name, value in self(torch.from_numpy(np.stack(pixels))).items()}

    def _pass(self, pixels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), self._products():
            whole = len(pixels) == self.batch_size
            forward = self._compiled if whole and self._compiled is not None else self.encoder
            outputs = forward(pixels.to(self.device, non_blocking=True))
            # A compiled forward pass on CUDA gives the same memory each time.
            return {name: value.to(torch.float32, copy=self.compiled) for name, value in outputs.items()}

    def _halve(self, failed: int) -> None:
        """After so many samples did not fit into the device's memory. Raises PatchbankError where that was one."""
        if failed == 1:
            raise PatchbankError(
                f"{self.device} has not enough free memory for one image of {self.spec.name}. Free some (nvidia-smi "
                "lists who uses it), or use another --device."
            )
        self.largest_batch = failed // 2
        self.notes = [note for note in self.notes if not note.startswith(_TOO_LARGE)]
        self.notes.append(
            f"{_TOO_LARGE} of {self.device}: {self.largest_batch} images at a time were computed. "
            "Give a smaller --batch-size next time."
        )

    def _products(self) -> contextlib.AbstractContextManager[None]:
        return float32_products("tf32" if self._tf32 else "ieee")


def _make(spec: EncoderSpec, device: torch.device, batch_size: int, compiled: bool) -> Runner:
    return Runner(spec, device, batch_size=batch_size, compiled=compiled)
