"""The protocols of an encoder, and of its specification before the weights are loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

from patchbank.features import Identity, Input, Output

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Progress = Callable[[int, int], None]  # bytes of a download: received, in all (0 if the server does not say)


class Encoder(Protocol):
    """A frozen vision transformer on a device.

    Attributes:
        input: the pixels that it takes.
        outputs: name -> what it computes for each sample.
        identity: the fields that decide the numbers.

    An encoder whose attribute ``concurrent`` is True may be called by several threads at once: it keeps nothing of a
    call in itself. On the CPU the runner then computes a batch in parts, which is faster.
    """

    @property
    def input(self) -> Input: ...
    @property
    def outputs(self) -> Mapping[str, Output]: ...
    @property
    def identity(self) -> Identity: ...

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """Every output of a batch.

        Args:
            pixels: (B, h, w, 3) uint8 RGB on the encoder's device.

        Returns:
            name -> (B, ...) of the output's shape, in any float dtype, not normalised to unit length. Patch tokens are
            row-major and not yet merged as `input.pool` says: the runner does that.
        """
        ...


class Product(NamedTuple):
    """A matrix product of one sample's forward pass.

    Attributes:
        times: how often it is computed, one after the other.
        rows, inner, columns: its shape; for attention (tokens, head width, tokens), which stands for both products.
        kind: ``linear`` or ``attention``.
        heads: for attention, how many are computed at once.
    """

    times: int
    rows: int
    inner: int
    columns: int
    kind: Literal["linear", "attention"] = "linear"
    heads: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations each time: one multiplication and one addition per term."""
        return 2 * self.rows * self.inner * self.columns * (2 * self.heads if self.kind == "attention" else 1)


class Description(NamedTuple):
    """A model in a list of models, known without its weights.

    Attributes:
        name: as ``--model`` takes it.
        size: (h, w) of its input in pixels.
        grid: (Gh, Gw): rows and columns of patches.
        dim: of patch tokens.
        prefix: tokens before those of the patches: [CLS] and registers.
        text: whether it has a text tower.
    """

    name: str
    size: tuple[int, int]
    grid: tuple[int, int]
    dim: int
    prefix: int
    text: bool


class EncoderSpec(Protocol):
    """An encoder before its weights are loaded. Small, the same on every machine, and safe to send to other processes.

    Attributes:
        name: the model's, as ``--model`` takes it.
        input, outputs, identity: the encoder's.
        weights: their location, for people; None if they have to be downloaded first.
        sources: the paths and URLs where they are looked for, in order.
        untrained: whether the weights are known to be random numbers.
        products: the matrix products of one sample's forward pass; empty if a family does not count them.
        sample_bytes: memory that a forward pass takes per sample; 0 if a family does not say.
    """

    @property
    def name(self) -> str: ...
    @property
    def input(self) -> Input: ...
    @property
    def outputs(self) -> Mapping[str, Output]: ...
    @property
    def identity(self) -> Identity: ...
    @property
    def weights(self) -> str | None: ...
    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def untrained(self) -> bool: ...
    @property
    def products(self) -> Sequence[Product]: ...
    @property
    def sample_bytes(self) -> int: ...

    def obtain(self, progress: Progress | None = None) -> Self:
        """The same specification with its weights on this machine; downloads them if necessary. Raises WeightsError."""
        ...

    def load(self, device: torch.device, batch_size: int) -> Encoder:
        """The encoder on a device, tuned for batches of this size. Raises WeightsError."""
        ...


def flops(spec: EncoderSpec) -> int:
    """Floating-point operations of one sample's products."""
    return sum(each.times * each.flops for each in spec.products)
