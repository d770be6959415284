"""The command line. Only this folder imports typer and rich; commands import what they need when they run."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line, as `patchbank.cli.application.main` does."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while modules are imported
    from patchbank.cli.application import main

    main()
