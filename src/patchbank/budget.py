"""Memory: how much there is; a limit in bytes that threads share; freed memory; garbage collection."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator

_LARGE = 8 << 20  # bytes of a block from which on it is worth returning to the system


def machine_memory() -> int:
    """This machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class ByteBudget:
    """A number of bytes that threads may hold together."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._freed = 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> int:
        """Wait until `size` bytes are free, and hold them. A request larger than the budget waits for all of it.

        Returns the number to `release`.
        """
        size = min(size, self._capacity)
        with self._changed:
            self._changed.wait_for(lambda: self._held + size <= self._capacity)
            self._held += size
        return size

    def release(self, size: int) -> None:
        """Give back the number that `acquire` returned."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold `size` bytes within the block, which frees all of them.

        The C library keeps what a thread has freed for that thread alone. So the memory of large blocks returns to the
        system, whenever a quarter of the budget has been freed.
        """
        held = self.acquire(size)
        try:
            yield
        finally:
            with self._changed:
                self._freed += held if held >= _LARGE else 0
                full = self._freed >= self._capacity // 4
                self._freed = 0 if full else self._freed
            if full:
                return_freed_memory()
            self.release(held)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector, while a million objects are made and kept.

    It would go through all of them again and again, which doubles the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Have this process keep freed memory, up to a gigabyte. For programs: a library must not decide this.

    Otherwise the C library returns large blocks to the system, and every batch requests them again, page by page, while
    the encoder waits on the CPU. Does nothing if the C library is not GNU's.
    """
    for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: see mallopt(3)
        _glibc("mallopt", setting, 1 << 30)


def return_freed_memory() -> None:
    """Return this process's freed memory to the system, if the C library is GNU's."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *values: int) -> None:
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):
            getattr(ctypes.CDLL(None), function)(*values)
