"""What does it save to make two models' banks together, decoding each image once, and not one after the other?

    python -m benchmarks.two_models [--models ViT-B/16,ViT-B/32] [--precision fp32] [--images 48] [--rounds 3]

`one block` are encoders of one narrow block at 224 and 336 pixels, so that decoding is most of the work; the models
named have random weights. Both variants run in turn within one process; medians over the rounds count. Decoding is the
processor time of the decode threads. Ends in one JSON line.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from benchmarks.common import alternate, finish, hico_photographs, listed, parser, print_table
from patchbank import ExtractConfig, encoders, load_dataset
from patchbank.budget import ByteBudget, keep_freed_memory
from patchbank.datasets import Dataset, Sample
from patchbank.datasets.samples import Decoded, Failure
from patchbank.encoders.openai.registry import MODELS, get_model
from patchbank.extraction import pipeline
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute_all, load_runner
from patchbank.features import Input


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--models", type=listed, default=["ViT-B/16", "ViT-B/32"])
    command.add_argument("--precision", default="fp32")
    command.add_argument("--images", type=int, default=48)
    command.add_argument("--rounds", type=int, default=3)
    options = command.parse_args(arguments)
    keep_freed_memory()  # as the command line does
    small = [
        replace(get_model("ViT-B/16"), name=f"one-block-{side}", width=64, layers=1, input_size=side, output_dim=32)
        for side in (224, 336)
    ]
    results = {}
    with tempfile.TemporaryDirectory(prefix="patchbank-") as directory, mock.patch.dict(MODELS):
        MODELS.update({each.name: each for each in small})
        hico_photographs(Path(directory, "images"), options.images)
        dataset = load_dataset("folder", Path(directory, "images"))
        for title, names in (("one block", [each.name for each in small]), (", ".join(options.models), options.models)):
            configs = [ExtractConfig(model=name, precision=options.precision) for name in names]
            results[title] = _measure(dataset, configs, Path(directory, "banks"), options.rounds)
    rows = [[title, how, *each.values()] for title, found in results.items() for how, each in found.items()]
    print_table(["models", "banks", "s", "decoding, s"], rows)
    finish("two_models", images=options.images, rounds=options.rounds, precision=options.precision, results=results)


def _measure(
    dataset: Dataset, configs: Sequence[ExtractConfig], place: Path, rounds: int
) -> dict[str, dict[str, float]]:
    """Variant -> its median seconds, and those of its decode threads."""
    specs = [encoders.random(config) for config in configs]

    def plan(number: int) -> Any:
        return make_plan(dataset, place / str(number), configs[number], encoder=specs[number])

    runners = [load_runner(plan(number)) for number in range(len(specs))]
    worked: dict[str, list[float]] = {}

    def variant(name: str, passes: Sequence[Sequence[int]]) -> float:
        with _decoding() as decoding:
            began = time.perf_counter()
            for numbers in passes:
                summaries = execute_all([plan(each) for each in numbers], [runners[each] for each in numbers])
                assert all(each.images == len(dataset) for each in summaries)
            seconds = time.perf_counter() - began
        worked.setdefault(name, []).append(sum(decoding))
        shutil.rmtree(place)
        return seconds

    each, together = [[number] for number in range(len(specs))], [list(range(len(specs)))]
    variant("", together)  # the first is slower
    seconds = alternate(
        {
            "one after the other": lambda: variant("one after the other", each),
            "together": lambda: variant("together", together),
        },
        rounds,
    )
    return {name: {"seconds": seconds[name], "decoding_seconds": median(worked[name])} for name in seconds}


@contextmanager
def _decoding() -> Iterator[list[float]]:
    """Within the block, the processor seconds of each image's decoding."""
    seconds, load_all = list[float](), pipeline.load_all

    def timed(wanted: Mapping[Input, Sequence[Sample]], budget: ByteBudget) -> dict[Input, list[Decoded | Failure]]:
        began = time.thread_time()
        found = load_all(wanted, budget)
        seconds.append(time.thread_time() - began)
        return found

    with mock.patch.object(pipeline, "load_all", timed):
        yield seconds


if __name__ == "__main__":
    main()
