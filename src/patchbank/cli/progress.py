"""Progress of a run: a bar on a terminal, a plain line every few seconds where there is none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from patchbank.cli.console import duration_text, stderr
from patchbank.files import bytes_text

_SECONDS_BETWEEN_LINES = 5.0


class _Field(ProgressColumn):
    """One of the task's own fields, as it is."""

    def __init__(self, name: str, style: str = "") -> None:
        super().__init__()
        self._name, self._style = name, style

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self._name, "")), style=self._style)


class ImageProgress:
    """Counts a run's images: images/s, time left, failures so far. A context manager."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._done = self._failed = 0
        self._began = self._said = time.monotonic()
        self._last: tuple[int, int] | None = None  # done and failed, when a line last said so
        self._bar: Progress | None = None
        if stderr.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                _Field("rate"),
                _Field("left", "cyan"),
                _Field("failed", "red"),
                console=stderr,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, rate="", left="", failed="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        else:
            self._say(f"{self._total:,} {'image' if self._total == 1 else 'images'} to do")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._total and self._last != (self._done, self._failed):
            self._say(self._state(time.monotonic()))

    def advance(self, written: int, failed: Sequence[object]) -> None:
        """Count images that are done: with features, and failed."""
        self._done += written + len(failed)
        self._failed += len(failed)
        now = time.monotonic()
        if self._bar:
            rate, left = self._pace(now)
            self._bar.update(
                self._task,
                completed=self._done,
                rate=f"{rate:.1f} images/s",
                left=f"{left} left",
                failed=f"{self._failed} failed" if self._failed else "",
            )
        elif now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(self._state(now))
            self._last = (self._done, self._failed)

    def _pace(self, now: float) -> tuple[float, str]:
        """(images/s so far, time left as text)."""
        rate = self._done / max(now - self._began, 1e-9)
        return rate, duration_text((self._total - self._done) / rate) if rate else "unknown"

    def _state(self, now: float) -> str:
        rate, left = self._pace(now)
        ahead = f", {left} left" if self._done < self._total else ""
        failed = f", {self._failed:,} failed" if self._failed else ""
        return f"{self._done:,}/{self._total:,} images, {rate:.1f} images/s{ahead}{failed}"

    def _say(self, text: str) -> None:
        stderr.print(Text(f"{self._title}: {text}"), soft_wrap=True)


class CountProgress:
    """A bar whose total is known only once the work is under way: call it with (done, total). A context manager."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._done = 0
        self._bar: ImageProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self._bar is None:
            self._bar = ImageProgress(self._title, total).__enter__()
        self._bar.advance(done - self._done, ())
        self._done = done
        if done >= total:  # at once, so that another bar can take its place
            self.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.__exit__(kind, value, traceback)


class DownloadProgress:
    """Bytes of a download, likewise."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._said = 0.0

    def __call__(self, received: int, total: int) -> None:
        """Called after each piece; `total` is 0 where the server does not say."""
        now = time.monotonic()
        done = received == total
        if not done and now - self._said < (0.1 if stderr.is_terminal else _SECONDS_BETWEEN_LINES):
            return
        self._said = now
        line = f"{self._title}: {bytes_text(received)}" + (f" of {bytes_text(total)}" if total else "")
        if stderr.is_terminal:
            stderr.print(Text(line), end="\n" if done else "\r")
        else:
            stderr.print(Text(line), soft_wrap=True)
