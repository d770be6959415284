"""Multi-head attention, by the fastest way of the device and the dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORE_BYTES = 2 << 20  # of attention scores at a time: about a core's cache


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """Multi-head attention: softmax(scale q kᵀ + bias) v.

    Queries (B, heads, Q, head width), keys and values (B, heads, T, head width), bias (Q, T) -> (B, Q, width).
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.dtype != torch.float32:
        return _attention_on_cpu(q, k, v, scale, bias)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2).flatten(2)


def _attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Batched products of a few images at a time, so that the scores stay in the cache.

    In bfloat16 this takes half as long as torch's `scaled_dot_product_attention` (``python -m benchmarks.encoder``).
    """
    batch, heads, tokens, width = q.shape
    images = max(1, _SCORE_BYTES // (heads * tokens * k.shape[2] * q.itemsize))
    out = q.new_empty(batch, tokens, heads, width)
    for first in range(0, batch, images):
        some = slice(first, first + images)
        queries, keys, values = (each[some].flatten(0, 1) for each in (q, k, v))
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if scale != 1:
            scores *= scale
        if bias is not None:
            scores += bias
        x = torch.bmm(torch.softmax(scores, dim=-1), values)  # (images * heads, tokens, head width)
        out[some] = x.view(-1, heads, tokens, width).transpose(1, 2)
    return out.flatten(2)
