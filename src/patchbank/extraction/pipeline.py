"""The pipeline: samples -> decode threads -> fixed-size batches -> encoder -> writer. Memory bounded in bytes.

Decoding, encoding and writing run at once. An image's slot in its batch is its position in the dataset modulo the
batch size, and empty slots stay black. So each image meets the encoder in the same place of a batch of the same
size however the run is split, resumed or repeated, and its numbers do not depend on that even on devices whose
kernels treat the rows of a product differently.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
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
Decode = Callable[[Sequence[Sample], ByteBudget], Sequence[Found]]  # the samples of one image
Waiting = tuple[Sample, Callable[[], Found]]  # a sample, and a function that waits until it is decoded


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

    @property
    def bound(self) -> str | None:
        """The stage that the others wait for: ``decode``, ``encode`` or ``write``; None if the run did nothing."""
        if not (self.decode or self.encode or self.write):
            return None
        return max(("decode", "encode", "write"), key=lambda stage: float(getattr(self, stage)))


@dataclass(frozen=True)
class Stages:
    """The stages that the pipeline connects.

    Attributes:
        decode: turns samples of one image into their pixels or failures; called from many threads at once.
        submit: starts the forward pass of (B, h, w, 3) uint8, and returns a function that waits for the outputs, name
            -> (B, ...) on the CPU. Called from one thread.
        add: gives features and failures to the bank, in the images' order; called from one thread. Returns the failures
            of features that cannot be stored.
        added: called after each `add`, at once and from its thread: the number of features, and all failures.
        pinned: whether to put pixels into page-locked memory, from which CUDA copies while it computes.
        deferred: whether `submit` returns before the batch is computed: then one more is begun before this is received.
    """

    decode: Decode
    submit: Callable[[Tensor], Callable[[], Outputs]]
    add: Callable[[Sequence[Feature], Sequence[Failure]], Sequence[Failure]]
    added: Callable[[int, Sequence[Failure]], None]
    pinned: bool = False
    deferred: bool = True


def encode_into(
    bank: BankWriter,
    runner: Runner,
    todo: Sequence[Sample],
    config: ExtractConfig,
    *,
    added: Callable[[int, Sequence[Failure]], None],
    stop: Callable[[], bool],
    warned: Warned,
) -> tuple[StageTimes, list[str], DatasetError | None]:
    """Read and encode images, and give them to a bank, in order; `warned` gets the decoders' warnings.

    Returns:
        Seconds waited for each stage; notes for the user; and the error that ended the run if the images are gone, for
        the caller to raise after committing the features before it.
    """
    gone: list[DatasetError] = []
    wanted = bank.manifest.input
    one_at_a_time = Lock()

    def decode(samples: Sequence[Sample], budget: ByteBudget) -> Sequence[Found]:
        try:
            with collected() as said:
                results = load_all(samples, wanted, budget)
        except DatasetError as error:
            gone.append(error)
            return [Failure(each.key, str(error)) for each in samples]  # never stored: the run stops before this batch
        if said and any(isinstance(each, Decoded) for each in results):
            with one_at_a_time:
                warned.add(samples[0].image, said)
        return results

    stages = Stages(
        decode=decode,
        submit=partial(runner.submit, dtype=_received(bank.manifest)),
        add=bank.add,
        added=added,
        pinned=runner.device.type == "cuda",
        deferred=runner.device.type == "cuda",
    )
    workers = config.workers or auto_workers() * (_REQUESTS if any(each.source.remote for each in todo[:1]) else 1)
    batch_size = bank.manifest.batch_size
    times = run(
        todo,
        stages,
        batch_size=batch_size,
        input_size=wanted.size,
        workers=workers,
        stop=lambda: bool(gone) or stop(),
    )
    notes = list(runner.notes)
    if bank.manifest.compiled and not runner.compiled:
        notes.append("The bank was begun compiled: the last bits of these features may differ.")
    return times, notes, gone[0] if gone else None


def _received(bank: Manifest) -> torch.dtype:
    """The dtype to receive outputs in."""
    import torch

    dtypes = {each.dtype for each in bank.outputs.values()}
    same = dtypes.pop() if len(dtypes) == 1 else ""
    return getattr(torch, same) if same in _RECEIVED else torch.float32


def run(
    todo: Iterable[Sample],
    stages: Stages,
    *,
    batch_size: int,
    input_size: tuple[int, int],
    workers: int,
    stop: Callable[[], bool],
) -> StageTimes:
    """Encode samples and give them to the bank, in order. Stops after the batches in progress when `stop` is true.

    Raises what `submit` and `add` raise; what was committed before stays.
    """
    times = StageTimes()
    decoding, writing = ByteBudget(_DECODING_BYTES), ByteBudget(_WRITING_BYTES)
    image_bytes = input_size[0] * input_size[1] * 3
    ahead = max(1, min(_WAITING_BYTES // (batch_size * image_bytes), 1 + -(-2 * workers // batch_size)))

    decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    begun: deque[tuple[Sequence[tuple[int, Decoded]], list[Failure], Callable[[], Outputs]]] = deque()
    additions: deque[Future[None]] = deque()

    def add(features: list[Feature], failures: list[Failure], held: int) -> None:
        try:
            refused = stages.add(features, failures)
        finally:
            writing.release(held)
        stages.added(len(features) - len(refused), [*failures, *refused])

    def finish(images: Sequence[tuple[int, Decoded]], failures: list[Failure], wait: Callable[[], Outputs]) -> None:
        """Give a batch's features to the writer when they are computed."""
        began = time.perf_counter()
        features = _features(images, wait())
        times.encode += (encoded := time.perf_counter()) - began
        held = writing.acquire(sum(feature.nbytes for feature in features))
        additions.append(writer.submit(add, features, failures, held))
        while additions and (additions[0].done() or len(additions) > _WRITING_BATCHES):
            additions.popleft().result()
        times.write += time.perf_counter() - encoded

    try:
        for batch in _ahead(_batches(_decoding(todo, stages.decode, decoders, decoding), batch_size), ahead):
            began = time.perf_counter()
            results = [wait() for _, wait in batch]
            times.decode += (decoded := time.perf_counter()) - began
            if stop():
                break
            images = [(each.sample.position % batch_size, each) for each in results if isinstance(each, Decoded)]
            failures = [result for result in results if isinstance(result, Failure)]
            wait = stages.submit(_batch(images, batch_size, input_size, stages.pinned)) if images else dict
            times.encode += time.perf_counter() - decoded
            begun.append((images, failures, wait))
            if len(begun) > stages.deferred:  # compute this batch while receiving the one before
                finish(*begun.popleft())
        while begun:
            finish(*begun.popleft())

        began = time.perf_counter()
        while additions:
            additions.popleft().result()
        times.write += time.perf_counter() - began
    finally:
        decoders.shutdown(wait=True, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)
    return times


