"""`torch.compile` for the encoder, and what happens when it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Forward = Callable[[Tensor], dict[str, Tensor]]


def compile_forward(
    forward: Forward, pixels: Tensor, raises: type[Exception] | tuple[()] = ()
) -> tuple[Forward | None, list[str]]:
    """Compile an encoder and run it once, on a batch of the shape that it will get.

    Returns the compiled encoder, or None and a note of one sentence that says why it could not be compiled. With
    `raises`, an error of this kind is raised instead.
    """
    # fullgraph: raise instead of silently running a part uncompiled. dynamic=False: compile for this shape, whatever
    # was compiled before in this process, so that the numbers do not depend on it.
    mode = "reduce-overhead" if pixels.device.type == "cuda" else None
    compiled = torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)
    try:
        with _quiet(), torch.no_grad():
            compiled(pixels)
    except raises:
        raise
    except Exception as error:  # from torch, the C++ compiler or the driver
        return None, [f"The encoder could not be compiled ({_reason(error)}); it runs uncompiled."]
    return compiled, []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the compiler's warnings, such as a missing CUDA toolkit."""
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
    """The error in one line."""
    if "No working C++ compiler" in str(error):
        return f"no C++ compiler works: install {os.environ.get('CXX', 'g++')}, or set CXX"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:200]
