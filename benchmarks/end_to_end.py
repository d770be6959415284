"""How fast do images become files? patchbank's `extract`, the original scripts, and typical alternatives.

    python -m benchmarks.end_to_end [--model ViT-B/16,ViT-L/14@336px] [--precision fp32,bf16] [--images 200]
        [--original-images 32] [--rounds 3] [--workers N] [--device cuda] [--without NAME,NAME] [--directory DIR]
        [--batch-size N] [--compile on]

`--batch-size` and `--compile` are patchbank's; on CUDA, 4,000 images are the default.

The same JPEGs of HICO-DET's sizes, the same untrained weights, and in the end features on disk:

- original: the scripts' loop with OpenAI's package, one image at a time, `[1:]`, and `pickle.dump` of what that is: a
  view, whose file holds [CLS] too;
- original batched: its description's own variant, batches of 32 decoded in the loop, each image's features pickled as
  a view, so that every file holds the whole batch (see the bytes);
- original cloned: the same with `.clone()`, which fixes that;
- transformers, open_clip: batches of 32 out of a torch DataLoader with `--workers` processes, which start again with
  each run as patchbank's threads do; cloned and pickled;
- patchbank, patchbank fast, patchbank shards: as `patchbank extract` runs by default, into pickles; with
  `decode="fast"`; and into shards.

All but patchbank fast preprocess as OpenAI's package does. Peers compute and store in the precision named,
patchbank stores float32. The first two, which are slow or fill the disk, do only `--original-images` of the images in a
round. patchbank flushes every file to the disk before it counts as done, and checks that numbers are finite; the others
do neither. Not timed: loading models, listing images, and a first run of each over a few images, whose features are
compared with the original's in fp32.

Variants run in turn within one process; medians over the rounds count. The limit is what the model's matrix products
alone take (`patchbank.bench.limit`). Prints a table for each model and precision, and ends in one JSON line.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tests.support import relative_error
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.common import (
    alternate,
    batches,
    finish,
    hico_photographs,
    options_of,
    print_table,
    seconds_of,
    skipped,
    spec_of,
    untrained,
)
from patchbank import ExtractConfig, load_dataset, open_bank
from patchbank.bench.limit import product_rate
from patchbank.budget import keep_freed_memory
from patchbank.encoders.defaults import auto_batch_size
from patchbank.encoders.device import float32_products, resolve_device
from patchbank.encoders.openai.registry import get_model
from patchbank.extraction.advice import auto_workers
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute, load_runner

_BATCH = 32  # the description's
_WARM_UP = 2 * _BATCH  # images of the first run, which is not timed

# Images to (their features' directory); returns nothing.
Run = Callable[[Sequence[Path], Path], None]


class Variant(NamedTuple):
    """One way from images to files.

    Attributes:
        run: does it.
        images: how many of them a round.
        read: (directory, image) -> the stored feature.
    """

    run: Run
    images: int
    read: Callable[[Path, Path], Tensor]


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Preprocessed pictures and their numbers, for a DataLoader; workers get it pickled."""

    def __init__(self, paths: Sequence[Path], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.preprocess(image), index


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        place = Path(directory)
        images = hico_photographs(place / "images", options.images)
        for name in options.model:
            weights = untrained(get_model(name), place)
            for precision in options.precision:
                results[f"{name} {precision}"] = _measure(options, name, precision, weights, images, place)
    finish(
        "end_to_end",
        *peers.VERSIONS,
        device=options.device,
        images=options.images,
        original_images=options.original_images,
        rounds=options.rounds,
        workers=options.workers,
        results=results,
    )


def _options(arguments: Sequence[str] | None) -> Any:
    model = {"model": ["ViT-B/16"], "precision": ["fp32", "bf16"], "device": "cpu", "compile": "auto"}
    sizes = {"images": int, "original_images": 32, "rounds": 3, "workers": auto_workers(), "batch_size": int}
    options = options_of(__doc__, arguments, **model, **sizes, without=[], directory=Path)
    keep_freed_memory()  # as the command line does
    options.device = resolve_device(options.device, "fp32")
    options.images = options.images or (4000 if options.device.type == "cuda" else 200)
    options.original_images = min(options.images, options.original_images)
    return options


def _measure(
    options: Any, name: str, precision: str, weights: Path, images: Sequence[Path], place: Path
) -> dict[str, Any]:
    """Measure one model in one precision: print its table, and return its part of the JSON line."""
    model, device = get_model(name), options.device
    with torch.no_grad():
        towers = peers.towers(model, weights)
        original, preprocess = towers["original"], towers["original"].preprocess
        expected = {path: original(_load(preprocess, path))[0, 1:] for path in images[:2]}
    towers = {peer: peers.cast(tower, precision, device) for peer, tower in towers.items()}
    variants = _peers(towers, preprocess, device, options)
    config = ExtractConfig(
        model=name,
        weights=weights,
        precision=precision,  # type: ignore[arg-type]
        device=str(device),
        batch_size=options.batch_size,
        compile=options.compile,
        workers=options.workers,
    )
    variants |= _patchbank(config, images)
    variants = {each: variant for each, variant in variants.items() if each not in options.without}

    errors, sizes = {}, {}
    with torch.no_grad(), float32_products(precision):
        for each, variant in list(variants.items()):
            out, count = place / "out", min(variant.images, _WARM_UP)
            try:
                variant.run(images[:count], out)
                errors[each] = max(relative_error(variant.read(out, path), tokens) for path, tokens in expected.items())
                if "fast" not in each:  # other pixels
                    peers.check(each, errors[each], precision)
                sizes[each] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / count
            except Exception as error:  # any error of a peer
                if "patchbank" in each:
                    raise
                skipped(f"{each}, {precision}", error)
                del variants[each]
            shutil.rmtree(out, ignore_errors=True)
        measures = {each: partial(_timed, variant, images, place / "out", device) for each, variant in variants.items()}
        seconds = alternate(measures, options.rounds)
    limit = product_rate(
        spec_of(model, weights),
        config.precision,
        device,
        options.batch_size or auto_batch_size(model.grid, device.type),
    ).images_per_second

    rate = {each: variants[each].images / seconds[each] for each in variants}
    base = rate.get("original")
    print_table(
        [f"{name}, {precision}", "images", "images/s", "of the original's", "of the limit", "bytes each", "error"],
        [
            [
                each,
                variants[each].images,
                rate[each],
                base and rate[each] / base,
                rate[each] / limit,
                round(sizes[each]),
                errors[each],
            ]
            for each in variants
        ]
        + [["the limit: matrix products alone", None, limit, base and limit / base, 1, None, None]],
    )
    return {
        "limit_images_per_second": limit,
        "images_per_second": rate,
        "times_the_original": {each: base and rate[each] / base for each in rate},
        "of_the_limit": {each: rate[each] / limit for each in rate},
        "bytes_an_image": sizes,
        "relative_error": errors,
    }


def _timed(variant: Variant, images: Sequence[Path], out: Path, device: torch.device) -> float:
    os.sync()  # flush the previous variant's writes first
    seconds = seconds_of(lambda: variant.run(images[: variant.images], out), device)
    shutil.rmtree(out)
    return seconds


def _peers(
    towers: dict[str, nn.Module], preprocess: Callable[[Image.Image], Tensor], device: torch.device, options: Any
) -> dict[str, Variant]:
    encode = towers["original"]

    def loop(paths: Sequence[Path], out: Path) -> None:
        for path in paths:
            features = encode(_load(preprocess, path).to(device)).squeeze(0)[1:]
            _save(features, out, path)

    def batched(paths: Sequence[Path], out: Path, *, clone: bool) -> None:
        for batch in batches(paths, _BATCH):
            pixels = torch.cat([_load(preprocess, path) for path in batch]).to(device)
            features = encode(pixels)[:, 1:, :]
            for path, each in zip(batch, features, strict=True):
                _save(each.clone() if clone else each, out, path)

    def loader(tower: nn.Module, paths: Sequence[Path], out: Path) -> None:
        pictures = torch.utils.data.DataLoader(
            Pictures(paths, preprocess),
            batch_size=_BATCH,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )
        for pixels, numbers in pictures:
            features = tower(pixels.to(device, non_blocking=True))[:, 1:].cpu()
            for number, each in zip(numbers.tolist(), features, strict=True):
                _save(each.clone(), out, paths[number])

    few, every = options.original_images, options.images
    variants = {
        "original": Variant(loop, few, _read),
        "original batched": Variant(partial(batched, clone=False), few, _read),
        "original cloned": Variant(partial(batched, clone=True), every, _read),
    }
    for name in ("transformers", "open_clip"):
        if name in towers:
            variants[name] = Variant(partial(loader, towers[name]), every, _read)
    return variants


def _load(preprocess: Callable[[Image.Image], Tensor], path: Path) -> Tensor:
    """(1, 3, n, n)."""
    with Image.open(path) as image:
        return preprocess(image).unsqueeze(0)


def _save(features: Tensor, out: Path, path: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{path.stem}_clip.pkl", "wb") as file:
        pickle.dump(features, file)


def _read(out: Path, path: Path) -> Tensor:
    with open(out / f"{path.stem}_clip.pkl", "rb") as file:
        tokens: Tensor = pickle.load(file)
    return tokens.cpu().float()


def _patchbank(config: ExtractConfig, images: Sequence[Path]) -> dict[str, Variant]:
    dataset = load_dataset("folder", images[0].parent)
    configs = {
        "patchbank": replace(config, layout="ezhoi"),
        "patchbank fast": replace(config, layout="ezhoi", decode="fast"),
        "patchbank shards": replace(config, layout="shards"),
    }
    # All three take the one encoder, that of a run over all images: whether it is compiled can depend on their number.
    runner = load_runner(make_plan(dataset, images[0].parent / "nowhere", config))

    def run(config: ExtractConfig, paths: Sequence[Path], out: Path) -> None:
        part = replace(dataset, samples=dataset.samples[: len(paths)])
        summary = execute(make_plan(part, out, config), runner)
        if summary.images != len(paths):
            raise SystemExit(f"patchbank extracted {summary.images} of {len(paths)} images: {summary.failures}")

    def read(out: Path, path: Path) -> Tensor:
        return open_bank(out)[path.name].float()

    return {name: Variant(partial(run, each), len(images), read) for name, each in configs.items()}


if __name__ == "__main__":
    main()
