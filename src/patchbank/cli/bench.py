"""``patchbank bench``: the speed of each stage on this machine, its distance to the limit, and the best options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from patchbank import encoders
from patchbank.budget import keep_freed_memory
from patchbank.cli import options
from patchbank.cli.console import plain_table, say, say_prose, show_json, show_note, stdout
from patchbank.cli.options import DEFAULTS
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import exit_on_signal
from patchbank.config import ExtractConfig, as_path, check_dtype, option
from patchbank.errors import ConfigError

if TYPE_CHECKING:
    from patchbank.bench.measure import Report

_PICTURES = {"cpu": 48, "cuda": 1024}  # several batches
_CONFIG = (
    *("precision", "output", "input_size", "pool_grid", "layout", "dtype", "resize", "decode"),
    *("device", "batch_size", "compile", "workers", "limit"),
)


@options.takes({"layout": "ezhoi"}, config=_CONFIG)
def bench(
    *,
    model: str = option(DEFAULTS.model, "Model to benchmark.", values=options.MODEL_VALUES),
    images: Path | None = option(
        None, "Images to decode.", metavar="DIR", default_text="generated JPEGs", parse=as_path
    ),
    out: Path = option(Path(), "Directory on the disk to measure.", metavar="DIR", parse=as_path),
    config: ExtractConfig,
    json: bool = options.JSON,
) -> None:
    """Measure every stage of an extraction on this machine: decode, encode, write, read, and all together.

    Takes two minutes at most, unless an image takes seconds: what is slow is measured with fewer images. Needs no
    checkpoint (the weights are random) and leaves no files.
    Without --limit it measures 48 images, or 1024 on CUDA.

    patchbank bench --model ViT-L/14@336px --images DIR
    """
    model = encoders.model_name(model)
    limit, config = config.limit, replace(config, model=model, limit=None)
    check_dtype(config.layout or "", config.dtype)
    if not out.is_dir():
        raise ConfigError(f"There is no directory {out}. Give --out another one.")
    keep_freed_memory()
    with busy("getting ready"):
        from patchbank.bench.measure import run
        from patchbank.bench.pictures import write_pictures
        from patchbank.datasets import load_dataset
        from patchbank.encoders.device import resolve_device

        count = limit or _PICTURES[resolve_device(config.device, config.precision).type]
    with (
        exit_on_signal() as check,
        TemporaryDirectory(prefix="patchbank-bench-") as made,
        Activity() as activity,
    ):

        def now(what: str) -> None:
            check()
            activity.stage(f"measuring: {what}")

        if images is None:
            images = Path(made, "pictures")
            activity.stage("making pictures")
            write_pictures(images, count)
        dataset = load_dataset("folder", images)
        dataset = replace(dataset, samples=dataset.samples[:count])
        report = run(dataset, config, out, now)
    show_json(report.to_dict()) if json else _show(report, config)


def _show(report: Report, config: ExtractConfig) -> None:
    say(f"{report.model} on {report.machine}", "bold")
    for precision, limit in report.limits.items():
        say_prose(
            f"  matrix products, {precision}: {limit.peak / 1e9:,.0f} GFLOP/s at best; the model's alone would allow "
            f"{_rate(limit.images_per_second)} images/s"
        )
    say("")
    table = plain_table("stage", "", ">images/s", ">of the limit")
    before = ""
    for each in report.measures:
        share = f"{each.rate / each.limit:.0%}" if each.limit else ""
        table.add_row(each.stage if each.stage != before else "", each.what, _rate(each.rate), share)
        before = each.stage
    stdout.print(table)
    if not report.steady:
        show_note(
            "an encoder cannot exceed its limit. The two are measured one after the other, and this machine was faster "
            "at the later moment (turbo, other programs, noise). Measure again."
        )
    chosen = " ".join(f"{name} {value}" for name, value in report.options.items())
    say_prose(f"\nEnd to end is {report.bound}-bound. For {config.precision}: {chosen}")


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
