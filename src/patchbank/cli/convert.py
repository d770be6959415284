"""``patchbank convert SRC DST``: another layout, another stored dtype."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli import options
from patchbank.cli.console import busy, count_text, say, show_failures, show_json, show_note
from patchbank.cli.progress import CountProgress
from patchbank.cli.signals import StopOnSignal
from patchbank.config import ExtractConfig, Layout, StoredDtype
from patchbank.files import bytes_text
from patchbank.locations import locate

if TYPE_CHECKING:
    from patchbank.bank.convert import Converted


_LAYOUT = options.like("layout", ...)
_DTYPE = options.like("dtype", None, "SRC's; float32 for ezhoi, as EZ-HOI reads")


@options.takes(config=("shard_size", "overwrite"))
def convert(
    source: Annotated[Path, typer.Argument(parser=locate, metavar="SRC", help="Bank directory or URL.")],
    target: Annotated[Path, typer.Argument(parser=locate, metavar="DST", help="New bank's directory or URL.")],
    *,
    layout: Layout = _LAYOUT,
    dtype: StoredDtype | None = _DTYPE,
    config: ExtractConfig,
    json: bool = options.JSON,
) -> None:
    """Write a bank's features into another bank. An interrupted run continues with the same command.

    It compares every feature's checksum. Exit code 0: all features are written. 1: some features of SRC are damaged, or
    too large for the new dtype; they are listed.

    patchbank convert BANK NEW --layout shards --dtype float16
    """
    with busy("Looking at the bank"):
        from patchbank.bank.convert import convert
        from patchbank.bank.reader import open_bank

        bank = open_bank(source)
    with StopOnSignal() as signals, CountProgress(f"Converting {bank.path.name}") as progress:
        done = convert(
            bank,
            target.expanduser(),
            layout,
            dtype,
            shard_size=config.shard_size,
            overwrite=config.overwrite,
            progress=progress,
            stop=signals.stop,
        )
    if json:
        show_json(_converted_dict(done))
    else:
        _show(done)
    if signals.exit_code is not None:
        show_note("stopped; what is committed is safe, and the same command goes on from here.")
        raise typer.Exit(signals.exit_code)
    raise typer.Exit(1 if done.damaged or done.refused else 0)


def _show(done: Converted) -> None:
    facts = [f"{count_text(done.features, 'feature')} written ({bytes_text(done.bytes_written)})"]
    if done.already_done:
        facts.append(f"{done.already_done:,} already there")
    if done.failures:
        facts.append(f"{count_text(done.failures, 'failure')} carried over")
    if done.remaining:
        facts.append(f"{done.remaining:,} left to do")
    say(str(done.bank), "bold")
    say(f"  {', '.join(facts)}")
    show_failures("not converted", done.damaged | done.refused, ": --json names them all")


def _converted_dict(done: Converted) -> dict[str, Any]:
    content = {name: value for name, value in asdict(done).items() if name not in ("bank", "manifest")}
    manifest = done.manifest
    return {"bank": str(done.bank), "layout": manifest.layout, "dtype": manifest.dtype, **content}
