"""``patchbank reader``: the reader of one file, for environments that cannot install patchbank."""

from __future__ import annotations

from importlib.resources import files

import typer


def reader() -> None:
    """Print patchbank_reader.py, one file that reads banks with Python 3.8, torch 1.9 and nothing else.

    It opens a bank as `patchbank.open_bank` does: import it where patchbank cannot be installed, as in EZ-HOI's
    environment.

    patchbank reader > patchbank_reader.py
    """
    typer.echo(files("patchbank.bank").joinpath("patchbank_reader.py").read_text("utf-8"), nl=False)
