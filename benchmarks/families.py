"""How fast are other libraries' models? patchbank's encoder against the library's own eager forward pass.

    python -m benchmarks.families [--model NAME,NAME] [--precision fp32,bf16] [--batch-size 4] [--rounds 5]
        [--device cuda]

Random weights of the real size. "eager" is the library's ``forward_features`` of normalised pixels, all of it in the
precision; patchbank gets uint8 pixels. "six blocks" are six blocks' patch tokens beside those of the last, in one pass.
On the CPU, the processor's time is measured, which other programs disturb less than a clock's. Variants run in turn
within one process; medians over the rounds count. The limit is what the model's matrix products alone take
(`patchbank.bench.limit`): no speedup can be larger than the limit over eager. Ends in one JSON line; `speedup` is eager
over patchbank, and `six_blocks` that pass over the one for patch tokens alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from tests.support import relative_error

from benchmarks.common import alternate, finish, options_of, print_table, seconds_of
from patchbank import encoders
from patchbank.bench.limit import product_rate
from patchbank.budget import keep_freed_memory
from patchbank.config import ExtractConfig, Precision
from patchbank.encoders.device import DTYPES, float32_products, resolve_device
from patchbank.encoders.timm import TimmEncoder, TimmSpec
from patchbank.features import GRID

MODELS = ["vit_base_patch16_224", "vit_small_patch14_dinov2", "vit_base_patch16_dinov3", "eva02_base_patch16_clip_224"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(
        __doc__, arguments, model=MODELS, precision=["fp32", "bf16"], device="cpu", batch_size=4, rounds=5
    )
    keep_freed_memory()  # as the command line does
    device = resolve_device(options.device, "fp32")
    results = {}
    for name in options.model:
        for precision in options.precision:
            with torch.no_grad(), float32_products(precision):
                results[f"{name} {precision}"] = measure(name, precision, device, options.batch_size, options.rounds)
    print_table(
        ["", "eager", "patchbank", "six blocks", "limit", "of the limit", "speedup", "six blocks costs", "error"],
        [[name, *each["images_per_second"].values(), *list(each.values())[1:]] for name, each in results.items()],
    )
    finish("families", "timm", device=device, rounds=options.rounds, batch_size=options.batch_size, results=results)


def measure(name: str, precision: Precision, device: torch.device, batch_size: int, rounds: int) -> dict[str, Any]:
    """One model in one precision: its part of the JSON line."""
    eager = timm.create_model(name).eval()
    state = eager.state_dict()

    def spec_of(*outputs: str) -> TimmSpec:
        spec = encoders.random(ExtractConfig(model=f"timm/{name}", precision=precision, output=outputs))
        assert isinstance(spec, TimmSpec)
        return spec

    def encoder(*outputs: str) -> TimmEncoder:
        spec = spec_of(*outputs)
        model = timm.create_model(name)
        model.load_state_dict(state)
        return TimmEncoder(spec, spec.made, model, device, batch_size)

    one = encoder(GRID)
    blocks = one.made.blocks
    some = encoder(GRID, *(f"block:{block}" for block in sorted({max(1, blocks * part // 8) for part in range(2, 8)})))
    pixels = torch.randint(0, 256, (batch_size, *one.input.size, 3), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (one.input.mean, one.input.std))
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    exact = eager.to(device).forward_features(x)
    exact = (eager.head(exact) if one.made.projection else exact)[:, one.made.prefix :]
    error = relative_error(one(pixels)[GRID].float(), exact)
    eager, x = eager.to(DTYPES[precision]), x.to(DTYPES[precision])
    variants: dict[str, Callable[[], object]] = {
        "eager": partial(eager.forward_features, x),
        "patchbank": partial(one, pixels),
        "six blocks": partial(some, pixels),
    }
    for variant in variants.values():
        variant()
    seconds = alternate({name: partial(timed, variant, device) for name, variant in variants.items()}, rounds)
    limit = product_rate(spec_of(GRID), precision, device, batch_size).images_per_second
    return {
        "images_per_second": {name: batch_size / each for name, each in seconds.items()} | {"limit": limit},
        "of_the_limit": batch_size / seconds["patchbank"] / limit,
        "speedup": seconds["eager"] / seconds["patchbank"],
        "six_blocks": seconds["six blocks"] / seconds["patchbank"],
        "relative_error": error,
    }


def timed(action: Callable[[], object], device: torch.device) -> float:
    """The seconds of an action, as if all threads were its own."""
    if device.type != "cpu":
        return seconds_of(action, device)
    began = time.process_time()
    action()
    return (time.process_time() - began) / torch.get_num_threads()


if __name__ == "__main__":
    main()
