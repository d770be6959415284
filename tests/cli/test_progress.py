"""Progress on a terminal and without one: what each says, and that nothing is left of a bar."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from patchbank.cli import progress
from patchbank.cli.progress import CountProgress, DownloadProgress


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    """Standard error, of 120 columns; without a terminal, every update writes a line."""
    console = Console(file=io.StringIO(), force_terminal=request.param, width=120, color_system=None, highlight=False)
    monkeypatch.setattr(progress, "stderr", console)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    return console


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_images_with_rate_time_left_and_failures(stderr: Console) -> None:
    with CountProgress("[red]photos[/red], {tiny}", 2000) as bar:
        bar.advance(3, [])
        bar._bar.refresh()
        bar.advance(0, ["a.jpg"])
        bar._bar.refresh()
    text = said(stderr)
    assert "[red]photos[/red], {tiny}" in text and "1 failed" in text and "images/s" in text and "left" in text
    if stderr.is_terminal:
        assert "4/2000" in text and text.endswith("\x1b[2K")  # the bar's line is erased
    else:
        first, second, third = text.splitlines()
        assert first.endswith(": 2,000 images to do") and ": 3/2,000 images, " in second and "failed" not in second
        assert ": 4/2,000 images, " in third and " elapsed, " in third and third.endswith(" left, 1 failed")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    dumb = {"TERM": "dumb"}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, _environ=dumb)
    monkeypatch.setattr(progress, "stderr", console)
    with CountProgress("photos", 2) as bar:
        bar.advance(2, [])
    first, second = said(console).splitlines()
    assert first == "photos: 2 images to do" and second.startswith("photos: 2/2 images, ")


def test_the_clock_begins_at_the_first_report(stderr: Console) -> None:
    """What was done before it is not part of the rate."""
    with CountProgress("photos") as bar:
        bar(1000, 2000)
        assert bar._per_second() == 0
        bar(1001, 2000)
        elapsed = bar._task.elapsed
        assert elapsed is not None and bar._per_second() <= 1 / elapsed * 1.01


def test_nothing_is_said_twice(stderr: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last state has one line, also where the lines between are too frequent to be written."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 1e9)
    with CountProgress("photos", 3) as bar:
        for _ in range(3):
            bar.advance(1, [])
    with CountProgress("nothing", 0):
        pass
    if not stderr.is_terminal:
        first, second, third = said(stderr).splitlines()
        assert first == "photos: 3 images to do" and second.startswith("photos: 3/3 images, ") and "left" not in second
        assert third == "nothing: 0 images to do"


def test_bars_one_after_the_other(stderr: Console) -> None:
    """The next bar can begin as soon as everything is counted, and one without a count says nothing."""
    with CountProgress("Reading") as first, CountProgress("Drawing") as second, CountProgress("never"):
        for done in (1, 2):
            first(done, 2)
        assert not first._bar.live.is_started
        second(1, 1)
    text = said(stderr)
    assert "Reading" in text and "Drawing" in text and "never" not in text
    assert text.count("Reading: 2 images to do") == text.count("Reading: 2/2 images") == (not stderr.is_terminal)


@pytest.mark.parametrize("total", [0, 4_000_000])
def test_a_download_that_fails_leaves_no_bar(stderr: Console, total: int) -> None:
    with pytest.raises(OSError, match="reset"), DownloadProgress("Downloading [b]x[/b]") as bar:
        bar(1_000_000, total)
        bar._bar.refresh()
        raise OSError("reset")
    assert not bar._bar.live.is_started
    text = said(stderr)
    assert "Downloading [b]x[/b]" in text
    if not stderr.is_terminal:
        begun, line = text.splitlines()
        assert begun.endswith(": size not known" if total == 0 else ": 4.0 MB")
        assert ": 1.0 MB, " in line if total == 0 else ": 1.0 MB of 4.0 MB, " in line
