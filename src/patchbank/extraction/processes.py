"""Several devices of one machine: one process a device, units given out as they are asked for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event as ProcessEvent

import torch

from patchbank.budget import keep_freed_memory
from patchbank.errors import BankError, ConfigError, PatchbankError
from patchbank.extraction.work import Outcome, Task, Unit
from patchbank.extraction.worker import Worker

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GUARD = (
    "several devices are used by as many processes, and each imports the script that began them: in a script, call "
    'extract() under `if __name__ == "__main__":`.'
)
_POLL = 0.2  # seconds between looks at whether the run is to stop


def run(
    task: Task,
    units: Sequence[Unit],
    devices: Sequence[str],
    done: Callable[[Outcome], None],
    stop: Callable[[], bool],
) -> None:
    """Do all units; `done` is told of each. Raises what a worker raises, and BankError where one dies.

    A worker asks for its first unit with None, and for each other with the outcome of the last. Where none is left, its
    connection is closed, which ends it.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    stopping = context.Event()
    left = deque(units)
    processes = []
    workers = []  # connections to those that may get another unit
    begun = False
    try:
        with _signals_wait():  # all processes start here, and would die of a signal until they ignore it
            for device in devices[: len(units)]:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(task, device, _threads(devices), theirs, stopping))
                process.start()
                theirs.close()  # or its end would not show when the worker dies
                processes.append(process)
                workers.append(ours)
        while workers:
            for connection in wait(workers, _POLL):
                assert isinstance(connection, Connection)
                with _death_told(begun):
                    said: Outcome | BaseException | None = connection.recv()
                begun = True
                if isinstance(said, BaseException):
                    raise said
                if said:
                    done(said)
                if left:
                    with _death_told(begun):
                        connection.send(left.popleft())
                else:
                    connection.close()
                    workers.remove(connection)
            if stop():
                stopping.set()
                left.clear()
    finally:
        stopping.set()
        for connection in workers:
            connection.close()
        for process in processes:
            process.join()


def require_importable() -> None:
    """Raise ConfigError in a process that is only importing the script which asks for several processes."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself sees it
        raise ConfigError(_GUARD[0].upper() + _GUARD[1:])


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that come within the block are delivered after it. Processes begun within inherit that they wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _threads(devices: Sequence[str]) -> int | None:
    """Processor cores for each worker, where they compute on the CPU."""
    if not devices[0].startswith("cpu"):
        return None
    return max(
        1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // len(devices)
    )


@contextlib.contextmanager
def _death_told(begun: bool) -> Iterator[None]:
    """A worker whose end of the connection is gone has died."""
    try:
        yield
    except (EOFError, OSError) as error:
        if not begun:
            raise BankError(f"No worker process could begin. Were they killed? If not: {_GUARD}") from error
        raise BankError(
            "A worker process died: was it killed, or out of memory (try fewer --workers)? What was committed is safe; "
            "the same command goes on from here."
        ) from error


def _work(task: Task, device: str, threads: int | None, connection: Connection, stopping: ProcessEvent) -> None:
    """In a worker process: do units until there are no more."""
    for number in _SIGNALS:  # the first process tells, when it is time
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    worker = None
    with (
        contextlib.suppress(EOFError, OSError),
        contextlib.ExitStack() as stack,
    ):  # no more units
        connection.send(None)
        while True:
            unit = connection.recv()
            try:
                worker = worker or stack.enter_context(contextlib.closing(Worker(task, device)))
                said: Outcome | Exception = worker(unit, stopping.is_set)
            except Exception as error:
                said = _portable(error)
            connection.send(said)


def _portable(error: Exception) -> Exception:
    """What the first process can raise: the error, with what its pickle would lose if nobody foresaw it."""
    if not isinstance(error, PatchbankError):
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


def _end_with(sentinel: int) -> None:
    """Nobody wants a worker's results once the first process is dead."""
    wait([sentinel])
    os._exit(1)
