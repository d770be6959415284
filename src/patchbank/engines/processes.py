"""Several devices of one machine: one process a device, units given out as they are asked for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event as ProcessEvent
from multiprocessing.util import Finalize

import torch

from patchbank.budget import keep_freed_memory
from patchbank.engines.local import Worker
from patchbank.engines.work import Outcome, Task, Unit
from patchbank.errors import BankError, ConfigError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GUARD = (
    "several devices are used by as many processes, and each imports the script that began them: in a script, call "
    'extract() under `if __name__ == "__main__":`.'
)
_POLL = 0.2  # seconds between looks at whether the run is to stop

# Of a worker process: what it was told at its start, and its worker, once it has got a unit.
_told: tuple[Task, Queue[str], ProcessEvent]
_worker: Worker | None = None


def run(
    task: Task,
    units: Sequence[Unit],
    devices: Sequence[str],
    done: Callable[[Outcome], None],
    stop: Callable[[], bool],
) -> None:
    """Do all units; `done` is told of each. Raises what a worker raises, and BankError where one dies."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    stopping, begun = context.Event(), context.Event()
    waiting: Queue[str] = context.Queue()
    for device in devices[: len(units)]:
        waiting.put(device)
    count = min(len(devices), len(units))
    pool = ProcessPoolExecutor(count, context, _begin, (task, waiting, stopping, begun, _threads(devices)))
    try:
        with _signals_wait():  # the processes start now, and would die of a signal until they ignore it
            futures: set[Future[Outcome]] = {pool.submit(_do, units[0])}
        futures |= {pool.submit(_do, unit) for unit in units[1:]}
        while futures:
            finished, futures = wait(futures, _POLL, FIRST_COMPLETED)
            for future in finished:
                done(future.result())
            if stop() and not stopping.is_set():
                stopping.set()
                futures = {future for future in futures if not future.cancel()}
    except BrokenProcessPool as error:
        if not begun.is_set():
            raise BankError(f"No worker process could begin. Were they killed? If not: {_GUARD}") from error
        raise BankError(
            "A worker process died: was it killed, or out of memory (try fewer --workers)? What was committed is safe; "
            "the same command goes on from here."
        ) from error
    finally:
        stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)


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


def _begin(task: Task, waiting: Queue[str], stopping: ProcessEvent, begun: ProcessEvent, threads: int | None) -> None:
    """In a worker process: become ready for units."""
    global _told
    for number in _SIGNALS:  # the first process tells, when it is time
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    begun.set()
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    _told = task, waiting, stopping


def _end_with(sentinel: int) -> None:
    """Nobody wants a worker's results once the first process is dead."""
    wait_for([sentinel])
    os._exit(1)


def _do(unit: Unit) -> Outcome:
    global _worker
    task, waiting, stopping = _told
    if _worker is None:  # here, and not before, since a pool loses what its processes raise at their start
        device = waiting.get()
        try:
            _worker = Worker(task, device)
        except BaseException:
            waiting.put(device)  # for whoever gets the next unit
            raise
        Finalize(_worker, _worker.close, exitpriority=1)
    return _worker(unit, stopping.is_set)
