"""A Ray cluster: actors that have loaded the model, wherever Ray places them, restarted by Ray where they die.

A unit whose actor died goes to the next one that is free. Ray's own retries of an actor's task would wait for that very
actor, for ever where its node was lost and no other has room.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patchbank.errors import BankError, PatchbankError
from patchbank.extraction.cluster import connect, nodes
from patchbank.extraction.work import Outcome, Task, Unit
from patchbank.locations import is_remote

if TYPE_CHECKING:
    from patchbank.datasets import Sample
    from patchbank.datasets.sources import Source

_CONTROL = "control"  # the concurrency group of `stop`
_ATTEMPTS = 5  # at a unit, before its images are taken for what kills the workers
_POLL = 0.5  # seconds between looks at whether the run is to stop
_ANSWER = 10.0  # seconds that workers have to close in
_PATIENCE = 30.0  # seconds without a worker, until somebody is told


def _cpus(nodes: Sequence[Mapping[str, float]], workers: int, gpus: float) -> int:
    """Processor cores for each worker, so that as many as a node has GPUs for, or its share of all, fit on it."""
    if gpus:
        shares = [node.get("CPU", 1) / (node["GPU"] // gpus) for node in nodes if node.get("GPU", 0) >= gpus]
    else:
        able = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
        shares = [cpus / -(-workers // len(able)) for cpus in able]
    return max(1, int(min(shares, default=1)))


class _Worker:
    """An actor. Errors that are known come back as values: Ray would wrap what is raised."""

    def __init__(self, task: Task, cpus: int, device: str) -> None:
        self._task, self._cpus, self._device = task, cpus, device
        self._stopping = threading.Event()
        self._worker: Any = None

    def load(self) -> PatchbankError | None:
        """Load the model, if that has not been done yet."""
        import torch

        from patchbank.budget import keep_freed_memory
        from patchbank.extraction.worker import Worker

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
        if error := self.load():  # Ray may have restarted it since it was asked to
            return error
        try:
            outcome: Outcome = self._worker(unit, self._stopping.is_set)
            return outcome
        except PatchbankError as error:
            return _named(error)

    def stop(self) -> None:
        """Have `do` end after the images in flight."""
        self._stopping.set()

    def close(self) -> None:
        """Close the bank."""
        if self._worker is not None:
            self._worker.close()


def _named(error: PatchbankError) -> PatchbankError:
    """The error, with the node that it comes from: its disks are not the driver's."""
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return type(error)(f"On the node {address}: {error}")


def run(
    task: Task,
    units: Sequence[Unit],
    done: Callable[[Outcome], None],
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Do all units; `done` is told of each, `say` what a user should know meanwhile.

    Raises what a worker raises, and BankError where workers die of the same unit again and again.
    """
    config = task.config
    ray, gpus, workers = connect(config.ray_address), task.devices.gpus_a_worker, task.devices.workers or 1
    cpus = _cpus(nodes(ray), workers, gpus)
    config = replace(config, workers=config.workers or cpus)
    task = replace(
        task,
        config=config,
        out=task.out if is_remote(task.out) else task.out.absolute(),
    )
    # One call at a time, but `stop` is heard while `do` goes on.
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
    """Give each of so many actors a unit as it becomes free, until all are done; `ready` gathers those that loaded."""
    free: list[Any] = []
    loading = {_load(actor): actor for actor in (start() for _ in range(workers))}
    busy: dict[Any, tuple[Any, Unit]] = {}
    attempts: dict[str, int] = {}
    stopping, noted, waited = False, False, time.monotonic()

    def again(actor: Any, error: Exception) -> None:
        """One has died. Ray restarts it, on another node if need be, up to so many times."""
        if not isinstance(error, ray.exceptions.ActorDiedError):
            loading[_load(actor)] = actor
        elif actor in ready:  # in a long run, each may die that often
            fresh = start()
            loading[_load(fresh)] = fresh
        elif free or loading or busy:
            say(f"A worker cannot be started, and is given up: {_reason(error)}.")
        else:
            raise BankError(f"No worker can be started: {_reason(error)}. What was committed is safe.") from error

    while units or busy:
        while free and units:
            actor, given = free.pop(), units.popleft()
            busy[actor.do.remote(given)] = actor, given
        answered, _ = ray.wait([*loading, *busy], timeout=_POLL)
        for reference in answered:
            unit: Unit | None = None
            if reference in busy:
                actor, unit = busy.pop(reference)
            else:
                actor = loading.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise BankError(f"A worker failed: {_reason(error)}. What was committed is safe.") from error
            except ray.exceptions.RayError as error:  # the actor died, or its node, or its result with it
                if unit is not None:  # whoever is free gets what it was at
                    first = unit.samples[0].key
                    attempts[first] = attempts.get(first, 0) + 1
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
            say(f"Waiting for the cluster: none of {workers} workers has a place yet. `ray status` says why.")
        if stop() and not stopping:
            stopping = True
            units.clear()
            for actor, _ in busy.values():
                _stop(actor)


def _load(actor: Any) -> Any:
    """Have it load. With retries, Ray waits for an actor that is being restarted, as long as it restarts it."""
    return actor.load.options(max_task_retries=-1).remote()


def _stop(actor: Any) -> None:
    actor.stop.options(concurrency_group=_CONTROL).remote()


def _reason(error: Exception) -> str:
    """The last line of what Ray says; before it stand tracebacks and identifiers."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")


def _absolute(units: Sequence[Unit]) -> Iterator[Unit]:
    """The same with paths that mean the same in a process that was started elsewhere."""
    sources: dict[Source, Source] = {}

    def moved(sample: Sample) -> Sample:
        if sample.source.remote:
            return sample
        if (source := sources.get(sample.source)) is None:
            source = replace(sample.source, location=sample.source.location.absolute())
            sources[sample.source] = source
        return sample._replace(source=source)

    for unit in units:
        yield replace(unit, samples=tuple(moved(sample) for sample in unit.samples))
