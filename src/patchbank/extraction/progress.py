"""What a run reports while it works. The command line draws it; a program may pass an object of its own."""

from __future__ import annotations

from collections.abc import Sequence
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
        """The run begins to extract `total` images: those of its plan that have no feature."""

    def advance(self, written: int, failed: Sequence[Failure]) -> None:
        """The bank has taken a batch: the number of features, and the failures, since the last call.

        They are durable when the run ends, and most of them earlier: a pickle at once, a shard when it is whole.
        """
