"""`torch.compile` for the encoder: when it pays, and what is done where it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from patchbank.config import Compile
from patchbank.encoders.base import EncoderSpec, flops

# Floating-point operations from which compiling pays on a GPU. An estimate, not measured: compiling takes about a
# minute and saves about a fifth of a run, which at 4e14 operations a second is even at half of this.
_WORTH_ON_CUDA = 2.4e17

Forward = Callable[[Tensor], dict[str, Tensor]]


def decide(choice: Compile, spec: EncoderSpec, images: int, device: torch.device) -> bool:
    """Whether a bank of so many images is made with the compiled encoder.

    ``auto`` never compiles on the CPU: the layers' packed products with what is fused into them (`encoders.packed`) are
    faster than what the compiler makes there (docs/performance.md).
    """
    if choice == "auto":
        return device.type == "cuda" and images * flops(spec) > _WORTH_ON_CUDA
    return choice == "on"


def compile_forward(forward: Forward, pixels: Tensor) -> tuple[Forward, str | None]:
    """Compile a tower and run it once, on a batch of the shape that it is for.

    Returns what to call, and a sentence on why that is not compiled, if so.
    """
    # fullgraph: where torch would rather not compile (it has limits), it is to say so. dynamic: shapes are the batch's,
    # whatever was compiled before in this process, so that the numbers do not depend on that.
    mode = "reduce-overhead" if pixels.device.type == "cuda" else None
    compiled = torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)
    try:
        with _quiet(), torch.no_grad():
            compiled(pixels)
    except Exception as error:  # whatever the compiler, the C++ compiler or the driver raise
        return forward, f"The encoder could not be compiled ({_reason(error)}); it runs uncompiled."
    return compiled, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's own words, on what it would have liked better, or misses on a machine without CUDA."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """What is wrong, in a line."""
    if "No working C++ compiler" in str(error):
        return f"no C++ compiler works: install {os.environ.get('CXX', 'g++')}, or set CXX"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:200]
