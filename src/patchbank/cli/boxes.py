"""``patchbank extract boxes IMAGES --boxes FILE``: crops of a detector's boxes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli import options
from patchbank.cli.extract import OUT, run_one
from patchbank.cli.options import RunOptions
from patchbank.cli.pairs import DETAILS, RUN
from patchbank.config import ARCHIVES, ExtractConfig, as_path, option
from patchbank.errors import ConfigError

if TYPE_CHECKING:
    from patchbank.datasets import Dataset

_DATA = "Data"


def _classes(texts: tuple[str, ...]) -> list[int] | None:
    try:
        return [int(each) for text in texts for each in text.split(",")] or None
    except ValueError:
        raise ConfigError(f"--classes takes numbers, such as 0,17, not {','.join(texts)!r}.") from None


@dataclass(frozen=True, kw_only=True)
class BoxOptions:
    """The options that name a detector's boxes."""

    boxes: Path | None = option(
        None,
        "The detector's boxes: COCO results (JSON), JSON Lines, or a dict of tensors by torch.save or pickle; the "
        "format is detected.",
        _DATA,
        metavar="FILE",
        parse=as_path,
    )
    min_score: float | None = option(None, "Least score of a box.", _DATA, metavar="SCORE")
    classes: tuple[str, ...] = option(
        (), "Classes to keep, by their numbers from 0: 0,17; repeatable.", _DATA, metavar="N,N", default_text=""
    )
    max_boxes: int | None = option(None, "Boxes of an image, at most: the best ones.", _DATA, minimum=1)

    def of(self, images: "Dataset", annotations: Path | None) -> "Dataset":
        """The boxes of these images; `annotations` names those that the detector numbers."""
        from patchbank.datasets.boxes import load_boxes

        assert self.boxes is not None
        return load_boxes(
            images,
            self.boxes,
            annotations=annotations,
            min_score=self.min_score,
            classes=_classes(self.classes),
            max_boxes=self.max_boxes,
        )


@options.takes({"boxes": ...}, DETAILS, run=RUN, config=options.REGIONS)
def boxes(
    *,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Directory of images; or tars, or Parquet files.")
    ],
    detected: BoxOptions,
    annotations: Path | None = option(
        None, "COCO file that names the images of results that number them.", _DATA, metavar="FILE", parse=as_path
    ),
    out: Path = OUT,
    run: RunOptions,
    config: ExtractConfig,
) -> None:
    """Extract a detector's boxes, under the keys IMAGE#box-N. COCO's category ids become the 80 classes from 0.

    patchbank extract boxes IMAGES --boxes results.json --out BANK
    """
    from patchbank.datasets import load_dataset

    kind = next((each for each in ARCHIVES if images[0].endswith(f".{each}")), "folder")
    if kind == "folder" and len(images) > 1:
        raise ConfigError("Give one directory of images, or several tars or Parquet files.")
    place = images if kind in ARCHIVES else images[0]
    run_one(lambda: detected.of(load_dataset(kind, place), annotations), out, run, config)
