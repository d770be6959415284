"""The command line. Only this folder imports typer and rich; commands import what they need when they run."""

from __future__ import annotations

from patchbank.cli.main import main

__all__ = ["main"]
