"""What a run reports while it works. The command line draws it; a program may pass an object of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbank.datasets.samples import Failure


class Progress:
    """Receives a run's reports, and ignores them: a subclass shows them.

    The methods are called from two threads, never at once.
    """

    def stage(self, text: str) -> None:
        """The run begins something: ``loading weights``, ``compiling``, ..."""

    def start(self, total: int) -> None:
        """The run begins to extract `total` images: those of its plan that have no feature, or of several plans."""

    def advance(self, written: int, failed: Sequence[Failure]) -> None:
        """A bank has taken a batch: the number of features, and the failures, since the last call.

        They are durable when the run ends, and most of them earlier: a pickle at once, a shard when it is whole.
        """


class Bar(Progress):
    """A bar of tqdm's: a widget in a notebook, a line elsewhere."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets a notebook gets the line
            from tqdm.auto import tqdm
        self._bar = tqdm(unit=" images")
        self._failed = 0

    def stage(self, text: str) -> None:
        """Before the bar."""
        self._bar.set_description_str(text)

    def start(self, total: int) -> None:
        """The clock begins."""
        self._bar.reset(total)
        self.stage("extracting")

    def advance(self, written: int, failed: Sequence[Failure]) -> None:
        """Behind the bar, the number of failures."""
        self._failed += len(failed)
        if self._failed:
            self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update(written + len(failed))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """What a run reports to: the caller's object, a `Bar`, or nothing; None is a bar in an interactive session."""
    if progress is not None and not isinstance(progress, bool):
        yield progress
    elif progress or (progress is None and hasattr(sys, "ps1")):
        with closing(Bar()) as bar:
            yield bar
    else:
        yield Progress()
