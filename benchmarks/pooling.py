"""How long does it take to pool regions? The mean over RoIAlign's bins, as a product and by torchvision's `roi_align`.

    python -m benchmarks.pooling [--boxes 10] [--images 1] [--device cpu] [--rounds 200]

Patch tokens of ViT-B/16's shape, of random numbers, on one thread of the CPU or on a GPU. Prints a table, and ends in
one JSON line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torchvision.ops import roi_align

from benchmarks.common import alternate, finish, options_of, print_table, seconds_of
from patchbank import ExtractConfig, encoders, pool_regions
from patchbank.features import GRID


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, boxes=10, images=1, device=torch.device("cpu"), rounds=200)
    spec, threads = encoders.random(ExtractConfig()), torch.get_num_threads()
    transforms = [replace(spec.input, resize="squash").transform((640, 480))] * options.images
    tokens = torch.randn(options.images, *spec.outputs[GRID].shape, device=options.device)
    corners = torch.rand(options.images, options.boxes, 2, 2).sort(dim=2).values * torch.tensor([640, 480])
    boxes = list(corners.reshape(options.images, options.boxes, 4).to(options.device))
    pictures = tokens.transpose(1, 2).unflatten(2, transforms[0].grid)
    on_grid = [transforms[0].boxes_to_grid(each) for each in boxes]
    variants = {
        "one product": lambda: pool_regions(tokens, boxes, transforms),
        "roi_align, then the mean": lambda: roi_align(pictures, on_grid, (7, 7), aligned=True).mean((2, 3)),
    }
    try:
        torch.set_num_threads(1)
        for pool in variants.values():
            pool()
        timed = {name: lambda pool=pool: seconds_of(pool, options.device) for name, pool in variants.items()}
        seconds = alternate(timed, options.rounds)
    finally:
        torch.set_num_threads(threads)
    print_table(["", "ms"], [[name, each * 1e3] for name, each in seconds.items()])
    finish("pooling", device=options.device, boxes=options.boxes, images=options.images, seconds=seconds)


if __name__ == "__main__":
    main()
