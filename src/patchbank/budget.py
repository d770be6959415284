"""A bound on memory, in bytes: who wants to hold some waits until there is room."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class ByteBudget:
    """Bytes that may be held at once, shared between threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> int:
        """Wait until `size` bytes may be held, and hold them. One request larger than everything goes alone.

        Returns what `release` takes.
        """
        size = min(size, self._capacity)
        with self._changed:
            self._changed.wait_for(lambda: self._held + size <= self._capacity)
            self._held += size
        return size

    def release(self, size: int) -> None:
        """Give back what `acquire` returned."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold `size` bytes within the block."""
        held = self.acquire(size)
        try:
            yield
        finally:
            self.release(held)
