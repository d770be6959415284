"""Encoders whose forward pass is another library's: its own modules, with faster layers in them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchbank.config import Precision
from patchbank.encoders.attention import attention
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.device import DTYPES
from patchbank.encoders.outputs import Architecture, block_of
from patchbank.encoders.packed import Mlps, pack_model
from patchbank.features import CLS, POOLED, REGISTERS, is_grid


class LibraryEncoder(ABC):
    """A library's model on a device. An `Encoder`; a family says how its library's models are called.

    In bfloat16 and float16, linear layers and attention compute in that dtype, and norms and residuals in float32.

    Attributes:
        mlps: the library's MLPs, as `pack_model` takes them.
    """

    concurrent = True
    mlps: ClassVar[Mlps] = {}

    def __init__(
        self, spec: EncoderSpec, made: Architecture, model: nn.Module, device: torch.device, batch_size: int
    ) -> None:
        """`model` has its weights, in float32 on the CPU; it is changed."""
        self.input, self.outputs, self.identity = spec.input, spec.outputs, spec.identity
        self.made = made
        tokens = made.prefix + prod(spec.input.patches)
        model = model.requires_grad_(False).eval()
        self._dtype, self._device = DTYPES[cast(Precision, spec.identity["precision"])], device
        self.model = pack_model(model, self._dtype, batch_size * tokens, device, self.mlps)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.input.mean, spec.input.std))
        self._scale, self._shift = (1 / (255 * std)).to(device), (-mean / std).to(device)

    @abstractmethod
    def hidden(self, x: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
        """The tokens after some blocks, counted from 1, before any norm.

        (B, 3, h, w) normalised float32 -> block -> (B, T, width): [CLS], registers, patch tokens.
        """

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Tokens (B, T, width) after the last norm; the same if the model has none."""

    def project(self, x: Tensor) -> Tensor:
        """Normed tokens (B, T, width) in the space of images and texts; the same if the model has none."""
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Normed tokens of the last block (B, T, width) -> the library's own feature of the whole image (B, D)."""
        raise NotImplementedError

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, h, w, 3) uint8 on the device -> every output."""
        with self._mixed():
            return self._outputs(pixels)

    @contextlib.contextmanager
    def _mixed(self) -> Iterator[None]:
        """Where layers and products differ in dtype."""
        if self._dtype == torch.float32:
            yield
            return
        own = self._device.type == "cpu" and not torch.compiler.is_compiling()
        with torch.autocast(self._device.type, self._dtype), _Attention() if own else contextlib.nullcontext():
            yield

    def _outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        made = self.made
        asked = {name: block_of(name) or (made.blocks, False) for name in self.outputs}
        x = pixels.permute(0, 3, 1, 2).float() * self._scale + self._shift
        hidden = self.hidden(x, {block for block, _ in asked.values()})
        normed = {block: self.norm(hidden[block]) for block in {each for each, raw in asked.values() if not raw}}
        outputs: dict[str, Tensor] = {}
        for name, output in self.outputs.items():
            block, raw = asked[name]
            if name == POOLED:
                outputs[name] = self.pooled(normed[block])
                continue
            tokens = hidden[block] if raw else normed[block]
            if is_grid(name, output):
                tokens = tokens[:, made.prefix :]
            elif name == REGISTERS:
                tokens = tokens[:, made.cls : made.prefix]
            elif name == CLS:
                tokens = tokens[:, 0]
            outputs[name] = self.project(tokens) if output.projection else tokens
        return outputs


class _Attention(TorchFunctionMode):
    """`attention` in the place of torch's, which takes twice as long in bfloat16 on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = func is F.scaled_dot_product_attention and len(args) == 3 and not {"enable_gqa"} & kwargs.keys()
        if not plain or kwargs.get("attn_mask") is not None or kwargs.get("is_causal") or kwargs.get("dropout_p"):
            return func(*args, **kwargs)
        q, k, v = args
        if not q.dtype == k.dtype == v.dtype != torch.float32 or q.shape[1] != k.shape[1] or v.shape[3] != q.shape[3]:
            return func(*args, **kwargs)
        scale = kwargs.get("scale")
        x = attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        return x.view(*x.shape[:2], q.shape[1], -1).transpose(1, 2)
