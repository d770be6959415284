"""A bank's page: one file that a browser opens from the disk, without a network."""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from patchbank import __version__
from patchbank.bank.runs import MOST_RUNS, Run, read_runs
from patchbank.config import PAGE_IMAGES
from patchbank.files import bytes_text, whole_file
from patchbank.listing import usual_dataset
from patchbank.locations import is_remote
from patchbank.show import gallery, statistics
from patchbank.show.charts import charts_of
from patchbank.show.names import grid_of_images, output_text, page_beside, plain, weights_of
from patchbank.show.statistics import Progress

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset

LARGEST = 25_000_000  # bytes of a page
_IMAGE = 75_000  # bytes of one image, at most
_REST = 1_000_000  # bytes for everything else
_FAILURES, _REASONS, _RUNS = 100, 20, 20  # listed; the rest is counted
_VERSIONS = 12  # libraries of a run, at most


@dataclass(frozen=True)
class Written:
    """A page that was written.

    Attributes:
        path: the file.
        bytes: its size.
        images: the number of images in the gallery.
        asked: the number of images asked for, or of the bank if that is smaller.
        error: the largest error of a similarity of two patches of an image.
        defects: the number of invalid features.
        wrong: the number of failed checks.
    """

    path: Path
    bytes: int
    images: int
    asked: int
    error: float
    defects: int
    wrong: int

    def _repr_html_(self) -> str:
        link = f'<a href="{quote(f"./{os.path.relpath(self.path)}")}">{escape(plain(self.path))}</a>'
        return f"{link} ({bytes_text(self.bytes)}, {self.images:,} images)"


def write_report(
    bank: Bank,
    path: str | Path | None = None,
    dataset: Dataset | None = None,
    *,
    sample: int = PAGE_IMAGES,
    seed: int = 0,
    read: int | None = None,
    output: str | None = None,
    progress: Progress | None = None,
    gallery_progress: Progress | None = None,
) -> Written:
    """Write a bank's page.

    Args:
        bank: from `open_bank`.
        path: the file; an existing one is replaced. None: ``BANK-report.html`` beside the bank.
        dataset: the bank's images, and their annotations if any; None: where they usually lie, if there.
        sample: the number of images in the gallery; fewer if the page would exceed 25 MB.
        seed: for the random choice of images; the same seed gives the same ones.
        read: the number of random features to read for the statistics; None: all.
        output: the output to show, a grid; None: the main one.
        progress: called with (features read, total).
        gallery_progress: called with (images of the gallery, total).

    Raises OSError if the file cannot be written, BankError if the output is not stored or is no grid of patches.
    """
    name = grid_of_images(bank, output)
    path = page_beside(bank.path) if path is None else Path(path).expanduser()
    if dataset is None:
        dataset = usual_dataset(bank.path, bank.manifest)
    keys = list(bank)
    chosen = keys if read is None or read >= len(keys) else sorted(gallery.choose(keys, [], read, seed))
    seen = statistics.collect(bank, name, chosen, progress)
    asked = min(sample, len(keys))
    outliers = [each.key for each in seen.outliers]
    images = _gallery(bank, name, dataset, gallery.choose(keys, outliers, asked, seed), gallery_progress)
    runs = read_runs(bank.path)
    checks = list(statistics.checks(seen))
    reasons = Counter(bank.failures.values()).most_common(_REASONS)
    data = _json(list(images.values()))
    error, typical, of_boxes = (
        max((image[name] for image in images.values() if name in image), default=0.0)
        for name in ("error", "typicalError", "boxError")
    )
    context = {
        "bank": bank,
        "name": bank.path.name if is_remote(bank.path) else bank.path.resolve().name,
        "made": bank.manifest,
        "output": name,
        "numbers": _numbers(bank, name, checks),
        "facts": _facts(bank, runs),
        "failures": list(bank.failures.items())[:_FAILURES],
        "reasons": reasons,
        "more_reasons": len(bank.failures) - sum(count for _, count in reasons),
        "completeness": _completeness(bank, dataset),
        "runs": [replace(run, versions=dict(list(run.versions.items())[:_VERSIONS])) for run in runs[-_RUNS:]],
        "earlier": len(runs) > _RUNS,
        "seen": seen,
        "of": len(keys),
        "checks": checks,
        "charts": charts_of(seen),
        "linked": {key: f"image-{number}" for number, key in enumerate(images)},
        "images": images,
        "most_bytes": _IMAGE,
        "least": statistics.LEAST,
        "image_bytes": len(data) // max(1, len(images)),
        "asked": asked,
        "outliers": len(images.keys() & outliers),
        "error": error,
        "typical_error": typical,
        "box_error": of_boxes,
        "weights": weights_of(bank.manifest, runs),
        "annotated": any("pairs" in image for image in images.values()),
        "version": __version__,
    }
    content = _rendered(context, data)
    with whole_file(path) as place:
        place.write_bytes(content)
    wrong = sum(check.state == "bad" for check in checks)
    return Written(path, len(content), len(images), asked, error, seen.defects, wrong)


