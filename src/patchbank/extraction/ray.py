"""A Ray cluster: actors that load the model, which Ray places, and restarts when they die.

If an actor dies, its unit goes to the next free actor. Ray's own retries of an actor's task would wait for that same
actor, forever if its node is lost and no other has room.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from patchbank.budget import keep_freed_memory
from patchbank.errors import BankError, PatchbankError
from patchbank.extraction.cluster import connect, nodes
from patchbank.extraction.work import Outcome, Task, Unit, Worker
from patchbank.locations import is_remote

if TYPE_CHECKING:
    from patchbank.datasets.sources import Source

_CONTROL = "control"  # the concurrency group of `stop`
_ATTEMPTS = 5  # at a unit, before its images are assumed to kill the workers
_POLL = 0.5  # seconds between checks of `stop`
_ANSWER = 10.0  # seconds in which workers must close
_PATIENCE = 30.0  # seconds without a worker, before a message says so


def _cpus(nodes: Sequence[Mapping[str, float]], workers: int, gpus: float) -> int:
    """Processor cores per worker, so that a node has room for one worker per GPU, or for its share of all workers."""
    if gpus:
        shares = [node.get("CPU", 1) / (node["GPU"] // gpus) for node in nodes if node.get("GPU", 0) >= gpus]
    else:
        able = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
        shares = [cpus / -(-workers // len(able)) for cpus in able]
    return max(1, int(min(shares, default=1)))


class _Worker:
    """An actor. Returns known errors as values: Ray would wrap them if they were raised."""

    def __init__(self, task: Task, cpus: int, device: str) -> None:
        self._task, self._cpus, self._device = task, cpus, device
        self._stopping = threading.Event()
        self._worker: Worker | None = None

    def load(self) -> PatchbankError | None:
        """Load the model, unless it is loaded."""
        if self._worker is None:
            torch.set_num_threads(self._cpus)
            keep_freed_memory()
            try:
                self._worker = Worker(replace(self._task, encoder=self._task.encoder.obtain()), self._device)
            except PatchbankError as error:
                return _named(error)
        return None

    def do(self, unit: Unit) -> Outcome | PatchbankError:
        """Do a unit."""
        if error := self.load():  # Ray may have restarted this actor since `load`
            return error
        assert self._worker is not None
        try:
            return self._worker(unit, self._stopping.is_set)
        except PatchbankError as error:
            return _named(error)

    def stop(self) -> None:
        """Make `do` return after the images in progress."""
        self._stopping.set()

    def close(self) -> None:
        """Close the bank."""
        if self._worker is not None:
            self._worker.close()


def _named(error: PatchbankError) -> PatchbankError:
    """The error with its node: paths in it are on that node's disks, not the driver's."""
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return type(error)(f"On the node {address}: {error.args[0]}")  # with flags: the driver knows who reads it


def run(
    task: Task,
    units: Sequence[Unit],
    done: Callable[[Outcome], None],
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Do all units; call `done` with each outcome, and `say` with messages for the user.

    Raises what a worker raises, and BankError if workers keep dying of the same unit.
    """
    config = task.config
    ray, gpus, workers = connect(config.ray_address), task.devices.gpus_a_worker, task.devices.workers or 1
    cpus = _cpus(nodes(ray), workers, gpus)
    config = replace(config, workers=config.workers or cpus)
    task = replace(task, config=config, out=task.out if is_remote(task.out) else task.out.absolute())
    # One call at a time, except for `stop`, which runs beside `do`.
    actor_class = ray.remote(concurrency_groups={_CONTROL: 1})(_Worker).options(
        num_cpus=cpus, num_gpus=gpus, max_concurrency=1, max_restarts=_ATTEMPTS - 1, scheduling_strategy="SPREAD"
    )
    actors: list[Any] = []
    ready: set[Any] = set()

    def start() -> Any:
        actors.append(actor_class.remote(task, cpus, "cuda" if gpus else "cpu"))
        return actors[-1]

    try:
        _give_out(ray, start, min(workers, len(units)), ready, deque(_absolute(units)), done, stop, say)
    finally:
        with contextlib.suppress(Exception):  # some may be gone
            for actor in ready:
                _stop(actor)
            closed = [actor.close.remote() for actor in ready]
            ray.wait(closed, num_returns=len(closed), timeout=_ANSWER)
        for actor in actors:
            ray.kill(actor)


