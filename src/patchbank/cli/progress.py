"""Progress of a command: a bar on a terminal; elsewhere a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from patchbank.cli.console import can_redraw, count_text, duration_text, some, stderr
from patchbank.extraction.progress import Progress as Progress_
from patchbank.files import bytes_text

_SECONDS_BETWEEN_LINES = 5.0


class CountProgress(Progress_):
    """Counts images: call it with (done, total), which starts it; or give it the total, and `advance` it.

    A context manager: no bar is left if the work stops early.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        self._total, self._failed = total, 0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),  # a file name may look like markup
            BarColumn(bar_width=None),
            *self._columns(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[cyan]left [red]{task.fields[failed]}"),
            console=stderr,
            expand=True,
            transient=True,
        )
        self._bar.add_task(title, start=False, total=None, rate="", failed="")
        [self._task] = self._bar.tasks
        self._said = time.monotonic(), 0.0  # of the last line: its time, and the number done
        self._first = 0  # done when the clock began

    def __enter__(self) -> Self:
        if self._total is not None:
            self._start(self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if can_redraw(stderr):
            self._bar.stop()
        elif self._task.completed != self._said[1]:
            self._say_state()

    def __call__(self, done: int, total: int) -> None:
        """Set the number done, and the total; 0 if the total is unknown."""
        if not self._task.started:
            self._start(total)
            self._first = done
        self._update(done)
        if done == total:  # another bar can take its place
            self.__exit__()

    def advance(self, written: int, failed: Sequence[object]) -> None:
        """Add images with features, and failed ones."""
        self._failed += len(failed)
        self._update(int(self._task.completed) + written + len(failed))

    def _columns(self) -> Sequence[ProgressColumn]:
        return MofNCompleteColumn(), TextColumn("{task.fields[rate]}")

    def _start(self, total: int) -> None:
        self._bar.update(self._task.id, total=total or None)
        self._bar.start_task(self._task.id)
        if can_redraw(stderr):
            self._bar.start()
        else:
            self._say(self._begin(total))

    def _update(self, done: int) -> None:
        self._bar.update(self._task.id, completed=done, failed=some(self._failed, "failed"))
        self._bar.update(self._task.id, rate=self._rate())
        if not can_redraw(stderr) and time.monotonic() - self._said[0] >= _SECONDS_BETWEEN_LINES:
            self._say_state()

    def _per_second(self) -> float:
        return (self._task.completed - self._first) / max(self._task.elapsed or 0.0, 1e-9)

    def _rate(self) -> str:
        return f"{rate:.1f} images/s" if (rate := self._per_second()) else ""

    def _begin(self, total: int) -> str:
        return f"{count_text(total, 'image')} to do"

    def _state(self) -> list[str]:
        return [
            f"{self._task.completed:,.0f}/{self._task.total or 0:,.0f} images",
            self._rate(),
        ]

    def _say_state(self) -> None:
        task, rate = self._task, self._per_second()
        self._said = time.monotonic(), task.completed
        parts = [*self._state(), f"{duration_text(task.elapsed or 0.0)} elapsed"]
        if rate and task.remaining:
            parts.append(f"{duration_text(task.remaining / rate)} left")
        self._say(", ".join(filter(None, [*parts, task.fields["failed"]])))

    def _say(self, text: str) -> None:
        stderr.print(Text(f"{self._task.description}: {text}"), soft_wrap=True)


class DownloadProgress(CountProgress):
    """Counts the bytes of a download."""

    def _columns(self) -> Sequence[ProgressColumn]:
        return DownloadColumn(), TransferSpeedColumn()

    def _begin(self, total: int) -> str:
        return bytes_text(total) if total else "size not known"

    def _state(self) -> list[str]:
        total = f" of {bytes_text(self._task.total)}" if self._task.total else ""
        return [f"{bytes_text(self._task.completed)}{total}", f"{bytes_text(self._per_second())}/s"]
