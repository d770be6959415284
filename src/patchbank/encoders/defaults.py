"""What a plan decides by the kind of device, ``cpu`` or ``cuda``. Imports no torch."""

from __future__ import annotations

from patchbank.config import Compile, Precision
from patchbank.encoders.base import EncoderSpec, flops
from patchbank.errors import ConfigError

# Floating-point operations from which compiling pays on a GPU. An estimate, not measured: compiling takes about a
# minute and saves about a fifth of a run, which at 4e14 operations a second is even at half of this.
_WORTH_ON_CUDA = 2.4e17


def auto_batch_size(patches: tuple[int, int], kind: str) -> int:
    """The default number of samples per forward pass: about 64k tokens on a GPU, which keep it busy."""
    if kind == "cpu":
        return 8
    return int(min(256, 1 << ((65536 // (patches[0] * patches[1])).bit_length() - 1)))


def compiles(choice: Compile, spec: EncoderSpec, images: int, kind: str) -> bool:
    """Whether to compile the encoder for a bank of this many images.

    ``auto`` never compiles on the CPU: packed layers (`encoders.packed`) are faster than compiled ones there
    (docs/why/performance.md).
    """
    if choice == "auto":
        return kind == "cuda" and images * flops(spec) > _WORTH_ON_CUDA
    return choice == "on"


def check_precision(kind: str, precision: Precision) -> None:
    """Raise ConfigError if a kind of device does not compute in a precision."""
    if kind == "cpu" and precision in ("fp16", "tf32"):
        raise ConfigError(f"--precision {precision} needs CUDA. On the CPU use fp32, or bf16.")
