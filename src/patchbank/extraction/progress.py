"""What a run reports while it works. The command line draws it; a program may pass an object of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchbank.datasets.samples import Failure

_STAGE = "{desc} [{elapsed}]"  # before anything is counted
_COUNT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"  # never s/image


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
    """A bar of tqdm's: an output of its own in a notebook, a line of standard error elsewhere."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = (_in_notebook(tqdm) if _has_kernel() else tqdm)(unit=" images", bar_format=_STAGE)
        self._failed = 0

    def stage(self, text: str) -> None:
        """Before the bar."""
        self._bar.set_description_str(text)

    def start(self, total: int) -> None:
        """The clock begins."""
        if total:
            self._bar.bar_format = _COUNT
        self._bar.reset(total)
        self.stage("extracting")

    def advance(self, written: int, failed: Sequence[Failure]) -> None:
        """Behind the bar, the number of failures."""
        self._failed += len(failed)
        if self._failed:
            self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update(written + len(failed))

    def close(self) -> None:
        """Leave it where it is."""
        if self._bar.total is not None:  # the run began
            self._bar.set_description_str("extracted" if self._bar.total else "nothing to extract", refresh=False)
        self._bar.close()


def _has_kernel() -> bool:
    """Whether this is a notebook: JupyterLab's, VS Code's, Colab's."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _in_notebook(tqdm: Any) -> Any:
    """tqdm's class with a bar of text that the notebook keeps. tqdm's own is a widget, which needs ipywidgets.

    It has the notebook's colours, and is saved as it was last.
    """
    display: Any = import_module("IPython.display").display  # it has no types

    class InNotebook(tqdm):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            self._output = display({"text/plain": ""}, raw=True, display_id=True)
            super().__init__(file=StringIO(), ncols=80, ascii=False, **options)

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            self._output.update({"text/plain": str(self) if msg is None else msg}, raw=True)

    return InNotebook


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
