"""The program as real processes, many of them cheaply: each is forked from a server that has imported everything.

The server imports and computes nothing, so that no thread of torch's has run in it when it forks. A process is a run
of the command line, with its output in a file; it can be sent real signals, and is a child of the server's.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from patchbank.bank.base_writer import BankWriter, Feature
from patchbank.cli import main
from patchbank.datasets.samples import Failure
from patchbank.encoders.openai.registry import MODELS
from tests.support import REPOSITORY, TINY

_IMPORTED = [
    *("pytest", "PIL.JpegImagePlugin", "tests.support", "tests.faults.processes"),
    *("patchbank.extraction.run", "patchbank.extraction.recompute", "patchbank.bank.repair", "patchbank.cli.progress"),
]


def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    before = os.environ.get("PYTHONPATH")
    # The server is a fresh interpreter, and Python 3.11 does not tell it where this one looks for modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _pause_after(additions: int) -> None:
    """Have this process stop itself (SIGSTOP) once so many batches have been handed to the bank."""
    add, left = BankWriter.add, additions

    def counted(bank: BankWriter, features: Sequence[Feature], failures: Sequence[Failure]) -> list[Failure]:
        nonlocal left
        refused = add(bank, features, failures)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return refused

    BankWriter.add = counted  # type: ignore[method-assign]


def _run(arguments: tuple[str, ...], output: Path, file_size: int | None, pause_after: int | None) -> None:
    """In the new process: be the command line."""
    if pause_after:
        _pause_after(pause_after)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    torch.set_num_threads(1)  # several run at once, and what the model computes is no work for two
    MODELS[TINY.name] = TINY
    sys.argv = ["patchbank", *arguments]
    main()


class Run:
    """`patchbank ...` under way.

    Attributes:
        process: its process.
    """

    def __init__(
        self, output: Path, *arguments: object, file_size: int | None = None, pause_after: int | None = None
    ) -> None:
        """Start it.

        Args:
            output: the file for what it prints.
            file_size: bytes beyond which no file may grow; None where nothing bounds them.
            pause_after: batches after which it stops itself, until it is sent SIGCONT: what a test does to it then
                does not depend on who is faster.
        """
        self._output = output
        given = tuple(map(str, arguments)), output, file_size, pause_after
        self.process: ForkServerProcess = _server().Process(target=_run, args=given)
        self.process.start()

    @property
    def alive(self) -> bool:
        """Whether it goes on."""
        return self.process.is_alive()

    def paused(self) -> Run:
        """Itself, once it has stopped."""
        while self.alive and Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.005)
        assert self.alive, f"it ended before it was to stop:\n{self.printed}"
        return self

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self.alive and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended; of a signal that killed it, the negative number."""
        self.process.join(120)
        code = self.process.exitcode
        assert code is not None, f"it does not end:\n{self.printed}"
        assert "Traceback" not in self.printed, self.printed
        return code

    @property
    def printed(self) -> str:
        """What it has printed so far, on both streams."""
        return self._output.read_text() if self._output.exists() else ""


def run(output: Path, *arguments: object, check: int, file_size: int | None = None) -> str:
    """Run `patchbank ...` to its end, which must be with exit code `check`; what it printed."""
    done = Run(output, *arguments, file_size=file_size)
    assert done.wait() == check, done.printed
    return done.printed
