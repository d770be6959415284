"""Several devices of one machine: one process per device; each asks for one unit after the other."""

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
from patchbank.extraction.advice import cores
from patchbank.extraction.work import Outcome, Task, Unit, Worker

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GUARD = (
    "several devices are used by as many processes, and each imports the script that began them: in a script, call "
    'extract() under `if __name__ == "__main__":`.'
)
_POLL = 0.2  # seconds between checks of `stop`


def run(task: Task, units: Sequence[Unit], done: Callable[[Outcome], None], stop: Callable[[], bool]) -> None:
    """Do all units; call `done` with each outcome. Raises what a worker raises, and BankError if a worker dies.

    A worker asks for its first unit with None, and for each other with the outcome of the last. When no unit is left,
    its connection is closed, which ends it.
    """
    devices = task.devices.names
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    stopping = context.Event()
    left = deque(units)
    processes = []
    workers = []  # connections to the workers that may get another unit
    begun = False
    try:
        with _signals_held():  # a signal would end a new process before it ignores signals
            for device in devices[: len(units)]:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(task, device, _threads(devices), theirs, stopping))
                process.start()
                theirs.close()  # else `recv` would not fail when the worker dies
                processes.append(process)
                workers.append(ours)
        while workers:
            for connection in wait(workers, _POLL):
                assert isinstance(connection, Connection)
                with _death_reported(begun):
                    said: Outcome | BaseException | None = connection.recv()
                begun = True
                if isinstance(said, BaseException):
                    raise said
                if said:
                    done(said)
                if left:
                    with _death_reported(begun):
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
    """Raise ConfigError in a process that only imports the script which started the processes."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's own check
        raise ConfigError(_GUARD[0].upper() + _GUARD[1:])


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Deliver the signals of the block after it. Processes that start within the block hold them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _threads(devices: Sequence[str]) -> int | None:
    """Processor cores per worker, if the workers compute on the CPU."""
    return max(1, cores() // len(devices)) if devices[0].startswith("cpu") else None


@contextlib.contextmanager
def _death_reported(begun: bool) -> Iterator[None]:
    """Turn the error of a closed connection into a BankError: the worker has died."""
    try:
        yield
    except (EOFError, OSError) as error:
        if not begun:
            raise BankError(f"No worker process could start. Were they killed? If not: {_GUARD}") from error
        raise BankError(
            "A worker process died: was it killed, or out of memory (try fewer --workers)? What was committed is safe; "
            "the same command goes on from here."
        ) from error


def _work(task: Task, device: str, threads: int | None, connection: Connection, stopping: ProcessEvent) -> None:
    """In a worker process: do units until there are no more."""
    for number in _SIGNALS:  # the first process sets `stopping`
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    worker = None
    with contextlib.suppress(EOFError, OSError), contextlib.ExitStack() as stack:  # until there are no more units
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
    """The error in a form that survives pickling; an unexpected one with its traceback, which a pickle would lose."""
    if not isinstance(error, PatchbankError):
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


def _end_with(sentinel: int) -> None:
    """Exit when the first process is dead."""
    wait([sentinel])
    os._exit(1)
