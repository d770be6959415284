"""``patchbank extract pairs DATASET``: crops of annotated human-object pairs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from patchbank.cli import options
from patchbank.cli.extract import OUT, run_jobs
from patchbank.cli.options import DEFAULTS, RunOptions
from patchbank.config import ExtractConfig, option
from patchbank.errors import ConfigError
from patchbank.listing import ListingOptions

_DETAILS = {
    "model": {"default_text": DEFAULTS.model},
    "output": {"default_text": "pooled, or cls where the model has none"},
    "dtype": {"default_text": "float32; ADA-CM's file has float16"},
}
_RUN = ("model", "dry_run", "json")  # not --report, which shows grids of whole images


@options.takes({"root": Path()}, _DETAILS, asked=("root", "images", "annotations"), run=_RUN, config=options.REGIONS)
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
    models = run.models(config, [DEFAULTS.model])
    if len(models) != 1:
        raise ConfigError("This command writes one bank; pass --model once.")
    run_jobs(
        lambda: [
            (
                annotated_pairs(
                    load_dataset(
                        dataset,
                        asked.root or Path(),
                        split or "train",
                        images=asked.images,
                        annotations=asked.annotations,
                    )
                ),
                out,
                replace(config, model=models[0]),
            )
        ],
        run,
    )