def _decoding(
    todo: Iterable[Sample], decode: Decode, decoders: ThreadPoolExecutor, budget: ByteBudget
) -> Iterator[Waiting]:
    """Samples that are being decoded, an image once for all its regions that follow each other."""
    for _, same in groupby(todo, lambda sample: sample if sample.region is None else (sample.source, sample.image)):
        while samples := tuple(islice(same, _TOGETHER)):
            future = decoders.submit(decode, samples, budget)
            yield from ((sample, partial(_result, future, row)) for row, sample in enumerate(samples))


def _result(future: Future[Sequence[Found]], row: int) -> Found:
    return future.result()[row]


def _batches(waiting: Iterable[Waiting], batch_size: int) -> Iterator[list[Waiting]]:
    """The batches: a sample belongs to batch ``position // batch_size``, slot ``position % batch_size``."""
    for _, together in groupby(waiting, lambda each: each[0].position // batch_size):
        yield list(together)


def _ahead(batches: Iterable[list[Waiting]], ahead: int) -> Iterator[list[Waiting]]:
    """Batches in order; `ahead` more are being decoded."""
    begun: deque[list[Waiting]] = deque()
    for batch in batches:
        begun.append(batch)
        if len(begun) > ahead:
            yield begun.popleft()
    yield from begun


def _batch(images: Sequence[tuple[int, Decoded]], batch_size: int, input_size: tuple[int, int], pinned: bool) -> Tensor:
    """(batch_size, h, w, 3) uint8: each image in its slot."""
    import torch

    pixels = torch.zeros(batch_size, *input_size, 3, dtype=torch.uint8, pin_memory=pinned)
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
