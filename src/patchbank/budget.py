"""Memory: a bound on it in bytes, where who wants some waits until there is room; keeping what was freed; garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
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


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Within the block, Python does not look for garbage in cycles: for where a million objects are made, and kept.

    It would look through all of them again and again, which doubles the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Have this process keep freed memory for itself, up to a gigabyte. For programs; a library has no business here.

    The C library returns large blocks to the system as they are freed, and every batch gets them anew, page by page,
    which the encoder waits for on the CPU. Does nothing where the C library is not GNU's.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: see mallopt(3)
            mallopt(setting, 1 << 30)
