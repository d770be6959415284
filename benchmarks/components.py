"""What do principal components cost and keep? Bytes an image, explained variance and errors of similarities.

    python -m benchmarks.components [--weights FILE [--model timm/vit_small_patch14_dinov2]] [--images 18]

On scikit-image's pictures, stored as float16. Without --weights the weights are untrained; `scripts/trained_weights.py`
fetches trained ones. The error of a similarity is of the cosine between two patches of one image, both less the bank's
mean, as a reduced bank's are; its root mean square. Also: seconds to fit a bank of random features, and the memory that
it took beyond the bank's reader. Prints a table (docs/guides/outputs.md has it) and ends in one JSON line.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tests.support import photograph

from benchmarks.common import feature, finish, manifest_of, options_of, print_table, seconds_of, untrained
from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.convert import convert
from patchbank.bank.reader import Bank
from patchbank.bank.reduction import fit
from patchbank.bank.writer import BankWriter
from patchbank.encoders.openai.registry import get_model

PICTURES = (  # no two of one scene
    *("astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(
        __doc__,
        arguments,
        model="ViT-B/16",
        weights=Path,
        images=len(PICTURES),
        components=[32, 64, 128, 256],
        random=2000,
    )
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        # First, since the peak of what comes later would hide its own.
        fitted = fit_random(place / "random", options.random, options.components[0])
        weights = options.weights or untrained(get_model(options.model), place)
        (place / "images").mkdir()
        for name in PICTURES[: options.images]:
            photograph(name).save(place / "images" / f"{name}.png")
        config = ExtractConfig(model=options.model, weights=weights, layout="shards", output=("patch_tokens",))
        extract(load_dataset("folder", place / "images"), place / "whole", config)
        exact = open_bank(place / "whole")
        half = convert(exact, place / "half", "shards", "float16", shard_size=config.shard_size)
        rows["all"] = {"bytes": size(open_bank(half.bank)), "explained": 1.0, "error": 0.0}
        width = exact.manifest.shape[-1]
        mean = torch.stack([exact[key].mean(0) for key in exact]).mean(0)
        for count in (each for each in options.components if each < width):
            place_of = place / str(count)
            made = convert(exact, place_of, "shards", "float16", shard_size=config.shard_size, components=count)
            reduced = open_bank(made.bank)
            assert reduced.manifest.reduction is not None
            errors = [cosines(reduced[key].float()) - cosines(exact[key] - mean) for key in exact]
            rows[str(count)] = {
                "bytes": size(reduced),
                "explained": reduced.manifest.reduction.explained,
                "error": float(torch.stack(errors).square().mean().sqrt()),
            }
    kind = "trained" if options.weights else "untrained"
    print_table(
        [
            f"components, of {width} of {options.model}, {kind}",
            "bytes an image",
            "explained variance",
            "RMS error of a similarity",
        ],
        [[name, round(row["bytes"]), f"{row['explained']:.1%}", row["error"]] for name, row in rows.items()],
    )
    print_table(
        ["fitted", "bank, MB", "s", "memory, MB"],
        [[f"{options.random} images", fitted["bank_bytes"] / 1e6, fitted["seconds"], fitted["memory_bytes"] / 1e6]],
    )
    finish("components", weights=kind, model=options.model, images=options.images, rows=rows, fit=fitted)


def size(bank: Bank) -> float:
    """Bytes an image."""
    return bank.bytes_on_disk() / len(bank)


def cosines(tokens: torch.Tensor) -> torch.Tensor:
    """Of each two of (N, D) tokens."""
    units = torch.nn.functional.normalize(tokens, dim=-1)
    return units @ units.T


def fit_random(place: Path, images: int, count: int) -> dict[str, float]:
    """Fit a bank of random features, ViT-B/16's in float16."""
    wanted = manifest_of(ExtractConfig(layout="shards", dtype="float16", shard_size=8_000_000))
    tokens, dim = wanted.outputs["patch_tokens"].shape
    keys = [f"{number:06}.jpg" for number in range(images)]
    with BankWriter(place, wanted, keys) as writer:
        for key in keys:
            writer.add([feature(key, torch.randn(tokens + 1, dim), (640, 480))], ())
    bank = open_bank(place, mmap=False)  # whose maps would count as memory
    for key in keys[:100]:
        bank.check(key)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = seconds_of(lambda: fit(bank, bank.manifest, count))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"bank_bytes": bank.bytes_on_disk(), "seconds": seconds, "memory_bytes": 1024 * grown}


if __name__ == "__main__":
    main()
