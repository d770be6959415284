"""Devices: from name to device, the precisions of each, and float32 products in full precision."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from typing import Any

import torch

from patchbank.budget import machine_memory
from patchbank.config import Precision
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.defaults import auto_batch_size, check_precision
from patchbank.errors import ConfigError
from patchbank.files import bytes_text

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_SEVERAL = re.compile(r"(cpu|cuda):(\d+(?:,\d+)+)")


def resolve_devices(device: str, precision: Precision) -> list[torch.device]:
    """The devices of a run: ``cuda`` means all GPUs, as does ``auto`` on a machine with any; ``cuda:0,1`` two of them.

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
    """The device of a name, or of ``auto``. Raises ConfigError if it does not exist or lacks the precision."""
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
    check_precision(resolved.type, precision)
    return resolved


def check_memory(spec: EncoderSpec, batch_size: int) -> None:
    """Raise ConfigError if a batch would not fit into this machine's memory."""
    needed, (h, w), usual = batch_size * spec.sample_bytes, spec.input.size, auto_batch_size(spec.input.patches, "cpu")
    memory = machine_memory()
    if needed > memory:
        option, advice = f"--input-size {h}x{w}", "Choose a smaller one, or a smaller --batch-size."
        if batch_size > usual:
            option, advice = f"--batch-size {batch_size:,}", f"Leave it out: on the CPU, {usual} is enough."
        raise ConfigError(
            f"{option} needs about {bytes_text(needed)} of memory, and this machine has {bytes_text(memory)}. {advice}"
        )


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    cpu: Any = torch.cpu
    amx = getattr(cpu, "_is_amx_tile_supported", lambda: False)()
    avx512 = getattr(cpu, "_is_avx512_bf16_supported", lambda: True)()
    return bool(amx or avx512) or platform.machine() in ("arm64", "aarch64")


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """float32 products in TF32 if the encoder's precision is tf32, else in full, whatever the program has chosen."""
    chosen = "tf32" if precision == "tf32" else "ieee"
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        matmul, cudnn_tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if chosen == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = chosen == "tf32"
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = cudnn_tf32
        return
    cudnn: Any = torch.backends.cudnn  # torch's annotations lack what the documentation names
    mkldnn: Any = torch.backends.mkldnn
    backends = [torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee" if backend is mkldnn.matmul else chosen
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own
