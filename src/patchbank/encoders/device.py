"""Devices: names to devices, what each can compute in, and float32 products in full precision."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch

from patchbank.config import Precision
from patchbank.encoders.base import EncoderSpec
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


def auto_batch_size(grid: tuple[int, int], device: torch.device) -> int:
    """Samples of a forward pass where the user gives no number: about 64k tokens on a GPU, which fill one."""
    if device.type == "cpu":
        return 8
    return int(min(256, 1 << ((65536 // (grid[0] * grid[1])).bit_length() - 1)))


def check_memory(spec: EncoderSpec, batch_size: int) -> None:
    """Raise ConfigError where a batch would not fit into this machine's memory."""
    if not hasattr(os, "sysconf"):
        return
    needed = batch_size * spec.sample_bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"--batch-size {batch_size:,} needs about {bytes_text(needed)} of memory, and this machine has "
            f"{bytes_text(memory)}. Leave it out: on the CPU, {auto_batch_size(spec.input.grid, torch.device('cpu'))} "
            "is enough."
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
