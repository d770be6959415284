"""What do more outputs cost? The encode stage with one output, and with several of the same pass.

    python -m benchmarks.outputs [--model ViT-B/16] [--precision fp32,bf16] [--images 16] [--blocks 6]
        [--rounds 7] [--device cpu]

Random weights. Sets of outputs run in turn within one process; medians over the rounds count. On the CPU, one thread
computes, and its own time counts, which other programs do not lengthen. Ends in one JSON line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.common import alternate, finish, options_of, print_table, seconds_of
from patchbank import ExtractConfig, Runner, encoders
from patchbank.budget import keep_freed_memory
from patchbank.encoders.device import resolve_device
from patchbank.encoders.outputs import VARIANTS

ONE = "patch_tokens"


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(
        __doc__, arguments, model="ViT-B/16", precision=["fp32", "bf16"], device="cpu", images=16, blocks=6, rounds=7
    )
    keep_freed_memory()  # as the command line does
    device = resolve_device(options.device, "fp32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count = len(VARIANTS)
    results: dict[str, Any] = {}
    for precision in options.precision:
        blocks = tuple(f"block:{number}" for number in range(1, 1 + options.blocks))
        sets = {ONE: (ONE,), "cls, patch_tokens": ("cls", ONE), "blocks": (ONE, *blocks)}
        sets |= {f"blocks, {name}": (ONE, *blocks, name) for name in VARIANTS}
        sets[f"blocks, {count} variants"] = (ONE, *blocks, *VARIANTS)
        measures = {}
        for name, output in sets.items():
            config = ExtractConfig(model=options.model, precision=precision, output=output)
            runner = Runner(encoders.random(config), device)
            pixels = torch.randint(0, 256, (options.images, *runner.spec.input.size, 3), dtype=torch.uint8)
            measures[name] = partial(_seconds, partial(runner, pixels.to(device)), device)
        seconds = alternate(measures, options.rounds)
        cost = {name: each / seconds[ONE] for name, each in seconds.items()}
        print_table(
            [f"{options.model}, {precision}", "images/s", "time"],
            [[name, options.images / each, cost[name]] for name, each in seconds.items()],
        )
        results[precision] = {"images_per_second": {n: options.images / s for n, s in seconds.items()}, "cost": cost}
    torch.set_num_threads(threads)
    finish("outputs", "torch", model=options.model, device=device, rounds=options.rounds, results=results)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type != "cpu":
        return seconds_of(action, device)
    began = time.thread_time()
    action()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
