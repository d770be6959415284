"""Runs an encoder on a device: batches of any size, out of memory, streams, `torch.compile`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchbank import encoders
from patchbank.config import Activation, ExtractConfig, Precision, ResizeMode
from patchbank.encoders.base import Encoder, EncoderSpec
from patchbank.encoders.compiling import Forward, compile_forward
from patchbank.encoders.defaults import auto_batch_size
from patchbank.encoders.device import check_memory, float32_products, has_bfloat16, resolve_device
from patchbank.errors import PatchbankError, TogetherTooLargeError
from patchbank.features import is_grid
from patchbank.preprocess import preprocess

_PART = 4  # images: fewer are multiplied less efficiently
_TOO_LARGE = "A batch did not fit into the memory"


class Runner:
    """Runs an encoder on one device.

    Attributes:
        spec: what it was loaded from.
        encoder: the encoder.
        device: where it computes.
        batch_size: samples per forward pass that it is tuned for; it takes any number.
        largest_batch: samples that it passes at once; halved when the device's memory does not hold them.
        alone: whether no other encoder shares the device. If one does, too little memory is an error, and no reason to
            halve batches or not to compile: its numbers must not depend on the other.
        notes: what a user should know about how it computes, one sentence each.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        device: torch.device,
        *,
        batch_size: int | None = None,
        compiled: bool = False,
        alone: bool = True,
        stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Load an encoder; `stage` is called with what begins.

        Raises WeightsError; ConfigError if a batch needs more memory than this machine has; and TogetherTooLargeError,
        as a call does, if it is not alone and the device's memory does not hold all.
        """
        self.spec = spec
        self.device = device
        self.batch_size = batch_size or auto_batch_size(spec.input.patches, device.type)
        if device.type == "cpu":
            check_memory(spec, self.batch_size)
        self.largest_batch = self.batch_size
        self.alone = alone
        self.notes: list[str] = []
        self._copies: torch.cuda.Stream | None = None
        self._precision = spec.identity.get("precision", "")
        stage("loading and packing weights" if device.type == "cpu" else "loading weights")
        with self._together():
            self.encoder: Encoder = spec.load(device, self.batch_size)
        parted = device.type == "cpu" and getattr(self.encoder, "concurrent", False)
        self._threads = _Threads(self.batch_size) if parted else None
        self._compiled: Forward | None = None  # for batches of exactly `batch_size`
        if self._precision == "bf16" and device.type == "cpu" and not has_bfloat16():
            self.notes.append(
                "This processor has no bfloat16 instructions (AMX or AVX512-BF16): --precision bf16 is slower here "
                "than fp32, and less exact."
            )
        if compiled:
            stage("compiling")
            blank = torch.zeros(self.batch_size, *spec.input.size, 3, dtype=torch.uint8, device=device)
            with self._together(), float32_products(self._precision):
                raised = () if alone else torch.OutOfMemoryError
                self._compiled, notes = compile_forward(self.encoder, blank, raised)
            self.notes += notes

    @property
    def compiled(self) -> bool:
        """Whether batches of `batch_size` pass through the compiled encoder."""
        return self._compiled is not None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads the encoder itself: the weights are packed for this machine."""
        return partial(Runner, self.spec, self.device, batch_size=self.batch_size, compiled=self.compiled), ()

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every output of a batch.

        Args:
            pixels: (B, h, w, 3) uint8 RGB of the input's size, on any device.

        Returns:
            name -> (B, ...) float32 on the encoder's device, not normalised to unit length; patch tokens are row-major.
            No gradient leads back through the encoder.

        Raises:
            ValueError: the pixels have a wrong shape or dtype.
        """
        shape = (*self.spec.input.size, 3)
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != shape:
            raise ValueError(
                f"pixels must be uint8 (B, {', '.join(map(str, shape))}), not {pixels.dtype} {tuple(pixels.shape)}"
            )
        if not len(pixels):
            return {name: torch.empty(0, *each.shape, device=self.device) for name, each in self.spec.outputs.items()}
        done: list[dict[str, Tensor]] = []
        while len(pixels):
            part = pixels[: self.largest_batch]
            with contextlib.suppress(torch.OutOfMemoryError), self._together():
                done.append(self._pass(part))
                pixels = pixels[len(part) :]
                continue
            # Here the failed pass is forgotten, and its memory is free again.
            self._halve(len(part))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if len(done) == 1:
            return done[0]
        return {name: torch.cat([each[name] for each in done]) for name in done[0]}

    def submit(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], dict[str, Tensor]]:
        """Start a batch, as `__call__`; on CUDA, return before it is done.

        Returns:
            A function that waits for the outputs, on the CPU and rounded to `dtype`.
        """
        outputs = {name: value.to(dtype) for name, value in self(pixels).items()}
        if self.device.type != "cuda":
            return lambda: outputs
        # On a separate stream: the next batch is computed while this one is copied.
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
        """Every output of opened images, float32 on the CPU; for notebooks."""
        pixels = [preprocess(image, self.spec.input, resize) for image in images]
        return {name: value.cpu() for name, value in self(torch.from_numpy(np.stack(pixels))).items()}

    def _pass(self, pixels: Tensor) -> dict[str, Tensor]:
        forward = self._compiled if self._compiled and len(pixels) == self.batch_size else self.encoder
        with torch.no_grad(), float32_products(self._precision):
            if self._threads is not None and forward is self.encoder:
                forward = partial(self._threads, self.encoder)
            outputs = forward(pixels.to(self.device, non_blocking=True))
            # A compiled forward pass on CUDA gives the same memory each time.
            outputs = {name: value.to(torch.float32, copy=self.compiled) for name, value in outputs.items()}
            return {name: self._merged(name, value) for name, value in outputs.items()}

    def _merged(self, name: str, value: Tensor) -> Tensor:
        """An output with the patches of each square of `input.pool` merged: their mean."""
        made, side = self.spec.input, self.spec.input.pool
        if side == 1 or not is_grid(name, self.spec.outputs[name]):
            return value
        rows, columns = made.grid
        return value.view(len(value), rows, side, columns, side, -1).mean((2, 4)).flatten(1, 2)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Raise TogetherTooLargeError where the memory ends, if other encoders share it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.alone:
                raise
            raise TogetherTooLargeError(f"{self.device} has too little memory for several models at once.") from error

    def _halve(self, failed: int) -> None:
        """Halve the largest batch after `failed` samples ran out of memory. Raises PatchbankError if that was one."""
        if failed == 1:
            raise PatchbankError(
                f"{self.device} has not enough free memory for one image of {self.spec.name}. Free some (nvidia-smi "
                "lists who uses it), or use another --device."
            )
        self.largest_batch = failed // 2
        self.notes = [note for note in self.notes if not note.startswith(_TOO_LARGE)]
        self.notes.append(
            f"{_TOO_LARGE} of {self.device}, and was computed {self.largest_batch} images at a time. "
            "Use a smaller --batch-size next time."
        )


class _Threads:
    """A batch on the CPU in parts of a few images, each computed by one of several teams of cores.

    Cores that compute one operation together wait for the slowest after each, and so for whatever else runs, such as
    decode threads. Parts of a batch wait for each other once. They are the same whatever the number of cores.
    """

    def __init__(self, batch_size: int) -> None:
        self._parts = max(1, batch_size // _PART)
        self._size = -(-batch_size // self._parts)
        self._started: tuple[int, int] | None = None  # the process and the number of cores that the teams are of

    def __call__(self, encoder: Encoder, pixels: Tensor) -> dict[str, Tensor]:
        if self._started != (os.getpid(), torch.get_num_threads()):
            self._start()
        parts = list(self._pool.map(torch.no_grad()(encoder), torch.split(pixels, self._size)))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _start(self) -> None:
        cores = torch.get_num_threads()
        teams = max(range(1, self._parts + 1), key=lambda number: (self._busy(number, cores), number))
        self._pool = ThreadPoolExecutor(teams, "encoder", torch.set_num_threads, (max(1, cores // teams),))
        ready = Barrier(teams)
        try:
            list(self._pool.map(lambda _: ready.wait(), range(teams)))
        except BaseException:
            ready.abort()
            raise
        finally:
            torch.set_num_threads(cores)  # a thread begins with what any thread set for itself last
        self._started = os.getpid(), cores

    def _busy(self, teams: int, cores: int) -> float:
        """The share of the cores' time that so many teams compute in."""
        return self._parts / (-(-self._parts // teams) * teams) * (cores // teams * teams / cores)


def load_encoder(
    model: str = "ViT-B/16",
    *,
    weights: str | Path | None = None,
    checkpoints: str | Path | None = None,
    activation: Activation | None = None,
    round_weights: bool = False,
    precision: Precision = "fp32",
    output: Sequence[str] = (),
    input_size: int | tuple[int, int] | None = None,
    pool_grid: int = 1,
    device: str = "auto",
) -> Runner:
    """A model's encoder on a device: ``load_encoder("ViT-B/16").encode([image])["patch_tokens"]``.

    Args:
        model: a name as ``--model`` takes it.
        weights: a checkpoint; None finds the official one, and downloads it if necessary.
        checkpoints: the directory to search first.
        activation: of a checkpoint that does not say it.
        round_weights: round float32 weights to float16, as ``clip.load`` does.
        output: names as ``--output`` takes them; none: ``patch_tokens``, and ``cls`` if the model has one.
        input_size: of the input in pixels, (h, w) or both at once; None is the model's own.
        pool_grid: merge each N x N patches into their mean.

    Raises:
        WeightsError: the checkpoint is missing, damaged or another model's.
        ConfigError: the model, an output, the input size or the device does not exist, or it lacks the precision.
    """
    config = ExtractConfig(
        model=model,
        weights=None if weights is None else Path(weights),
        checkpoints=None if checkpoints is None else Path(checkpoints),
        activation=activation,
        round_weights=round_weights,
        precision=precision,
        output=tuple(output),
        input_size=input_size,  # type: ignore[arg-type]
        pool_grid=pool_grid,
        device=device,
    )
    return Runner(encoders.find(config).obtain(), resolve_device(device, precision))
