"""The program as real processes, many of them cheaply: each is forked from a server that has imported everything.

The server imports and computes nothing, so no thread of torch has run in it when it forks. A process is a run of the
command line, with its output in a file; it takes real signals, and is a child of the server.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from patchbank.bank.writer import BankWriter
from patchbank.cli import main
from patchbank.encoders import FAMILIES
from patchbank.encoders.openai.registry import MODELS
from tests.support import REPOSITORY, TINY

_IMPORTED = [
    *("pytest", "PIL.JpegImagePlugin", "tests.support", "tests.faults.processes"),
    *("patchbank.extraction.run", "patchbank.extraction.recompute", "patchbank.bank.repair", "patchbank.cli.progress"),
]


def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    before = os.environ.get("PYTHONPATH")
    # The server is a fresh interpreter, and Python 3.11 does not pass on this one's module path.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


@dataclass(frozen=True)
class Calls:
    """A moment in a process: when a method has returned so many times.

    Attributes:
        count: how many times.
        owner: the method's class, or its module's name; by default, of batches handed to the bank.
        name: the method's.
    """

    count: int
    owner: type | str = BankWriter
    name: str = "add"

    def pause(self) -> None:
        """Have this process stop itself (SIGSTOP) then."""
        owner = import_module(self.owner) if isinstance(self.owner, str) else self.owner
        method, calls = getattr(owner, self.name), itertools.count(1)  # several threads may call it

        def counted(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            if next(calls) == self.count:
                os.kill(os.getpid(), signal.SIGSTOP)
            return result

        setattr(owner, self.name, counted)


@dataclass(frozen=True)
class _Given:
    """What a new process is given."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    output: Path
    limits: dict[int, int]
    pause_after: Calls | None
    own_group: bool


def _run(given: _Given) -> None:
    """In the new process: be the command line."""
    if given.own_group:
        os.setsid()
    if given.pause_after:
        given.pause_after.pause()
    os.environ.clear()
    os.environ.update(given.environment)
    for kind, limit in given.limits.items():
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(given.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    torch.set_num_threads(1)  # several run at once, and the model is tiny
    MODELS[TINY.name] = TINY
    FAMILIES["toy"] = "tests.toy_family"
    sys.argv = ["patchbank", *given.arguments]
    main()


class Run:
    """`patchbank ...` under way.

    Attributes:
        process: its process.
    """

    def __init__(
        self,
        output: Path,
        *arguments: object,
        limits: Mapping[int, int] = MappingProxyType({}),
        pause_after: int | Calls | None = None,
        own_group: bool = False,
    ) -> None:
        """Start it.

        Args:
            output: the file for what it prints.
            limits: the kernel's limits: `resource.RLIMIT_FSIZE`, ... -> bytes.
            pause_after: a moment, or a number of batches, after which it stops itself until SIGCONT: a test can then
                act without a race.
            own_group: start a process group, as a command in a terminal does.
        """
        self._output = output
        pause = Calls(pause_after) if isinstance(pause_after, int) else pause_after
        given = _Given(tuple(map(str, arguments)), dict(os.environ), output, dict(limits), pause, own_group)
        self.process: ForkServerProcess = server().Process(target=_run, args=(given,))
        self.process.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.is_alive()

    def paused(self) -> Run:
        """Wait until it has stopped itself; returns it."""
        while self.alive and Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.005)
        assert self.alive, f"it ended before it stopped itself:\n{self.printed}"
        return self

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.alive and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, number)

    def interrupt_all(self) -> None:
        """Send SIGINT to its process group, as Ctrl-C in a terminal does. It must have one of its own."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Wait for its end; returns its exit code, or the negative number of the signal that killed it."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        assert "Traceback" not in self.printed, self.printed
        return code

    @property
    def printed(self) -> str:
        """Its output so far, on both streams."""
        return self._output.read_text() if self._output.exists() else ""


def run(output: Path, *arguments: object, check: int, limits: Mapping[int, int] = MappingProxyType({})) -> str:
    """Run `patchbank ...`, which must end with exit code `check`; returns its output."""
    done = Run(output, *arguments, limits=limits)
    assert done.wait() == check, done.printed
    return done.printed
