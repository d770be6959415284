"""The application: its commands, and what becomes of errors and signals outside a run."""

from __future__ import annotations

import codecs
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import patchbank
from patchbank.cli import bench, convert, demo, doctor, extract, info, repair, report, show, verify
from patchbank.cli.console import show_error
from patchbank.errors import PatchbankError

app = typer.Typer(
    name="patchbank",
    help="Banks of dense CLIP patch features: extracted once, exactly, and read thousands of times.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(extract.app, name="extract")


def _unwrapped(text: str | None) -> str:
    """A docstring's paragraphs, each in one line: typer would keep the line breaks of the source."""
    return "\n\n".join(" ".join(each.split()) for each in (text or "").split("\n\n"))


_COMMANDS: dict[str, Callable[..., None]] = {
    "info": info.info,
    "show": show.show,
    "report": report.report,
    "verify": verify.verify,
    "repair": repair.repair,
    "convert": convert.convert,
    "doctor": doctor.doctor,
    "bench": bench.bench,
    "demo": demo.demo,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, help=_unwrapped(_command.__doc__))(_command)


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
    for stream in (sys.stdout, sys.stderr):
        # A file name may hold what the terminal cannot show.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8":
        show_error("file names are not read as UTF-8 here: set PYTHONUTF8=1, or a UTF-8 locale.")
        sys.exit(2)
    # At once, outside a run: an exception can be lost in somebody's import, and nothing here needs tidying up that the
    # next run does not do.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    try:
        app()
    except PatchbankError as error:
        show_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        show_error("stopped.")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone: `patchbank info BANK | head`.
        sys.stderr.close()
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        show_error(
            "this process gets no more memory. Try a smaller --batch-size (which a bank that is there keeps: with "
            "--overwrite), or fewer --workers."
        )
        sys.exit(2)
    except OSError as error:  # of the disk or of permissions, where no message of ours stands before it
        reason = error.strerror or str(error)
        show_error(f"{error.filename}: {reason}." if error.filename else reason)
        sys.exit(2)
