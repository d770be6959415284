"""How fast do features reach a training loop? A DataLoader over pickles and over shards, with and without regions.

    python -m benchmarks.loading [--images 2000] [--workers 0,1,2,4] [--batch-size 32] [--rounds 3]

Features of ViT-B/16's shape, of random numbers, and 3.5 pairs an image as in HICO-DET's test split; no model is needed.
Variants, each in the order of a seeded shuffle:

- pickle.load: a Dataset that unpickles the original scripts' files, as EZ-HOI's reader does;
- pickles, shards float16: `FeatureDataset` of such a bank, tokens as stored;
- ... to float32: the same, tokens converted;
- ... one by one: the same, each sample read, converted and stacked by itself instead of batch by batch;
- ... regions: with ``human,object,union`` pooled.

Workers are started before and stay; an epoch counts. All variants run in turn; the median round counts. Files are in
the page cache: what is measured is the reading, not the disk. Prints a table and ends in one JSON line.
"""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.common import alternate, feature, finish, manifest_of, numbers, parser, print_table, seconds_of
from patchbank import Dataset, ExtractConfig, FeatureDataset, collate, load_dataset
from patchbank.bank.writer import BankWriter
from patchbank.datasets.hoi import HOITarget

_SIZE = (640, 480)
_ORIGINAL = "pickle.load"


class Pickles(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The original scripts' files with the same targets; workers get it pickled."""

    def __init__(self, directory: Path, dataset: Dataset) -> None:
        self.directory, self.dataset = directory, dataset
        self.pairs = dataset.pairs

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, HOITarget]:
        key = self.dataset.samples[index].key
        with open(self.directory / f"{key.split('.')[0]}_clip.pkl", "rb") as file:
            return pickle.load(file), self.pairs.target(key)


class OneByOne(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The samples of a FeatureDataset over shards, each read and converted by itself."""

    def __init__(self, samples: FeatureDataset) -> None:
        self.samples = samples
        self.pairs = samples.dataset.pairs if samples.dataset else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, HOITarget]:
        assert self.pairs is not None
        bank, key = self.samples.bank, self.samples.keys[index]
        target = self.pairs.target(key)
        target = replace(target, size=bank.size(key), transform=bank.transform(key))
        return bank[key].float(), target


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--images", type=int, default=2000)
    command.add_argument("--workers", type=numbers, default=[0, 1, 2, 4])
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--rounds", type=int, default=3)
    options = command.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        variants = _make(Path(directory), options.images)
        rates = {workers: _rates(variants, workers, options) for workers in options.workers}
    print_table(
        ["samples/s", *(f"{workers} workers" for workers in rates)],
        [[name, *(rates[workers][name] for workers in rates)] for name in variants],
    )
    finish(
        "loading",
        images=options.images,
        batch_size=options.batch_size,
        rounds=options.rounds,
        samples_per_second={str(workers): each for workers, each in rates.items()},
    )


def _rates(variants: dict[str, Any], workers: int, options: Any) -> dict[str, float]:
    """Samples per second of every variant with this many workers."""
    with ExitStack() as stack:
        loaders: dict[str, Callable[[], float]] = {}
        for name, samples in variants.items():
            loader = DataLoader(
                samples,
                options.batch_size,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
                collate_fn=collate,
                generator=torch.Generator().manual_seed(0),
            )
            stack.callback(setattr, loader, "_iterator", None)  # its workers end here
            _epoch(loader)  # workers are started, shards mapped
            loaders[name] = partial(seconds_of, partial(_epoch, loader))
        seconds = alternate(loaders, options.rounds)
    return {name: options.images / each for name, each in seconds.items()}


def _epoch(loader: Any) -> None:
    for _ in loader:
        pass


def _make(place: Path, images: int) -> dict[str, Any]:
    """The same features in every form; returns the Datasets over them."""
    keys = [f"HICO_test2015_{number:08}.jpg" for number in range(images)]
    dataset = load_dataset("hicodet", place, "test", annotations=_annotations(place, keys))
    (place / "original").mkdir()
    for layout, dtype in (("ezhoi", "float32"), ("shards", "float16")):
        config = ExtractConfig(layout=layout, dtype=dtype, resize="squash")  # type: ignore[arg-type]
        manifest = manifest_of(config, "hicodet", "test")
        tokens, dim = manifest.shape
        generator = torch.Generator().manual_seed(0)
        with BankWriter(place / layout, manifest, keys) as writer:
            for key in keys:
                every = torch.randn(1 + tokens, dim, generator=generator)
                writer.add([feature(key, every, _SIZE)], [])
                if layout == "ezhoi":
                    (place / "original" / f"{key.split('.')[0]}_clip.pkl").write_bytes(pickle.dumps(every[1:]))
    pickles, shards = (partial(FeatureDataset, place / layout, dataset) for layout in ("ezhoi", "shards"))
    regions = "human,object,union"
    return {
        _ORIGINAL: Pickles(place / "original", dataset),
        "pickles": pickles(),
        "pickles, regions": pickles(regions),
        "shards float16": shards(dtype=None),
        "shards float16, to float32": shards(),
        "shards float16, to float32, one by one": OneByOne(shards()),
        "shards float16, regions": shards(regions, dtype=None),
        "shards float16, to float32, regions": shards(regions),
    }


def _annotations(place: Path, keys: list[str]) -> Path:
    """HICO-DET's list, with three and four pairs in turn."""
    things = [{"bbox": [40 + 9 * each, 30, 300 + 9 * each, 400], "category_id": 1 + each} for each in range(5)]
    pairs = [{"subject_id": 0, "object_id": 1 + each, "category_id": 1 + each} for each in range(4)]
    entries = [
        {"file_name": key, "annotations": things, "hoi_annotation": pairs[: 3 + number % 2]}
        for number, key in enumerate(keys)
    ]
    path = place / "test_hico.json"
    path.write_text(json.dumps(entries))
    return path


if __name__ == "__main__":
    main()
