"""Progress on a terminal and without one: what each says, and that nothing is left of it."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from patchbank.cli import progress
from patchbank.cli.progress import Activity, busy


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    """Standard error, of 120 columns; without a terminal, every update writes a line."""
    console = Console(file=io.StringIO(), force_terminal=request.param, width=120, color_system=None, highlight=False)
    monkeypatch.setattr(progress, "stderr", console)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", (0.0, 0.0))
    return console


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def seen(activity: Activity) -> list[str]:
    """What a terminal of 100 columns shows of it now, less the spinner."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    console.print(activity)
    first, *others = said(console).splitlines()
    return [first[2:], *others]


def test_images_with_rate_time_left_and_failures(stderr: Console) -> None:
    with Activity() as activity:
        activity.bank("[red]photos[/red], {tiny}", 2000, 1, 0)
        activity.stage("compiling")
        assert [line.split("  ")[0] for line in seen(activity)] == ["[red]photos[/red], {tiny}: compiling"]
        activity.start(2000)
        activity.advance(3, [])
        first = seen(activity)
        activity.advance(0, ["a.jpg"])
        second = seen(activity)
    assert first[0].startswith("[red]photos[/red], {tiny}: extracting ") and first[0].endswith(" 0:00")
    assert " 3/2,000 images " in first[1] and " images/s " in first[1] and " left" in first[1]
    assert " 4/2,000 images " in second[1] and second[1].rstrip().endswith(" left 1 failed")
    if stderr.is_terminal:
        assert said(stderr).endswith("\x1b[2K")  # the lines are erased
    else:
        stage, start, first_line, second_line = said(stderr).splitlines()
        assert stage == "[red]photos[/red], {tiny}: compiling"
        assert start == "[red]photos[/red], {tiny}: 2,000 images to do"
        assert ": 3/2,000 images, " in first_line and "failed" not in first_line
        assert ": 4/2,000 images, " in second_line and " elapsed, " in second_line
        assert second_line.endswith(" left, 1 failed")


def test_the_time_left_is_that_of_all_banks(stderr: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of the second bank costs ten times as much as one of the first, which takes a second."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    activity = Activity()
    activity.bank("first", 10, 1, 20 * 10)
    activity.start(10)
    assert activity._left() == ""
    now = 4.0
    activity.advance(4, [])
    assert activity._left() == "3:26 left"  # 6 + 200 seconds
    now = 10.0
    activity.advance(6, [])
    activity.bank("second", 20, 10, 0)
    activity.stage("loading weights")
    assert activity._left() == "3:20 left"
    now = 60.0
    activity.start(20)
    now = 65.0
    activity.advance(1, [])
    assert activity._left() == "1:35 left"  # by its own speed, 5 seconds an image


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    dumb = {"TERM": "dumb"}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, _environ=dumb)
    monkeypatch.setattr(progress, "stderr", console)
    with Activity() as activity:
        activity.stage("loading weights")
        activity.start(2)
        activity.advance(2, [])
    stage, first, second = said(console).splitlines()
    assert stage == "Loading weights"
    assert first == "Extracting: 2 images to do" and second.startswith("Extracting: 2/2 images, ")


def test_without_colours_the_bar_is_drawn_and_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"NO_COLOR": "1"})
    monkeypatch.setattr(progress, "stderr", console)
    with Activity() as activity:
        activity.start(4)
        lengths = []
        for _ in range(4):
            activity.advance(1, [])
            lengths.append(seen(activity)[1].count("━"))
    assert lengths == sorted(set(lengths)) and lengths[0] > 0


def test_the_clock_begins_at_the_first_report(stderr: Console) -> None:
    """What was done before it is not part of the rate."""
    with Activity() as activity:
        count = activity.counter("verifying")
        count(1000, 2000)
        assert activity._count is not None and activity._count.rate == 0
        count(1001, 2000)
        elapsed = time.monotonic() - activity._count.began
        assert activity._count.rate <= 1 / elapsed * 1.01


def test_nothing_is_said_twice(stderr: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last state has one line, also where the lines between are too frequent to be written."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", (1e9, 1e9))
    with Activity() as activity:
        activity.start(3)
        for _ in range(3):
            activity.advance(1, [])
    with activity:  # again, for the next
        activity.bank("nothing", 0, 1, 0)
        activity.start(0)
        activity.counter("all at once")(2, 2)
    if not stderr.is_terminal:
        first, second, third, *others = said(stderr).splitlines()
        assert len(others) == 2 and others[1].startswith("nothing: 2/2 images, ")
        assert first == "Extracting: 3 images to do" and second.startswith("Extracting: 3/3 images, ")
        assert "left" not in second and third == "nothing: 0 images to do"


def test_lines_are_written_while_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first batch may take minutes."""

    class Lines(io.StringIO):
        three = threading.Event()

        def write(self, text: str) -> int:
            written = super().write(text)
            if self.getvalue().count("\n") >= 3:
                self.three.set()
            return written

    monkeypatch.setattr(progress, "stderr", Console(file=Lines(), width=80))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", (0.0, 0.0))
    with busy("looking at the bank"):
        assert Lines.three.wait(60)
    assert all(line.startswith("Looking at the bank, 0:0") for line in said(progress.stderr).splitlines())


def test_counts_one_after_the_other(stderr: Console) -> None:
    """One that never counts says nothing."""
    with Activity() as activity:
        first, second = activity.counter("reading"), activity.counter("drawing")
        activity.counter("never")
        assert seen(activity)[0].startswith("Reading ")
        for done in (1, 2):
            first(done, 2)
        second(1, 1)
        assert seen(activity)[0].startswith("Drawing ")
    text = said(stderr)
    assert "ever" not in text
    assert text.count("Reading: 2 images to do") == text.count("Reading: 2/2 images") == (not stderr.is_terminal)


@pytest.mark.parametrize("total", [0, 4_000_000])
def test_a_download_that_fails_leaves_nothing(stderr: Console, total: int) -> None:
    with pytest.raises(OSError, match="reset"), Activity() as activity:
        activity.counter("downloading [b]x[/b]", bytes=True)(1_000_000, total)
        title, count = seen(activity)
        raise OSError("reset")
    assert "Downloading [b]x[/b]" in title and ("1.0 MB of 4.0 MB" if total else "1.0 MB") in count
    if stderr.is_terminal:
        assert said(stderr).endswith("\x1b[2K")
    else:
        begun, line = said(stderr).splitlines()
        assert begun.endswith(": size not known" if total == 0 else ": 4.0 MB")
        assert ": 1.0 MB, " in line if total == 0 else ": 1.0 MB of 4.0 MB, " in line
