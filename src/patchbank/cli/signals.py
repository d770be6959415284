"""Ctrl-C and SIGTERM: the first ends a run after the images in flight, a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from threading import Event
from types import FrameType
from typing import NoReturn, Self

import typer

from patchbank.cli.console import show_error, show_note

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[Callable[[], None]]:
    """Within the block, a signal ends the program after the block's clean-up.

    Yields:
        A function to call now and then. It ends the program if a signal came and its exception was lost: modules
        compiled by Cython swallow it while they are imported.
    """
    came: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise SystemExit(128 + number)

    def check() -> None:
        if came:
            raise SystemExit(128 + came[0])

    try:
        with _handling(leave):
            yield check
    finally:
        if came:
            show_error("stopped.")


class StopOnSignal(contextlib.ExitStack):
    """While entered, the first signal sets `stop`. A context manager.

    Attributes:
        stop: the event that a run watches.
        exit_code: 130 or 143 after a signal; else None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stop = Event()
        self.exit_code: int | None = None

    def __enter__(self) -> Self:
        self.enter_context(_handling(self._handle))
        return self

    def end(self, code: int) -> NoReturn:
        """Raise typer.Exit: with the signal's code, after a note, or else with `code`."""
        if self.exit_code is not None:
            show_note("stopped; what is committed is safe, and the same command continues.")
        raise typer.Exit(code if self.exit_code is None else self.exit_code)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code is not None:
            os._exit(128 + number)  # safe: what is committed is durable
        self.exit_code = 128 + number
        self.stop.set()
        show_note("stopping after the images in flight; once more to stop at once.")
