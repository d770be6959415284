"""What does each stored dtype cost and lose? Bytes an image and relative error, on photographs, with untrained weights.

    python -m benchmarks.dtypes [--model ViT-L/14@336px]

Prints a table (docs/bank-format.md has it) and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
from pathlib import Path
from typing import get_args

import torch
from tests.support import photographs, relative_error

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.convert import convert
from patchbank.config import StoredDtype
from patchbank.encoder.untrained import write_untrained
from patchbank.models import get_model

_IMAGES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/16")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        weights, images, whole = (Path(directory, name) for name in ("untrained.pt", "images", "float32"))
        write_untrained(get_model(options.model), weights)
        photographs(images, _IMAGES, size=(390, 280))
        config = ExtractConfig(model=options.model, weights=weights, layout="shards")
        extract(load_dataset("folder", images), whole, config)
        exact = open_bank(whole)
        original = len(pickle.dumps(exact[next(iter(exact))]))  # as the original scripts save one image
        print(
            f"| {'dtype':9}| {'bytes':9}| {'of the pickle':14}| {'tokens':9}| {'[CLS]':9}| {'worst token cosine':19}|"
        )
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
            row = results[dtype]
            print(
                f"| {dtype:9}| {row['bytes']:<9,.0f}| {row['of_the_pickle']:<14.3f}| {row['tokens']:<9.1e}"
                f"| {row['cls']:<9.1e}| {row['cosine']:<13.7f}|"
            )
    facts = {"benchmark": "dtypes", "weights": "untrained", "model": options.model, "images": _IMAGES}
    print(json.dumps({**facts, "torch": torch.__version__, "dtypes": results}))


if __name__ == "__main__":
    main()
