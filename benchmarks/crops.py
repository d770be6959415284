"""Are features of boxes bound by the encoder? Crops of images with ten boxes each, against the encode stage alone.

    python -m benchmarks.crops [--model ViT-B/16] [--precision fp32] [--images 16] [--boxes 10] [--rounds 3]

Random weights. A whole extraction (images decoded, boxes cut out, encoded, written and flushed) and the encoder on as
many inputs run in turn within one process; medians over the rounds count. Ends in one JSON line.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import alternate, finish, hico_photographs, options_of, print_table, untrained
from patchbank import ExtractConfig, load_dataset
from patchbank.budget import keep_freed_memory
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Sample, image_size
from patchbank.encoders.openai.registry import get_model
from patchbank.encoders.runner import Runner
from patchbank.extraction.devices import decide
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute
from patchbank.regions import Region, region_key


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, model="ViT-B/16", precision="fp32", images=16, boxes=10, rounds=3)
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(prefix="patchbank-") as directory:
        place = Path(directory)
        hico_photographs(place / "images", options.images)
        dataset = with_boxes(load_dataset("folder", place / "images"), options.boxes)
        weights = untrained(get_model(options.model), place)
        config = ExtractConfig(model=options.model, weights=weights, precision=options.precision, output=("cls",))
        plan = make_plan(dataset, place / "bank", config)
        device = torch.device(decide(config).names[0])
        runner = Runner(plan.encoder, device, batch_size=plan.manifest.batch_size)
        count, batch = len(dataset), plan.manifest.batch_size
        pixels = torch.randint(0, 256, (batch, *plan.manifest.input.size, 3), dtype=torch.uint8)

        def encode() -> float:
            began = time.perf_counter()
            for _ in range(-(-count // batch)):
                runner.submit(pixels, torch.float32)()
            return (time.perf_counter() - began) / (-(-count // batch) * batch)

        def whole() -> float:
            plan = make_plan(dataset, place / "bank", config)
            began = time.perf_counter()
            summary = execute(plan, runner)
            seconds = time.perf_counter() - began
            assert summary.images == count and not summary.failures
            shutil.rmtree(place / "bank")
            return seconds / count

        encode()
        seconds = alternate({"encode": encode, "extract": whole}, options.rounds)
    rates = {name: 1 / each for name, each in seconds.items()}
    ratio = rates["extract"] / rates["encode"]
    print_table(
        [f"{options.model}, {options.precision}: {options.images} images with {options.boxes} boxes", "boxes/s"],
        [
            ["the encoder alone", rates["encode"]],
            ["a whole extraction", rates["extract"]],
            ["... of the encoder's", ratio],
        ],
    )
    finish("crops", "torch", model=options.model, boxes_per_second=rates, ratio=ratio, rounds=options.rounds)


def with_boxes(dataset: Dataset, count: int) -> Dataset:
    """So many random boxes in each image, the same each time."""
    chance, samples = random.Random(0), list[Sample]()
    for image in dataset:
        width, height = image_size(image.path) or (1, 1)
        for number in range(count):
            x1, y1 = chance.uniform(0, 0.6 * width), chance.uniform(0, 0.6 * height)
            box = (x1, y1, x1 + chance.uniform(0.1, 0.4) * width, y1 + chance.uniform(0.1, 0.4) * height)
            key = region_key(image.key, f"box-{number}")
            samples.append(Sample(key, image.source, len(samples), None, Region(box)))
    return dataset.of(samples)


if __name__ == "__main__":
    main()
