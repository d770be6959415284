"""How much of the annotated pairs does CLIP's centre crop cut off?

    python -m benchmarks.visible FILE [--model ViT-B/16]

FILE is an annotation file with its images' sizes, such as UPT's instances_test2015.json. Prints a table, and ends
in one JSON line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.common import finish, options_of, print_table
from patchbank import ExtractConfig, encoders, union_boxes
from patchbank.datasets.hoi_files import read_hoi

_WHOLE = 1 - 1e-6


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, file=True, model="ViT-B/16")
    taken, pairs = encoders.random(ExtractConfig(model=options.model)).input, read_hoi(options.file)
    lost: list[float] = []
    visible: dict[str, list[torch.Tensor]] = {"human": [], "object": [], "union": []}
    for key, size in pairs.sizes.items():
        transform = taken.transform(size)
        lost.append(1 - float(transform.visible_fraction([0, 0, *size])))
        target = pairs.target(key)
        for name, boxes in (
            ("human", target.boxes_h),
            ("object", target.boxes_o),
            ("union", union_boxes(target.boxes_h, target.boxes_o)),
        ):
            visible[name].append(transform.visible_fraction(boxes.double()))
    if not lost:
        raise SystemExit(f"{options.file} does not list its images' sizes.")
    shares = {
        name: {
            "leaves the crop": float((each < _WHOLE).double().mean()),
            "wholly outside": float((each == 0).double().mean()),
        }
        for name, each in ((name, torch.cat(parts)) for name, parts in visible.items())
    }
    print_table(
        [f"of the pairs; of the images' area, {np.mean(lost):.1%} is cut off on average", *shares["union"]],
        [[name, *(f"{x:.1%}" for x in each.values())] for name, each in shares.items()],
    )
    finish("visible", model=options.model, images=len(lost), area_cut_off=float(np.mean(lost)), shares=shares)


if __name__ == "__main__":
    main()
