"""``patchbank extract pairs DATASET``: crops of annotated human-object pairs."""

from pathlib import Path
from typing import Annotated

import typer

from patchbank.cli import options
from patchbank.cli.extract import OUT, run_one
from patchbank.cli.options import DEFAULTS, RunOptions
from patchbank.config import ExtractConfig, option
from patchbank.errors import ConfigError
from patchbank.listing import ListingOptions

DETAILS = {
    "model": {"default_text": DEFAULTS.model},
    "output": {"default_text": "pooled, or cls where the model has none"},
}
_PAIRS = {"dtype": {"default_text": "float32; ADA-CM's file has float16"}}
RUN = ("model", "dry_run", "json")  # not --report, which shows grids of whole images


@options.takes(
    {"root": Path()},
    DETAILS | _PAIRS,
    asked=("root", "images", "annotations"),
    run=RUN,
    config=options.without_rounding(options.REGIONS),
)
def pairs(
    *,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="hicodet or vcoco.")],
    asked: ListingOptions,
    split: str | None = option(
        None,
        "train or test (hicodet), train or val (vcoco).",
        "Data",
        values=("train", "test", "val"),
        default_text="train",
    ),
    out: Path = OUT,
    run: RunOptions,
    config: ExtractConfig,
) -> None:
    """Extract annotated human-object pairs: of each, the human, the object and their union; and the whole images.

    `patchbank convert BANK FILE.p --layout ada-cm` makes the file that ADA-CM and its relatives read.

    patchbank extract pairs hicodet --root EZ-HOI --out BANK
    """
    from patchbank.datasets import SPLITS, load_dataset
    from patchbank.datasets.boxes import annotated_pairs

    if dataset not in SPLITS:
        raise ConfigError(f"There are no annotated pairs of {dataset!r}: name {' or '.join(SPLITS)}.")
    run_one(
        lambda: annotated_pairs(
            load_dataset(
                dataset,
                asked.root or Path(),
                split or "train",
                images=asked.images,
                annotations=asked.annotations,
            )
        ),
        out,
        run,
        config,
    )
