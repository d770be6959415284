"""Ctrl-C and SIGTERM: one line says so. The first ends a run after the images in flight, a second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from threading import Event
from types import FrameType
from typing import NoReturn, Self

import typer

from patchbank.cli.console import show_note, stderr

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def leave(number: int, _frame: FrameType | None = None) -> NoReturn:
    """End the program at once: what is committed is durable, and the next run cleans up."""
    if stderr.is_terminal:
        os.write(2, b"\x1b[?25h\n")  # a spinner hides the cursor; no lock is safe to take here
    os._exit(128 + number)


def _say(number: int, text: str) -> None:
    """Print a note on a signal. The same signal is dropped meanwhile: it would end the program without the note."""
    before = signal.signal(number, signal.SIG_IGN)
    show_note(text)
    signal.signal(number, before)


def end_on_interrupt(text: str = "stopped.") -> None:
    """From now on, the first Ctrl-C prints `text` and ends the program after clean-ups, a second one at once."""

    def interrupted(number: int, _frame: FrameType | None) -> None:
        _say(number, text)
        signal.signal(number, leave)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, interrupted)


@contextlib.contextmanager
def interruptible(text: str) -> Iterator[None]:
    """If Ctrl-C ends the block, its line says `text` too."""
    before = signal.getsignal(signal.SIGINT)
    end_on_interrupt(f"stopped; {text}")
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[Callable[[], None]]:
    """Within the block, a signal ends the program after the block's clean-up.

    Yields:
        A function to call now and then. It ends the program if a signal came and its exception was lost: modules
        compiled by Cython swallow it while they are imported.
    """
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:  # then clean up, whatever else comes
            raise SystemExit(128 + number)

    def check() -> None:
        if came:
            raise SystemExit(128 + came[0])

    try:
        with _handling(end):
            yield check
    finally:
        if came:
            show_note("stopped.")


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
            leave(number)
        self.exit_code = 128 + number
        self.stop.set()
        _say(number, "stopping after the images in flight; once more to stop at once.")
