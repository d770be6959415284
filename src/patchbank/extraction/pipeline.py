"""The pipeline: samples -> decode threads -> fixed-size batches -> encoder -> writer. Memory bounded in bytes.

Decoding, encoding and writing run at once. An image's slot in its batch is its position in the dataset modulo the
batch size, and empty slots stay black. So each image meets the encoder in the same place of a batch of the same
size however the run is split, resumed or repeated, and its numbers do not depend on that even on devices whose
kernels treat the rows of a product differently.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from itertools import groupby, islice, repeat
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.budget import ByteBudget
from patchbank.config import ExtractConfig
from patchbank.datasets import Sample
from patchbank.datasets.samples import Decoded, Failure
from patchbank.decoder_warnings import Warned, collected
from patchbank.errors import DatasetError
from patchbank.extraction.advice import auto_workers
from patchbank.features import Input
from patchbank.preprocess import load_all

if TYPE_CHECKING:  # a run that finds nothing to do needs no torch
    import torch
    from torch import Tensor

    from patchbank.encoders.runner import Runner

# Limits of the bytes in memory: pictures being decoded, decoded inputs that wait, features that wait.
_DECODING_BYTES = 2 << 30
_WAITING_BYTES = 256 << 20
_WRITING_BYTES = 512 << 20
_WRITING_BATCHES = 64  # that wait to be written, however small: their objects take memory too

# Features stored as halves are rounded on the device, so that half the bytes are transferred. int8 scales are computed
# from float32.
_RECEIVED = ("float16", "bfloat16")
_TOGETHER = 64  # regions of an image that are decoded at once: their inputs wait together
_REQUESTS = 4  # decode threads per core, if reading waits for a network

Outputs = dict[str, "Tensor"]
Found = Decoded | Failure


@dataclass
class StageTimes:
    """Seconds that the main thread waited for each stage of a run."""

    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0

    def add(self, other: StageTimes) -> None:
        """Add the times of another process."""
        self.decode += other.decode
        self.encode += other.encode
        self.write += other.write


def bound_of(lanes: Sequence[StageTimes]) -> str | None:
    """The stage that the others wait for: ``decode``, ``encode`` or ``write``; None if nothing was done."""
    seconds = {
        "decode": max(each.decode for each in lanes),  # all wait for it at once
        "encode": sum(each.encode for each in lanes),
        "write": sum(each.write for each in lanes),
    }
    return max(seconds, key=seconds.__getitem__) if any(seconds.values()) else None


@dataclass(eq=False)
class Lane:
    """One bank's way through the pipeline: its samples, its encoder, its writer.

    Attributes:
        todo: the samples, in the dataset's order.
        input: what an image becomes for the encoder.
        batch_size: samples of a forward pass.
        submit: starts the forward pass of (B, h, w, 3) uint8, and returns a function that waits for the outputs, name
            -> (B, ...) on the CPU. Called from one thread.
        add: gives features and failures to the bank, in the images' order; called from one thread. Returns the failures
            of features that cannot be stored.
        added: called after each `add`, at once and from its thread: the number of features, and all failures.
        pinned: whether to put pixels into page-locked memory, from which CUDA copies while it computes.
        deferred: whether `submit` returns before the batch is computed: then one more is begun before this is received.
        failed: set by a run whose features or failures this bank could not take.
        times: filled by a run; those for decoding are waited for all its lanes.
        warned: filled by a run with the decoders' warnings about these samples' images.
    """

    todo: Sequence[Sample]
    input: Input
    batch_size: int
    submit: Callable[[Tensor], Callable[[], Outputs]]
    add: Callable[[Sequence[Feature], Sequence[Failure]], Sequence[Failure]]
    added: Callable[[int, Sequence[Failure]], None]
    pinned: bool = False
    deferred: bool = True
    failed: bool = False
    times: StageTimes = field(default_factory=StageTimes)
    warned: Warned = field(default_factory=Warned)

    def batch_of(self, sample: Sample) -> int:
        """The number of the batch that a sample belongs to."""
        return sample.position // self.batch_size


Wanted = tuple[Lane, Sample]
Decode = Callable[[Sequence[Wanted], ByteBudget], Sequence[Found]]  # the samples of one image
Waiting = tuple[Sample, Callable[[], Found]]  # a sample, and a function that waits until it is decoded
Batch = tuple[Lane, list[Waiting]]


def lane_of(
    bank: BankWriter, runner: Runner, todo: Sequence[Sample], added: Callable[[int, Sequence[Failure]], None]
) -> Lane:
    """The lane that fills a bank with an encoder's features of samples."""
    cuda = runner.device.type == "cuda"
    return Lane(
        todo=todo,
        input=bank.manifest.input,
        batch_size=bank.manifest.batch_size,
        submit=partial(runner.submit, dtype=_received(bank.manifest)),
        add=bank.add,
        added=added,
        pinned=cuda,
        deferred=cuda,
    )


