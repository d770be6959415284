"""``patchbank extract boxes IMAGES --boxes FILE``: crops of a detector's boxes."""

from pathlib import Path
from typing import Annotated

import typer

from patchbank.cli import options
from patchbank.cli.extract import OUT, run_one
from patchbank.cli.options import RunOptions
from patchbank.cli.pairs import DETAILS, RUN
from patchbank.config import ARCHIVES, ExtractConfig, as_path, option
from patchbank.errors import ConfigError

_DATA = "Data"


def _classes(texts: tuple[str, ...]) -> list[int] | None:
    try:
        return [int(each) for text in texts for each in text.split(",")] or None
    except ValueError:
        raise ConfigError(f"--classes takes numbers, such as 0,17, not {','.join(texts)!r}.") from None


@options.takes({}, DETAILS, run=RUN, config=options.REGIONS)
def boxes(
    *,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Directory of images; or tars, or Parquet files.")
    ],
    boxes: Path = option(
        ...,
        "The detector's boxes: COCO results (JSON), JSON Lines, or a dict of tensors by torch.save or pickle; the "
        "format is detected.",
        _DATA,
        metavar="FILE",
        parse=as_path,
    ),
    annotations: Path | None = option(
        None, "COCO file that names the images of results that number them.", _DATA, metavar="FILE", parse=as_path
    ),
    min_score: float | None = option(None, "Least score of a box.", _DATA, metavar="SCORE"),
    classes: tuple[str, ...] = option(
        (), "Classes to keep, by their numbers from 0: 0,17; repeatable.", _DATA, metavar="N,N", default_text=""
    ),
    max_boxes: int | None = option(None, "Boxes of an image, at most: the best ones.", _DATA, minimum=1),
    out: Path = OUT,
    run: RunOptions,
    config: ExtractConfig,
) -> None:
    """Extract a detector's boxes, under the keys IMAGE#box-N. COCO's category ids become the 80 classes from 0.

    patchbank extract boxes IMAGES --boxes detections.json --min-score 0.2 --out BANK
    """
    from patchbank.datasets import load_dataset
    from patchbank.datasets.boxes import load_boxes

    kind = next((each for each in ARCHIVES if images[0].endswith(f".{each}")), "folder")
    if kind == "folder" and len(images) > 1:
        raise ConfigError("Give one directory of images, or several tars or Parquet files.")
    run_one(
        lambda: load_boxes(
            load_dataset(kind, images if kind in ARCHIVES else images[0]),
            boxes,
            annotations=annotations,
            min_score=min_score,
            classes=_classes(classes),
            max_boxes=max_boxes,
        ),
        out,
        run,
        config,
    )
