"""Headless Chromium, Debian's, driven by Playwright: for tests, benchmarks and pictures of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


class NoBrowserError(Exception):
    """There is no browser, or nothing that drives it."""


@contextmanager
def headless_browser(*switches: str) -> Iterator[Any]:
    """A Playwright browser. Raises NoBrowserError."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowserError("Playwright is not installed") from error
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        raise NoBrowserError("there is no Chromium on this machine")
    with sync_playwright() as started:
        arguments = [*_SWITCHES, "--disable-component-update", *switches]
        browser = started.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def until(tab: Any, expression: str) -> None:
    """Wait for a page to be so. (Playwright's own waiting evaluates strings in the page, which its policy forbids.)"""
    for _ in range(1000):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(10)
    raise AssertionError(f"never: {expression}")
