"""``patchbank convert SRC DST``: another layout, another stored dtype, or files for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

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
from patchbank.cli.signals import StopOnSignal, interruptible
from patchbank.config import ExportFormat, ExtractConfig, Layout, StoredDtype, option
from patchbank.errors import ConfigError
from patchbank.files import bytes_text
from patchbank.locations import locate, locate_new

if TYPE_CHECKING:
    from patchbank.bank.ada_cm import Written
    from patchbank.bank.convert import Converted
    from patchbank.bank.export import Exported
    from patchbank.bank.reader import Bank


@options.takes(config=("shard_size", "overwrite"))
def convert(
    source: Annotated[Path, typer.Argument(parser=locate, metavar="SRC", help="Bank directory or URL.")],
    target: Annotated[
        Path, typer.Argument(parser=locate_new, metavar="DST", help="New bank's directory or URL; or what --to writes.")
    ],
    *,
    layout: Layout | Literal["ada-cm"] | None = options.like(
        "layout",
        None,
        "SRC's; shards with --pca",
        help="Files of the bank: ezhoi (one pickle per image, as EZ-HOI reads them) or shards (safetensors); or "
        "ada-cm, ADA-CM's one pickle of annotated pairs.",
    ),
    to: ExportFormat | None = option(
        None,
        "Write files for other programs, and no bank: hdf5 (one file), or a directory of parquet, webdataset (tars) or "
        "npy.",
        metavar="FORMAT",
    ),
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

    With --layout ada-cm, DST is one file of a bank of pairs, in float16: written whole or not at all. Pairs that lack a
    feature are left out; they are listed, and the exit code is 1, as of an unfinished bank.

    With --to, DST is a file or a directory for h5py, pyarrow, webdataset or numpy, one row a sample, in float32 or
    float16: written whole or not at all. docs/guides/exporting.md says what is in it.

    patchbank convert BANK NEW --layout shards --dtype float16
    """
    with busy("looking at the bank"):
        from patchbank.bank.convert import convert
        from patchbank.bank.reader import open_bank

        bank = open_bank(source)
    if to is not None:
        for name, value in {"--layout": layout, "--pca": pca}.items():
            if value is not None:
                raise ConfigError(f"{name} makes a bank, and --to files for other programs: make the bank first.")
        _export(bank, target, to, dtype, output or (), config, json=json)
    if layout == "ada-cm":
        given = {"--dtype": dtype, "--output": output, "--pca": pca}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{wrong[0]}: ADA-CM's file holds one output as it is, in float16. Leave it out.")
        _write_pairs(bank, target, overwrite=config.overwrite, json=json)
    if bank.manifest.input.cut and layout is None and target.suffix in (".p", ".pkl"):
        raise ConfigError(f"{target} is the name of a file: add --layout ada-cm, or name a directory.")
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
    show_json(converted_dict(done)) if json else show_converted(done)
    signals.end(1 if done.damaged or done.refused or done.kept else 0)


def _export(
    bank: Bank,
    target: Path,
    to: ExportFormat,
    dtype: StoredDtype | None,
    outputs: Sequence[str],
    config: ExtractConfig,
    *,
    json: bool,
) -> NoReturn:
    from patchbank.bank.export import export

    with interruptible("nothing was written."), Activity() as activity:
        done = export(
            bank,
            target,
            to,
            dtype,
            shard_size=config.shard_size,
            outputs=outputs,
            overwrite=config.overwrite,
            progress=activity.counter(f"exporting {bank.path.name}", bank.manifest.noun),
        )
    show_json({**asdict(done), "place": str(done.place)}) if json else _show_exported(done)
    raise typer.Exit(1 if done.left_out else 0)


def _show_exported(done: Exported) -> None:
    shapes = " and ".join(f"{name} {shape}" for name, shape in done.outputs.items())
    show_facts(
        done.place,
        f"{count_text(done.features, 'sample')} written ({bytes_text(done.bytes_written)}): {shapes} in {done.dtype}",
        count_text(done.files, "file"),
        f"{count_text(done.failures, 'failure')} listed" if done.failures else "",
    )
    show_failures("left out", done.left_out, ": --json names them all")


def _write_pairs(bank: Bank, target: Path, *, overwrite: bool, json: bool) -> NoReturn:
    from patchbank.bank.ada_cm import write_pairs

    with interruptible("nothing was written."), Activity() as activity:
        counter = activity.counter(f"converting {bank.path.name}")
        done = write_pairs(bank, target, overwrite=overwrite, progress=counter)
    show_json({**asdict(done), "file": str(done.file)}) if json else _show_pairs(done)
    raise typer.Exit(1 if done.left_out or done.note else 0)


def _show_pairs(done: Written) -> None:
    show_facts(
        done.file,
        f"{count_text(done.pairs, 'pair')} of {count_text(done.images, 'image')} written "
        f"({bytes_text(done.bytes_written)}): {done.output} in float16",
        some(done.pairs_left_out, "left out"),
    )
    if done.actions:
        say_prose("  hois are the verbs: V-COCO has no classes of verb and object together")
    show_failures("no feature", done.left_out, ": --json names them all")
    if done.note:
        show_note(done.note)


def show_converted(done: Converted) -> None:
    show_facts(
        done.bank,
        written_text(done.features, done.bytes_written),
        some(done.already_done, "already there"),
        f"{count_text(done.failures, 'failure')} carried over" if done.failures else "",
        some(done.remaining, "left to do"),
    )
    if made := done.manifest.reduction:
        say_prose(f"  {made}, which explain {made.explained:.2%} of the variance that they were fitted on")
    show_failures("not converted", done.damaged | done.refused, ": --json names them all")
    if done.kept:
        show_note(f"{done.bank} was not replaced: {done.kept}.")


def converted_dict(done: Converted) -> dict[str, Any]:
    content = {name: value for name, value in asdict(done).items() if name not in ("bank", "manifest")}
    manifest, made = done.manifest, done.manifest.reduction
    return {
        "bank": str(done.bank),
        "layout": manifest.layout,
        "dtype": manifest.dtype,
        "reduction": made and asdict(made),
        **content,
    }
