"""A model's speed limit on this machine: its matrix products alone, each with torch's fastest routine.

An encoder does more than these products (norms, softmax, activations, memory traffic): its speed as a fraction of the
limit shows the room for improvement. All routines are measured; nothing is taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from timeit import timeit

import torch
import torch.nn.functional as F
from torch import Tensor

from patchbank.config import Precision
from patchbank.encoders.base import EncoderSpec, Product
from patchbank.encoders.device import DTYPES, float32_products
from patchbank.encoders.packed import Linear

_TRIAL_SECONDS = 0.03  # for each routine, to choose the fastest
_SECONDS = 0.25  # for the fastest
_CALLS_ON_CUDA = 20  # between two looks at the clock, to time the device and not the launching

Routine = Callable[[], Tensor]


@dataclass(frozen=True)
class Limit:
    """What the matrix products of one image take.

    Attributes:
        seconds: for all products.
        flops: floating-point operations of all products.
        peak: floating-point operations a second in the fastest linear layer.
    """

    seconds: float
    flops: float
    peak: float

    @property
    def images_per_second(self) -> float:
        """The speed of an encoder that does its products and nothing else."""
        return 1 / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Over all products."""
        return self.flops / self.seconds


def product_rate(spec: EncoderSpec, precision: Precision, device: torch.device, batch_size: int) -> Limit:
    """Measure an encoder's products in batches of this size; a few seconds on a CPU.

    float32 is IEEE's unless the precision is tf32. All repetitions multiply the same numbers, so small weights stay in
    a cache longer than a model's: the limit may be too high, and is hardly too low.
    """
    dtype = DTYPES[precision]
    limit = Limit(0.0, 0.0, 0.0)
    with torch.no_grad(), float32_products(precision):
        for each in spec.products:
            routines = _attention if each.kind == "attention" else _linear
            seconds = _fastest(routines(each, batch_size, dtype, device), device) / batch_size
            peak = each.flops / seconds if each.kind == "linear" else 0.0
            limit = Limit(
                limit.seconds + each.times * seconds, limit.flops + each.times * each.flops, max(limit.peak, peak)
            )
    return limit


def _linear(each: Product, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[Routine]:
    """The ways to multiply (rows, inner) with a layer's weights."""
    rows, inner, columns = each.rows * batch_size, each.inner, each.columns
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    straight = weight.t().contiguous()
    routines: list[Routine] = [lambda: torch.mm(x, straight), lambda: F.linear(x, weight)]
    if device.type == "cpu":
        packed = Linear(weight, None, dtype)
        packed.pack(rows)
        routines.append(lambda: packed(x))
    return routines


def _attention(each: Product, batch_size: int, dtype: torch.dtype, device: torch.device) -> list[Routine]:
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

    fused = partial(F.scaled_dot_product_attention, q, k, v)
    return [partial(products, batch_size), partial(products, 1), fused]


def _fastest(routines: Sequence[Routine], device: torch.device) -> float:
    """The shortest time of the fastest routine, in seconds."""
    tried = [_best(each, device, _TRIAL_SECONDS) for each in routines]
    return min(*tried, _best(routines[tried.index(min(tried))], device, _SECONDS))


def _best(routine: Routine, device: torch.device, seconds: float) -> float:
    """The shortest time of one call, in seconds; repeats it for about `seconds`."""
    calls = _CALLS_ON_CUDA if device.type == "cuda" else 1

    def several() -> None:
        for _ in range(calls):
            routine()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    ends = time.perf_counter() + seconds
    times = [timeit(several, number=1)]  # the first warms up, where there are others
    while time.perf_counter() < ends or (len(times) == 1 and times[0] < 1):
        times.append(timeit(several, number=1))
    return min(times) / calls
