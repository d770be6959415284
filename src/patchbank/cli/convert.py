"""``patchbank convert SRC DST``: another layout, another stored dtype."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli import options
from patchbank.cli.console import (
    count_text,
    say_prose,
    show_facts,
    show_failures,
    show_json,
    show_note,
    some,
    written_text,
)
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import StopOnSignal
from patchbank.config import ExtractConfig, Layout, StoredDtype, option
from patchbank.locations import locate

if TYPE_CHECKING:
    from patchbank.bank.convert import Converted


@options.takes(config=("shard_size", "overwrite"))
def convert(
    source: Annotated[Path, typer.Argument(parser=locate, metavar="SRC", help="Bank directory or URL.")],
    target: Annotated[Path, typer.Argument(parser=locate, metavar="DST", help="New bank's directory or URL.")],
    *,
    layout: Layout | None = options.like("layout", None, "SRC's; shards with --pca"),
    dtype: StoredDtype | None = options.like("dtype", None, "SRC's; float32 for ezhoi, as EZ-HOI reads"),
    output: list[str] | None = option(None, "Output to keep; repeatable.", metavar="NAME", default_text="all"),
    pca: int | None = option(
        None,
        "Reduce the main output, and all of its space, to N principal components of the bank's features; they are kept "
        "with it.",
        minimum=1,
    ),
    config: ExtractConfig,
    json: bool = options.JSON,
) -> None:
    """Write a bank's features into another bank. An interrupted run continues with the same command.

    It compares every feature's checksum. Exit code 0: all features are written. 1: some features of SRC are damaged, or
    too large for the new dtype; they are listed.

    patchbank convert BANK NEW --layout shards --dtype float16
    """
    with busy("looking at the bank"):
        from patchbank.bank.convert import convert
        from patchbank.bank.reader import open_bank

        bank = open_bank(source)
    with StopOnSignal() as signals, Activity() as activity:
        done = convert(
            bank,
            target,
            layout or ("shards" if pca else bank.manifest.layout),
            dtype,
            shard_size=config.shard_size,
            outputs=output or (),
            components=pca,
            fitting=activity.counter(f"components of {bank.path.name}", bank.manifest.noun),
            overwrite=config.overwrite,
            progress=activity.counter(f"converting {bank.path.name}", bank.manifest.noun),
            stop=signals.stop,
        )
    show_json(_converted_dict(done)) if json else _show(done)
    signals.end(1 if done.damaged or done.refused or done.kept else 0)


def _show(done: Converted) -> None:
    show_facts(
        done.bank,
        written_text(done.features, done.bytes_written),
        some(done.already_done, "already there"),
        f"{count_text(done.failures, 'failure')} carried over" if done.failures else "",
        some(done.remaining, "left to do"),
    )
    if made := done.manifest.reduction:
        say_prose(f"  {made}, which explain {made.explained:.2%} of the variance of {made.outputs[0]}")
    show_failures("not converted", done.damaged | done.refused, ": --json names them all")
    if done.kept:
        show_note(f"{done.bank} was not replaced: {done.kept}.")


def _converted_dict(done: Converted) -> dict[str, Any]:
    content = {name: value for name, value in asdict(done).items() if name not in ("bank", "manifest")}
    manifest, made = done.manifest, done.manifest.reduction
    return {
        "bank": str(done.bank),
        "layout": manifest.layout,
        "dtype": manifest.dtype,
        "reduction": made and asdict(made),
        **content,
    }
