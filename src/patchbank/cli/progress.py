"""What a command does, and how much of it is done: redrawn on a terminal; elsewhere lines, in growing intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from patchbank.cli.console import can_redraw, count_text, duration_text, some, stderr
from patchbank.extraction.progress import Progress
from patchbank.files import bytes_text

_SECONDS_BETWEEN_LINES = 5.0, 60.0  # at first, and at most
_SHARE = 0.1  # of the time since the beginning, that passes without a line


@dataclass
class _Count:
    """Images, regions, or bytes of a download; a total of 0 is unknown."""

    total: int
    done: int
    what: str
    bytes: bool = False
    failed: int = 0

    def __post_init__(self) -> None:
        self.began, self._first = time.monotonic(), self.done  # what was done before is not part of the rate

    @property
    def rate(self) -> float:
        return (self.done - self._first) / max(time.monotonic() - self.began, 1e-9)

    def total_text(self) -> str:
        if self.bytes:
            return bytes_text(self.total) if self.total else "size not known"
        return f"{count_text(self.total, self.what)} to do"

    def done_text(self) -> str:
        if self.bytes:
            return bytes_text(self.done) + (f" of {bytes_text(self.total)}" if self.total else "")
        return f"{self.done:,}/{self.total:,} {self.what}s"

    def rate_text(self) -> str:
        return f"{bytes_text(self.rate)}/s" if self.bytes else f"{self.rate:.1f} {self.what}s/s" if self.rate else ""


class Activity(Progress):
    """A command's activity, since its beginning. A context manager: shown while entered, any number of times.

    Args:
        stage: what the command does first; `stage` says it.
        quiet: where nothing can be redrawn, print no line as long as this takes little time.
    """

    def __init__(self, stage: str = "", *, quiet: bool = False) -> None:
        self._title, self._stage, self._quiet = "", stage, quiet
        self._what = "image"
        self._count: _Count | None = None
        self._todo, self._cost, self._later = 0, 1.0, 0.0
        self._speed = 0.0  # cost per second, of the last images
        self._began = time.monotonic()
        self._said = self._began, 0  # of the last line: its time, and the number done
        self._saying = Lock()
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        if can_redraw(stderr):
            self._stack.enter_context(Live(self, console=stderr, refresh_per_second=8, transient=True))
            return self
        left = Event()
        lines = Thread(target=self._say_lines, args=(left,), daemon=True)
        lines.start()
        self._stack.callback(lines.join)
        self._stack.callback(left.set)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._end_count()

    def bank(self, title: str, todo: int, cost: float, later: float, what: str = "image") -> None:
        """The stages and counts that follow are of a bank, or of several that are made together.

        Args:
            todo: how many images are to do.
            cost: of one of them, in any unit.
            later: the cost of all images of the banks that follow.
            what: is counted: ``image`` or ``region``; ``feature`` of several banks.
        """
        self._title, self._what, self._todo, self._cost, self._later = title, what, todo, cost, later

    def stage(self, text: str) -> None:
        """The command begins something that is not counted."""
        self._end_count()
        self._stage = text
        if not (self._quiet or can_redraw(stderr)):
            self._say(self._text())

    def start(self, total: int) -> None:
        """It begins to extract so many images."""
        self._begin("extracting", _Count(total, 0, self._what))

    def advance(self, written: int, failed: Sequence[object]) -> None:
        """Add images with features, and failed ones."""
        if count := self._count:
            count.failed += len(failed)
            self._update(count.done + written + len(failed))

    def counter(self, text: str, what: str = "image", *, bytes: bool = False) -> Callable[[int, int], None]:
        """A function of (done, total), whose first call begins to count what `text` says. A total of 0 is unknown."""
        self._stage = self._stage or text

        def update(done: int, total: int) -> None:
            if self._count is None or self._stage != text:
                self._begin(text, _Count(total, done, what, bytes))
            self._update(done)

        return update

    def _begin(self, text: str, count: _Count) -> None:
        self._end_count()
        self._stage, self._count = text, count
        if not can_redraw(stderr):
            self._say(f"{self._title or self._text()}: {count.total_text()}", 0)

    def _update(self, done: int) -> None:
        assert self._count is not None
        self._count.done = done
        if self._count.rate:
            self._speed = self._count.rate * self._cost
        self._say_if_due()

    def _end_count(self) -> None:
        """A last line, if the last count has none."""
        if self._count and not can_redraw(stderr) and self._count.done != self._said[1]:
            self._say(self._state(), self._count.done)
        self._count = None

    def _left(self) -> str:
        """The time that the whole command needs for the images left to do."""
        rest = self._later + self._cost * (self._count.total - self._count.done if self._count else self._todo)
        return f"{duration_text(rest / self._speed)} left" if self._speed and rest > 0 else ""

    def _elapsed(self) -> str:
        return duration_text(time.monotonic() - self._began)

    def _text(self) -> str:
        return f"{self._title}: {self._stage}" if self._title else self._stage[:1].upper() + self._stage[1:]

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> Iterator[RenderableType]:
        """Two lines for a terminal; the second only if something is counted."""
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(self._spinner, Text(self._text()), self._elapsed())
        yield line
        if count := self._count:
            texts = [count.done_text(), count.rate_text(), self._left()]
            line = Table.grid(padding=(0, 1), expand=True)
            line.add_column(ratio=1)
            for _ in range(len(texts) + 1):
                line.add_column(no_wrap=True)
            bar = ProgressBar(count.total or None, count.done, pulse=not count.total)
            line.add_row(bar, *texts, Text(some(count.failed, "failed"), "red"))
            yield line

    def _state(self) -> str:
        """A line for elsewhere."""
        elapsed = f"{self._elapsed()} elapsed"
        if not (count := self._count):
            return ", ".join(filter(None, [self._text(), elapsed, self._left()]))
        parts = [count.done_text(), count.rate_text(), elapsed, self._left(), some(count.failed, "failed")]
        return f"{self._title or self._text()}: {', '.join(filter(None, parts))}"

    def _say_lines(self, left: Event) -> None:
        """In a thread: lines between the batches, which may take long."""
        while not left.wait(1.0):
            self._say_if_due()

    def _say_if_due(self) -> None:
        if can_redraw(stderr):
            return
        least, most = _SECONDS_BETWEEN_LINES
        with self._saying:
            now = time.monotonic()
            if now - self._said[0] >= max(least, min(most, _SHARE * (now - self._began))):
                self._say(self._state(), self._count.done if self._count else 0)

    def _say(self, text: str, done: int = 0) -> None:
        self._said = time.monotonic(), done
        stderr.print(Text(text), soft_wrap=True)


def busy(text: str) -> Activity:
    """While the block runs, `text` with a spinner and the time; where nothing can be redrawn, only if it takes long."""
    return Activity(text, quiet=True)
