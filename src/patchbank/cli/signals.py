"""Ctrl-C and SIGTERM: the first ends a run after the images in flight, a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from threading import Event
from types import FrameType, TracebackType
from typing import Self

from patchbank.cli.console import show_error, show_note

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[Callable[[], None]]:
    """Within the block, a signal ends the program, and what it holds is tidied up on the way.

    Yields:
        A function to call now and then. It ends the program if a signal has come and what it raised got lost:
        modules that Cython made swallow it while they are imported.
    """
    came: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise SystemExit(128 + number)

    def check() -> None:
        if came:
            raise SystemExit(128 + came[0])

    before = {number: signal.signal(number, leave) for number in _SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            show_error("stopped.")


class StopOnSignal:
    """While entered, the first signal sets `stop`. A context manager.

    Attributes:
        stop: what a run watches.
        exit_code: 130 or 143 once a signal has come; else None.
    """

    def __init__(self) -> None:
        self.stop = Event()
        self.exit_code: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code is not None:
            os._exit(128 + number)  # nothing is lost: what is committed is durable, the rest was never promised
        self.exit_code = 128 + number
        self.stop.set()
        show_note("stopping after the images in flight; once more to stop at once.")
