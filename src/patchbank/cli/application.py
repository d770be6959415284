"""The application: its commands, and its handling of errors and signals outside a run."""

from __future__ import annotations

import codecs
import signal
import sys
from typing import Annotated

import typer

import patchbank
from patchbank.cli import (
    bench,
    boxes,
    card,
    convert,
    demo,
    doctor,
    extract,
    import_,
    info,
    models,
    pairs,
    reader,
    regions,
    repair,
    report,
    show,
    stats,
    verify,
)
from patchbank.cli.console import show_error
from patchbank.cli.help import Group, add_command
from patchbank.cli.signals import end_on_interrupt, leave
from patchbank.errors import PatchbankError

app = typer.Typer(
    name="patchbank",
    cls=Group,
    help="Banks of dense features of frozen vision transformers: extracted once, exactly, and read thousands of times.",
    epilog="Example: patchbank extract folder IMAGES --out BANK",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (pairs.pairs, boxes.boxes, regions.regions):
    add_command(extract.app, _command.__name__, _command, _command.__doc__)
app.add_typer(extract.app, name="extract")
for _command in (
    *(info.info, show.show, report.report, stats.stats),
    *(verify.verify, repair.repair, convert.convert, import_.import_, card.card),
    *(models.models, reader.reader, doctor.doctor, bench.bench, demo.demo),
):
    add_command(app, _command.__name__.strip("_"), _command, _command.__doc__)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"patchbank {patchbank.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exits with 0, 1 (some images failed), 2 (the setup is wrong), 130 or 143 (stopped)."""
    PatchbankError.flags = True
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold characters that the terminal cannot show.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8":
        show_error("File names are not decoded as UTF-8. Set PYTHONUTF8=1, or a UTF-8 locale.")
        sys.exit(2)
    # Exit at once outside a run: an import may swallow an exception, and the next run cleans up.
    signal.signal(signal.SIGTERM, leave)
    end_on_interrupt()
    try:
        app(prog_name="patchbank")
    except PatchbankError as error:
        show_error(str(error))
        sys.exit(2)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        # Typer's 1. Of `patchbank info BANK | head` the reader has read enough; other commands may not have ended.
        enough = sys.argv[1:2] in (["info"], ["models"], ["reader"]) or {"-h", "--help"} & {*sys.argv}
        sys.exit(0 if enough else 141)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        show_error(
            "Out of memory. Try a smaller --batch-size (with --overwrite: an existing bank keeps its own), or fewer "
            "--workers."
        )
        sys.exit(2)
    except OSError as error:  # of the disk or permissions, without a message of ours
        reason = error.strerror or str(error)
        show_error(f"{error.filename}: {reason}." if error.filename else reason)
        sys.exit(2)