def notes_of(bank: BankWriter, runner: Runner) -> list[str]:
    """What a user should know about how features were computed for a bank, one sentence each."""
    changed = bank.manifest.compiled and not runner.compiled
    more = ["The bank was begun compiled: the last bits of these features may differ."] if changed else []
    return [*runner.notes, *more]


def _received(bank: Manifest) -> torch.dtype:
    """The dtype to receive outputs in."""
    import torch

    dtypes = {each.dtype for each in bank.outputs.values()}
    same = dtypes.pop() if len(dtypes) == 1 else ""
    return getattr(torch, same) if same in _RECEIVED else torch.float32


def encode(lanes: Sequence[Lane], config: ExtractConfig, stop: Callable[[], bool]) -> DatasetError | None:
    """Read the images of one dataset's samples, each once for all lanes, encode them, and give them to the banks.

    Returns:
        The error that ended the run if the images are gone, for the caller to raise after committing the features
        before it.
    """
    gone: list[DatasetError] = []
    one_at_a_time = Lock()

    def decode(samples: Sequence[Wanted], budget: ByteBudget) -> Sequence[Found]:
        wanted: dict[Input, list[Sample]] = defaultdict(list)
        for lane, sample in samples:
            wanted[lane.input].append(sample)
        try:
            with collected() as said:
                found = {each: iter(results) for each, results in load_all(wanted, budget).items()}
        except DatasetError as error:
            gone.append(error)
            # Never stored: the run stops before this batch.
            return [Failure(sample.key, str(error)) for _, sample in samples]
        results = [next(found[lane.input]) for lane, _ in samples]
        read = {lane for (lane, _), each in zip(samples, results, strict=True) if isinstance(each, Decoded)}
        if said:
            with one_at_a_time:
                for lane in read:
                    lane.warned.add(samples[0][1].image, said)
        return results

    remote = any(each.source.remote for lane in lanes for each in lane.todo[:1])
    workers = config.workers or auto_workers() * (_REQUESTS if remote else 1)
    run(lanes, decode, workers=workers, stop=lambda: bool(gone) or stop())
    return gone[0] if gone else None


