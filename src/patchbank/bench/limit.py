"""How fast an encoder could be on a machine: its matrix products alone, each by the fastest routine that torch has.

An encoder does these products and more (norms, softmax, activations, memory traffic), so its speed as a fraction of
this one says how much is left to be gained. The routines are measured, on this machine, as it is now: nothing here is
taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.base import Product as MatrixProduct
from patchbank.encoders.device import DTYPES, float32_products
from patchbank.encoders.packed import Linear

_TRIAL_SECONDS = 0.03  # for each routine, to choose the fastest
_SECONDS = 0.25  # for that one then
_HOPELESS = 2.0  # a routine whose first call takes so many times as long as the fastest one's is not tried again
_HEADS = 12  # of an image, at once
_CALLS_ON_CUDA = 20  # between two looks at the clock, so that it is the device that is timed and not the launching


@dataclass(frozen=True)
class Product:
    """One of a model's products, as it was measured; the attention's two are one entry.

    Attributes:
        name: its shape for one image, ``197x768x3072``: rows, inner, columns.
        count: how often the model has it.
        routine: the fastest.
        seconds: for one image, once.
        flops: of one image, once.
    """

    name: str
    count: int
    routine: str
    seconds: float
    flops: float


@dataclass(frozen=True)
class Limit:
    """What the matrix products of one image take.

    Attributes:
        products: each of them.
        peak: floating-point operations a second in the fastest linear layer.
    """

    products: tuple[Product, ...]
    peak: float

    @property
    def seconds(self) -> float:
        """For all products of one image."""
        return sum(product.count * product.seconds for product in self.products)

    @property
    def images_per_second(self) -> float:
        """What an encoder would reach that did nothing but its products."""
        return 1 / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Over all products."""
        return sum(product.count * product.flops for product in self.products) / self.seconds


def product_rate(spec: EncoderSpec, device: torch.device, batch_size: int) -> Limit:
    """Measure an encoder's products in batches of this size, in its precision; a few seconds on a CPU.

    All repetitions multiply the same numbers, so that small weights stay in a cache longer than a model's do: the limit
    is rather too high than too low.
    """
    precision: Any = spec.identity["precision"]
    dtype = DTYPES[precision]
    products: list[Product] = []
    peak = 0.0
    with torch.no_grad(), float32_products("tf32" if precision == "tf32" else "ieee"):
        for each in spec.products:
            ways = _linear if each.kind == "linear" else _attention
            at_once = batch_size if each.kind == "linear" else batch_size * _HEADS
            routine, seconds = _fastest(ways(each, at_once, dtype, device), device)
            if each.kind == "linear":
                peak = max(peak, each.flops * at_once / seconds)
            name = f"{each.rows}x{each.inner}x{each.columns} {each.kind}"
            products.append(Product(name, each.times, routine, seconds / at_once, each.flops))
    return Limit(tuple(products), peak)


def _linear(
    product: MatrixProduct, samples: int, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Callable[[], Tensor]]:
    """The ways to multiply a batch with a layer's weights."""
    rows = product.rows * samples
    x = torch.randn(rows, product.inner, device=device).to(dtype)
    weight = torch.randn(product.columns, product.inner, device=device).to(dtype)
    straight = weight.t().contiguous()
    routines: dict[str, Callable[[], Tensor]] = {}
    if device.type == "cpu":
        packed = Linear(weight, None, dtype)
        packed.pack(rows)
        routines["packed"] = lambda: packed(x)
    return routines | {"mm": lambda: torch.mm(x, straight), "linear": lambda: F.linear(x, weight)}


def _attention(
    product: MatrixProduct, heads: int, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Callable[[], Tensor]]:
    """The ways to do the two products of attention: all heads at once, some at a time, or fused with the softmax."""
    tokens, width = product.rows, product.inner
    q, k, v = (torch.randn(heads, tokens, width, device=device).to(dtype) for _ in range(3))
    scores = torch.rand(heads, tokens, tokens, device=device).to(dtype)

    def products(at_once: int) -> Tensor:
        for first in range(0, heads, at_once):
            part = slice(first, first + at_once)
            torch.bmm(q[part], k[part].transpose(1, 2))
            out = torch.bmm(scores[part], v[part])
        return out

    fused = partial(F.scaled_dot_product_attention, *(each.view(-1, _HEADS, tokens, width) for each in (q, k, v)))
    return {
        "bmm": partial(products, heads),
        "bmm, an image at a time": partial(products, _HEADS),
        "scaled_dot_product_attention": fused,
    }


def _fastest(routines: Mapping[str, Callable[[], Tensor]], device: torch.device) -> tuple[str, float]:
    """The fastest routine, and the seconds that it takes at its best."""
    tried: dict[str, float] = {}
    for name, routine in routines.items():
        first = _timed(routine, device, 1)
        hopeless = tried and first > max(_HOPELESS * min(tried.values()), _TRIAL_SECONDS)
        tried[name] = first if hopeless else _best(routine, device, _TRIAL_SECONDS)
    name = min(tried, key=lambda each: tried[each])
    return name, min(tried[name], _best(routines[name], device, _SECONDS))


def _best(routine: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    """The shortest time of one call, of as many as take about so long together."""
    calls = _CALLS_ON_CUDA if device.type == "cuda" else 1
    ends = time.perf_counter() + seconds
    best = _timed(routine, device, calls)
    while time.perf_counter() < ends:
        best = min(best, _timed(routine, device, calls))
    return best


def _timed(routine: Callable[[], Tensor], device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        routine()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / calls