def _give_out(
    ray: Any,
    start: Callable[[], Any],
    workers: int,
    ready: set[Any],
    units: deque[Unit],
    done: Callable[[Outcome], None],
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Give units to `workers` actors until all are done; adds the actors that have loaded to `ready`."""
    free: list[Any] = []
    loading: dict[Any, Any] = {}
    busy: dict[Any, tuple[Any, Unit]] = {}
    attempts: Counter[str] = Counter()
    stopping, noted, waited = False, False, time.monotonic()

    def load(actor: Any) -> None:
        # With retries, Ray waits for an actor while it restarts it.
        loading[actor.load.options(max_task_retries=-1).remote()] = actor

    def again(actor: Any, error: Exception) -> None:
        """Go on after an actor's death. Ray restarts it a limited number of times, perhaps on another node."""
        if not isinstance(error, ray.exceptions.ActorDiedError):
            load(actor)
        elif actor in ready:  # in a long run, an actor may use up its restarts
            load(start())
        elif free or loading or busy:
            say(f"A worker cannot be started; the run continues without it: {_reason(error)}.")
        else:
            raise BankError(f"No worker can be started: {_reason(error)}. What was committed is safe.") from error

    for _ in range(workers):
        load(start())
    while units or busy:
        while free and units:
            actor, given = free.pop(), units.popleft()
            busy[actor.do.remote(given)] = actor, given
        answered, _ = ray.wait([*loading, *busy], timeout=_POLL)
        for reference in answered:
            actor, unit = busy.pop(reference) if reference in busy else (loading.pop(reference), None)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise BankError(f"A worker failed: {_reason(error)}. What was committed is safe.") from error
            except ray.exceptions.RayError as error:  # the actor died, or its node, or its result with it
                if unit is not None:  # the next free actor gets its unit
                    first = unit.samples[0].key
                    attempts[first] += 1
                    if attempts[first] >= _ATTEMPTS:
                        raise BankError(
                            f"Workers died {_ATTEMPTS} times of the {len(unit.samples):,} images from {first!r} on "
                            f"(out of memory?): {_reason(error)}. What was committed is safe."
                        ) from error
                    if not stopping:
                        units.appendleft(unit)
                again(actor, error)
                continue
            if isinstance(outcome, PatchbankError):
                raise outcome
            if unit is not None:
                done(outcome)
            ready.add(actor)
            free.append(actor)
        if busy or answered:
            waited = time.monotonic()
        elif time.monotonic() - waited > _PATIENCE and not noted:
            noted = True
            say(f"Waiting for the cluster: Ray has placed none of {workers} workers yet. `ray status` says why.")
        if stop() and not stopping:
            stopping = True
            units.clear()
            for actor, _ in busy.values():
                _stop(actor)


def _stop(actor: Any) -> None:
    actor.stop.options(concurrency_group=_CONTROL).remote()


def _reason(error: Exception) -> str:
    """The last line of Ray's message; tracebacks and identifiers precede it."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")


def _absolute(units: Sequence[Unit]) -> Iterator[Unit]:
    """The same units with absolute paths: an actor's working directory is another one."""

    @cache
    def absolute(source: Source) -> Source:
        return source if source.remote else replace(source, location=source.location.absolute())

    for unit in units:
        samples = (each._replace(source=absolute(each.source)) for each in unit.samples)
        yield replace(unit, samples=tuple(samples))