def run(lanes: Sequence[Lane], decode: Decode, *, workers: int, stop: Callable[[], bool]) -> None:
    """Encode the lanes' samples and give them to their banks, in order. Stops after the batches in progress.

    Raises what `submit` and `add` raise; what was committed before stays.

    Args:
        decode: turns samples of one image into their pixels or failures; called from many threads at once.
    """
    decoding, writing = ByteBudget(_DECODING_BYTES), ByteBudget(_WRITING_BYTES)
    decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    begun: deque[tuple[Lane, Sequence[tuple[int, Decoded]], list[Failure], Callable[[], Outputs]]] = deque()
    additions: deque[tuple[Lane, Future[None]]] = deque()

    def ahead(lane: Lane) -> int:
        most = _WAITING_BYTES // len(lanes) // (lane.batch_size * prod(lane.input.size) * 3)
        return max(1, min(most, 1 + -(-2 * workers // lane.batch_size)))

    def add(lane: Lane, features: list[Feature], failures: list[Failure], held: int) -> None:
        try:
            refused = lane.add(features, failures)
        except BaseException:
            lane.failed = True
            raise
        finally:
            writing.release(held)
        lane.added(len(features) - len(refused), [*failures, *refused])

    def finish(
        lane: Lane, images: Sequence[tuple[int, Decoded]], failures: list[Failure], wait: Callable[[], Outputs]
    ) -> None:
        """Give a batch's features to the writer when they are computed."""
        began = time.perf_counter()
        features = _features(images, wait())
        lane.times.encode += (encoded := time.perf_counter()) - began
        held = writing.acquire(sum(feature.nbytes for feature in features))
        additions.append((lane, writer.submit(add, lane, features, failures, held)))
        while additions and (additions[0][1].done() or len(additions) > _WRITING_BATCHES):
            additions.popleft()[1].result()
        lane.times.write += time.perf_counter() - encoded

    try:
        for lane, batch in _ahead(_batches(_decoding(lanes, decode, decoders, decoding)), ahead):
            began = time.perf_counter()
            results = [wait() for _, wait in batch]
            decoded = time.perf_counter()
            for each in lanes:
                each.times.decode += decoded - began
            if stop():
                break
            images = [(each.sample.position % lane.batch_size, each) for each in results if isinstance(each, Decoded)]
            failures = [result for result in results if isinstance(result, Failure)]
            wait = lane.submit(_batch(images, lane)) if images else dict
            lane.times.encode += time.perf_counter() - decoded
            begun.append((lane, images, failures, wait))
            if len(begun) > lane.deferred:  # compute this batch while receiving the one before
                finish(*begun.popleft())
        while begun:
            finish(*begun.popleft())
        for lane, addition in additions:
            began = time.perf_counter()
            addition.result()
            lane.times.write += time.perf_counter() - began
    finally:
        decoders.shutdown(wait=True, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)


def _decoding(
    lanes: Sequence[Lane], decode: Decode, decoders: ThreadPoolExecutor, budget: ByteBudget
) -> Iterator[tuple[Lane, Waiting]]:
    """Samples that are being decoded: an image once for all lanes, and for all its regions that follow each other."""
    wanted = merge(*(zip(repeat(lane), lane.todo) for lane in lanes), key=lambda each: each[1].position)
    for _, same in groupby(wanted, lambda each: (each[1].source, each[1].image)):
        while samples := tuple(islice(same, _TOGETHER)):
            future = decoders.submit(decode, samples, budget)
            yield from ((lane, (sample, partial(_result, future, row))) for row, (lane, sample) in enumerate(samples))


def _result(future: Future[Sequence[Found]], row: int) -> Found:
    return future.result()[row]


def _batches(waiting: Iterable[tuple[Lane, Waiting]]) -> Iterator[Batch]:
    """The lanes' batches. One ends where a sample of any lane lies beyond it: a lane may have long gaps."""
    begun: dict[Lane, list[Waiting]] = {}
    for lane, each in waiting:
        for other, batch in list(begun.items()):
            if other.batch_of(batch[0][0]) != other.batch_of(each[0]):
                yield other, begun.pop(other)
        begun.setdefault(lane, []).append(each)
    yield from begun.items()


def _ahead(batches: Iterable[Batch], ahead: Callable[[Lane], int]) -> Iterator[Batch]:
    """Batches in order; `ahead` more of each lane are being decoded."""
    begun: deque[Batch] = deque()
    for batch in batches:
        begun.append(batch)
        while sum(lane is batch[0] for lane, _ in begun) > ahead(batch[0]):
            yield begun.popleft()
    yield from begun


def _batch(images: Sequence[tuple[int, Decoded]], lane: Lane) -> Tensor:
    """(batch_size, h, w, 3) uint8: each image in its slot."""
    import torch

    pixels = torch.zeros(lane.batch_size, *lane.input.size, 3, dtype=torch.uint8, pin_memory=lane.pinned)
    for slot, image in images:
        pixels.numpy()[slot] = image.pixels
    return pixels


def _features(images: Sequence[tuple[int, Decoded]], outputs: Outputs) -> list[Feature]:
    slots = [slot for slot, _ in images]
    # A copy without the empty slots: a view would keep the whole batch in memory.
    chosen = {name: value if slots == list(range(len(value))) else value[slots] for name, value in outputs.items()}
    return [
        Feature(image.sample.key, {name: value[row] for name, value in chosen.items()}, image.size, image.sample.region)
        for row, (_, image) in enumerate(images)
    ]