def _gallery(
    bank: Bank, output: str, dataset: Dataset | None, keys: Sequence[str], progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Each image's data, sorted by key; only the first images if all exceed the page's size."""
    samples = {sample.key: sample for sample in dataset.samples} if dataset else {}
    common = gallery.Common.of(bank, output, keys)
    images, room = {}, LARGEST - _REST
    for number, key in enumerate(keys, 1):
        image = gallery.show(bank, output, key, common, samples.get(key), dataset)
        size = len(_json([image]))
        for name in ("pairs", "boxes", "picture"):
            if size > _IMAGE and image.pop(name, None):
                image["notes"].append(f"The page has no room for the {name}.")
                size = len(_json([image]))
        room -= size
        if room < 0:
            break
        images[key] = image
        if progress:
            progress(number, len(keys))
    return dict(sorted(images.items()))


def _json(images: Sequence[dict[str, Any]]) -> str:
    """JSON for a script element: without a "<", which could end the element or begin a comment."""
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(images, separators=(",", ":"))


def _rendered(context: dict[str, Any], data: str) -> bytes:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("patchbank.show"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "bytes": bytes_text, "count": lambda number: f"{number:,}"}
    environment.filters["images"] = lambda number: f"{number:,} image{'' if number == 1 else 's'}"
    script, style = (_file(name) for name in ("report.js", "report.css"))
    page = environment.get_template("report.html").render(
        **context,
        script=Markup(script),
        style=Markup(style),
        data=data,
        script_hash=_digest(script),
        style_hash=_digest(style),
    )
    return page.encode("utf-8", "backslashreplace")


def _file(name: str) -> str:
    return files("patchbank.show").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A hash for the Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _numbers(bank: Bank, output: str, checks: Sequence[statistics.Check]) -> list[tuple[str, str, str]]:
    """The first screen's: number, name, and the section that says more."""
    shown, (rows, columns) = bank.manifest.outputs[output], bank.manifest.grid
    return [
        (f"{len(bank):,}", "images", ""),
        (f"{rows} x {columns}", "patches an image", ""),
        (f"{shown.shape[1]:,} {shown.dtype}", "values a patch", ""),
        (bytes_text(bank.bytes_on_disk()), "on disk", "facts"),
        (f"{sum(check.state == 'good' for check in checks)} of {len(checks)}", "checks passed", "checks"),
        (f"{len(bank.failures):,}", "failed images", "failures"),
    ]


def _facts(bank: Bank, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the bank is."""
    made = bank.manifest
    rows, columns = made.grid
    pooled = f", the mean of each {made.input.pool} x {made.input.pool} patches" if made.input.pool > 1 else ""
    facts = [
        ("Model", made.model),
        ("Weights", weights_of(made, runs)[1]),
        ("Dataset", made.title),
        ("Images with features", f"{len(bank):,}"),
        *((f"Output {name}", output_text(output)) for name, output in made.outputs.items()),
        ("Input", "{}x{} (height x width)".format(*made.input.size)),
        ("Grid", f"{rows} x {columns}{pooled}"),
        *([("Reduced", f"{made.reduction}, {made.reduction.explained:.2%} of the variance")] if made.reduction else []),
        ("Failed images", f"{len(bank.failures):,}"),
        ("On disk", f"{bytes_text(bank.bytes_on_disk())}, layout {made.layout}"),
        ("Resize", made.input.resize),
    ]
    if not made.imported:
        compiled = ", compiled" if made.compiled else ""
        facts.append(("Made on", f"{made.device}, batches of {made.batch_size}{compiled}"))
        facts.append(("Begun with", ", ".join(f"{name} {version}" for name, version in made.versions.items())))
    if runs:
        if len(runs) < MOST_RUNS:
            facts.append(("Runs", f"{len(runs):,}, the first at {runs[0].began}, the last at {runs[-1].began}"))
        else:
            facts.append(("Runs", f"{MOST_RUNS:,} or more, the last at {runs[-1].began}"))
    if made.imported:
        facts.append(("Imported", made.imported))
    return facts + [
        (f"Identity: {name.replace('_', ' ').replace('sha256', 'SHA-256')}", value)
        for name, value in made.identity.items()
        if name != "model"
    ]


def _completeness(bank: Bank, dataset: Dataset | None) -> dict[str, Any] | None:
    """How many of the dataset's images have a feature, failed, or are missing."""
    if dataset is None:
        return None
    keys = [sample.key for sample in dataset.samples]
    done = sum(key in bank for key in keys)
    failed = sum(key in bank.failures for key in keys)
    left = [key for key in keys if key not in bank and key not in bank.failures]
    return {
        "listed": len(keys),
        "done": done,
        "failed": failed,
        "left": len(left),
        "examples": left[:5],
        "extra": len(bank) + len(bank.failures) - done - failed,
        "source": (dataset.annotations or dataset.images).name,
    }
