"""`torch.compile` for the encoder: when it pays, and what is done where it fails."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from patchbank.config import Compile
from patchbank.models import Model

# Floating-point operations from which compiling pays on a GPU, with an ample margin: compiling takes about a minute and
# saves about a fifth of a run (public figures; field reports of 20 to 30 %), at 4e14 operations a second.
_WORTH_ON_CUDA = 1.2e17

Forward = Callable[[Tensor], Tensor]


def decide(choice: Compile, model: Model, images: int, device: torch.device) -> bool:
    """Whether a bank of so many images is made with the compiled encoder.

    ``auto`` never compiles on the CPU: the layers' packed products with what is fused into them (`encoder.linear`) are
    faster than what the compiler makes there (docs/performance.md).
    """
    if choice == "auto":
        return device.type == "cuda" and images * model.flops > _WORTH_ON_CUDA
    return choice == "on"


def compile_forward(forward: Forward, pixels: Tensor) -> tuple[Forward, str | None]:
    """Compile a tower and run it once, on a batch of the shape that it is for.

    Returns what to call, and a sentence on why that is not compiled, if so.
    """
    compiled = torch.compile(forward, mode="reduce-overhead" if pixels.device.type == "cuda" else None)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # The compiler's own, on what it would have liked better, or misses on a machine without CUDA.
            warnings.simplefilter("ignore")
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            compiled(pixels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler, the C++ compiler or the driver raise
        torch.compiler.reset()
        return forward, f"The encoder could not be compiled ({_reason(error)}); it runs uncompiled."
    return compiled, None


def _reason(error: BaseException) -> str:
    """What is wrong, in a line."""
    if "No working C++ compiler" in str(error):
        return f"no C++ compiler works: install {os.environ.get('CXX', 'g++')}, or set CXX"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:200]
