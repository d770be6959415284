"""A linear layer fused with its activation or residual: on the CPU by oneDNN, with weights packed once.

torch multiplies float32 on the CPU with MKL, which uses less than half of what some of AMD's cores can do, and packs
the weights at every call. oneDNN's kernels are fast on any processor, and take packed weights, an activation and a
residual. `torch.compile` reaches them too, after half a minute, but in float32 goes to MKL again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

# oneDNN's names: the attribute, and the algorithm. "none" is GELU by the error function, as in `F.gelu`.
_FUSED = {"none": ("none", ""), "silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
Activation = Literal["none", "silu", "gelu", "gelu_tanh"]
_QUICK = 1.702  # QuickGELU's factor
# The libraries' names of layers, and how they are computed.
_ACTIVATIONS: dict[str, Activation] = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "SiLU": "silu", "QuickGELU": "silu"}

# The name of a class -> the names of its first linear layer, of the activation after it, and of the layer after that.
Mlps = Mapping[str, tuple[str, str, str]]


class Linear(nn.Module):
    """y = x Wᵀ + b, then an activation, or the sum with a residual. ``gelu`` is the exact one."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        activation: Activation = "none",
    ) -> None:
        """`weight` (out, in) and `bias` (out,) may have any dtype; they are stored in `dtype`."""
        super().__init__()
        self.activation, self.dtype = activation, dtype
        self.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self._handle: int | None = None

    def pack(self, rows: int) -> None:
        """Reorder the weights as oneDNN multiplies them, for products of about this many rows.

        Does nothing if torch was built without oneDNN.
        """
        if self.weight.device.type != "cpu":
            return
        try:
            self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        except (AttributeError, RuntimeError):  # not on this processor, or not in this build of torch
            return
        self._features = self.weight.shape[0]
        self.weight = None  # type: ignore[assignment]
        self._handle = next(_handles)
        _layers[self._handle] = self

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., in), residual (..., out) -> (..., out) in the residual's dtype. Overwrites the residual."""
        x = x.to(self.dtype)
        fused = residual if residual is not None and residual.dtype == x.dtype else None
        if self._handle is not None:
            if torch.compiler.is_compiling():
                x = _packed_linear(x, fused, self._handle, self._features)
            else:  # the custom operator would import the compiler, which takes seconds
                x = self.packed(x, fused)
            if residual is not None:
                x = x.to(residual.dtype)  # the CPU adds different dtypes more slowly than it converts and adds
        else:
            fused = None
            x = F.linear(x, self.weight, self.bias)
            if self.activation == "silu":
                x = F.silu(x, inplace=True)
            elif self.activation != "none":
                x = F.gelu(x, approximate=_FUSED[self.activation][1])
        return x if residual is None or residual is fused else residual.add_(x)

    def packed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` with the packed weights."""
        out: Tensor
        if residual is not None:
            out = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")
        else:
            name, algorithm = _FUSED[self.activation]
            out = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], algorithm)
        return out


# A custom operator for `torch.compile` alone: packed weights are opaque to it, so it sees a layer's number instead.
_handles = itertools.count()
_layers: WeakValueDictionary[int, Linear] = WeakValueDictionary()


@library.custom_op("patchbank::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, residual: Tensor | None, layer: int, features: int) -> Tensor:  # noqa: ARG001
    return _layers[layer].packed(x, residual)


@_packed_linear.register_fake
def _(x: Tensor, residual: Tensor | None, layer: int, features: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], features)


class PatchEmbedding(nn.Module):
    """A convolution whose kernel is as large as its stride: one product for each patch."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.sides = conv.kernel_size
        self.linear = Linear(conv.weight.flatten(1), conv.bias, dtype)
        self.weight = torch.empty(0)  # libraries read the dtype that it takes

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, width, Gh, Gw), channels last in memory."""
        (batch, colours, h, w), (p, q) = x.shape, self.sides
        x = x[:, :, : h // p * p, : w // q * q]  # as a convolution passes over a rest
        x = x.view(batch, colours, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5)
        out: Tensor = self.linear(x.flatten(3)).permute(0, 3, 1, 2)
        return out


def pack_model(model: nn.Module, dtype: torch.dtype, rows: int, device: torch.device, mlps: Mlps) -> nn.Module:
    """A library's model with its linear layers replaced, to compute in `dtype` on a device; changes the model.

    Args:
        rows: of most products, as `Linear.pack` takes them.
        mlps: classes whose activations can be fused into the layers before them.
    """
    for parent in list(model.modules()):
        fused = _fuse(parent, *mlps[type(parent).__name__]) if type(parent).__name__ in mlps else {}
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                activation = fused.get(name, "none")
                setattr(parent, name, Linear(layer.weight, layer.bias, dtype, activation=activation))
            elif type(layer) is nn.Conv2d and layer.stride == layer.kernel_size and layer.padding == (0, 0):
                setattr(parent, name, PatchEmbedding(layer, dtype))
    model.to(device)
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.pack(rows)
    return model


def _fuse(mlp: nn.Module, first: str, act: str, second: str) -> dict[str, Activation]:
    """Make an MLP's activation an identity: the layer's name -> what it computes from now on; nothing if it cannot."""
    layer, activation = getattr(mlp, first), getattr(mlp, act)
    name = type(activation).__name__.removesuffix("Activation").removeprefix("Pytorch")  # transformers' names
    found = _ACTIVATIONS.get("GELUTanh" if getattr(activation, "approximate", "") == "tanh" else name)
    if type(layer) is not nn.Linear or found is None:
        return {}
    if name == "QuickGELU":
        if first == second or not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
            return {}  # the layer to divide is elsewhere, or something lies before it
        # x sigmoid(1.702 x) is silu(1.702 x) / 1.702.
        layer.weight.mul_(_QUICK)
        if layer.bias is not None:
            layer.bias.mul_(_QUICK)
        getattr(mlp, second).weight.div_(_QUICK)
    setattr(mlp, act, nn.Identity())
    return {first: found}
