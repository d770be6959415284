"""How fast a model could be on a machine: its matrix products alone, each by the fastest routine that torch has for it.

An encoder does these products and more (norms, softmax, activations, memory traffic), so its speed as a fraction of
this one says how much is left to be gained. The routines are measured, on this machine, as it is now: nothing here is
taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbank.config import Precision
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.base import Product as Shape
from patchbank.encoders.device import DTYPES, float32_products
from patchbank.encoders.packed import Linear

_TRIAL_SECONDS = 0.03  # for each routine, to choose the fastest
_SECONDS = 0.25  # for that one then
_HOPELESS = 2.0  # a routine whose first call takes so many times as long as the fastest one's is not tried again
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


def product_rate(spec: EncoderSpec, precision: Precision, device: torch.device, batch_size: int) -> Limit:
    """Measure an encoder's products in batches of this size; a few seconds on a CPU.

    float32 is IEEE's unless the precision is tf32.

    All repetitions multiply the same numbers, so that small weights stay in a cache longer than a model's do: the limit
    is rather too high than too low.
    """
    dtype = DTYPES[precision]
    products: list[Product] = []
    peak = 0.0
    with torch.no_grad(), float32_products(precision):
        for shape in spec.products:
            name = f"{shape.rows}x{shape.inner}x{shape.columns}"
            if shape.kind == "attention":
                name, routines = f"attention of {shape.rows}", _attention(shape, batch_size, dtype, device)
            else:
                routines = _linear(shape.rows * batch_size, shape.inner, shape.columns, dtype, device)
            routine, seconds = _fastest(routines, device)
            if shape.kind == "linear":
                peak = max(peak, shape.flops * batch_size / seconds)
            products.append(Product(name, shape.times, routine, seconds / batch_size, shape.flops))
    return Limit(tuple(products), peak)


def _linear(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Callable[[], Tensor]]:
    """The ways to multiply (rows, inner) with a layer's weights."""
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    straight = weight.t().contiguous()
    routines: dict[str, Callable[[], Tensor]] = {}
    if device.type == "cpu":
        packed = Linear(weight, None, dtype)
        packed.pack(rows)
        routines["packed"] = lambda: packed(x)
    return routines | {"mm": lambda: torch.mm(x, straight), "linear": lambda: F.linear(x, weight)}


def _attention(
    each: Shape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> Mapping[str, Callable[[], Tensor]]:
    """The ways to do one layer's two products: a batch at once, an image at a time, or fused with the softmax."""
    heads, tokens = each.heads, each.rows
    shape = (batch_size, heads, tokens, each.inner)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    scores = torch.rand(batch_size, heads, tokens, tokens, device=device).to(dtype)

    def products(images: int) -> Tensor:
        for first in range(0, batch_size, images):
            part = slice(first, first + images)
            torch.bmm(q[part].flatten(0, 1), k[part].flatten(0, 1).transpose(1, 2))
            out = torch.bmm(scores[part].flatten(0, 1), v[part].flatten(0, 1))
        return out

    return {
        "bmm": partial(products, batch_size),
        "bmm, an image at a time": partial(products, 1),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
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
