"""``patchbank bench``: how fast each stage is on this machine, how near the limit, and which options to choose."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from patchbank.budget import keep_freed_memory
from patchbank.cli import options
from patchbank.cli.console import busy, plain_table, say, show_json, show_note, stderr, stdout
from patchbank.cli.options import DEFAULTS
from patchbank.cli.signals import exit_on_signal
from patchbank.config import ExtractConfig, check_dtype
from patchbank.encoders.openai.registry import get_model
from patchbank.errors import ConfigError

if TYPE_CHECKING:
    from patchbank.bench.measure import Report

_PICTURES = {"cpu": 48, "cuda": 1024}  # some batches of them


def bench(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Whose encoder.")] = DEFAULTS.model,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Images to decode.", show_default="made-up JPEGs"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", help="Only the first N of them.", show_default="48, or 1024 on CUDA", min=1
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="A directory on the disk that is to be written to.")
    ] = Path(),
    precision: options.PrecisionOption = DEFAULTS.precision,
    layout: options.LayoutOption = DEFAULTS.layout,
    dtype: options.Dtype = DEFAULTS.dtype,
    resize: options.Resize = DEFAULTS.resize,
    decode: options.DecodeOption = DEFAULTS.decode,
    device: options.Device = DEFAULTS.device,
    batch_size: options.BatchSize = DEFAULTS.batch_size,
    compile: options.CompileOption = DEFAULTS.compile,
    workers: options.Workers = DEFAULTS.workers,
    json: options.Json = False,
) -> None:
    """Measure every stage of an extraction on this machine: decode, encode, write, read, and all together.

    Takes a minute, and some with the larger models; needs no checkpoint (the weights are random numbers), and leaves
    nothing behind.
    """
    get_model(model)
    config = ExtractConfig(
        model=model,
        precision=precision,
        layout=layout or "ezhoi",
        dtype=dtype,
        resize=resize,
        decode=decode,
        device=device,
        batch_size=batch_size,
        compile=compile,
        workers=workers,
    )
    check_dtype(layout or "ezhoi", dtype)
    place = out.expanduser()
    if not place.is_dir():
        raise ConfigError(f"--out {place}: there is no such directory.")
    keep_freed_memory()
    with busy("Getting ready"):
        from dataclasses import replace

        from patchbank.bench.measure import precisions_of, run
        from patchbank.bench.pictures import write_pictures
        from patchbank.datasets import load_dataset
        from patchbank.encoders.device import resolve_device

        kind = resolve_device(device, precision)
        precisions = precisions_of(kind)
        count = limit or _PICTURES[kind.type]
    if precision not in precisions:
        precisions.append(precision)
    with (
        exit_on_signal() as check,
        TemporaryDirectory(prefix="patchbank-bench-") as made,
        stderr.status("Making pictures") as status,
    ):

        def now(what: str) -> None:
            check()
            status.update(Text(f"Measuring: {what}"))

        if images is None:
            images = Path(made, "pictures")
            write_pictures(images, count)
        dataset = load_dataset("folder", images)
        dataset = replace(dataset, samples=dataset.samples[:count])
        report = run(dataset, config, place, precisions, now)
    show_json(report.to_dict()) if json else _show(report, config)


def _show(report: Report, config: ExtractConfig) -> None:
    say(f"{report.model} on {report.machine}", "bold")
    for precision, limit in report.limits.items():
        say(
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
        show_note("this machine's speed changed meanwhile: the encoder was faster than its limit. Measure again.")
    chosen = " ".join(f"{name} {value}" for name, value in report.options.items())
    say(f"\nEnd to end is {report.bound}-bound. For {config.precision}: {chosen}")


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
