"""What does it take to decode an image? OpenAI's preprocessing, patchbank's exact one, and its fast one.

    python -m benchmarks.decode [--images 100] [--rounds 5] [--workers 1,2] [--input-size 224]

JPEGs of HICO-DET's sizes, files in the page cache. Seconds an image in one thread; then images a second with so many
threads, as patchbank does, and with so many processes, as a DataLoader does (the processes start and import their
modules before). torch keeps to one thread of its own in all of them. The original's includes the
conversion to normalised float32, which patchbank leaves to its encoder.

The share of the time in which decoding holds Python's lock, and so keeps other threads from running Python, is
estimated by sampling: another thread sleeps until instants chosen at random and notes how late it wakes; where that is
later than nine times in ten beside an idle thread, the lock was held. Holding it for some tens of microseconds is
thereby not seen, and on a machine with no core to spare the estimate means little.

Last, how far the fast pixels are from the exact ones. Variants run in turn; medians over the rounds count. Prints
tables and ends in one JSON line.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import alternate, finish, hico_photographs, options_of, print_table, seconds_of
from patchbank.budget import ByteBudget
from patchbank.config import Decode
from patchbank.datasets import Sample
from patchbank.datasets.samples import Decoded
from patchbank.datasets.sources import Directory
from patchbank.encoders.openai.registry import MEAN, STD
from patchbank.extraction.advice import auto_workers
from patchbank.features import Input
from patchbank.preprocess import load

_BUDGET = 2 << 30
_SAMPLING_SECONDS = 2.0
_BETWEEN_SAMPLES = 0.5e-3  # seconds, on the average
_USUAL = 0.9  # of the wakings beside an idle thread


def main(arguments: Sequence[str] | None = None) -> None:
    workers = sorted({1, 2, auto_workers()})
    options = options_of(__doc__, arguments, images=100, rounds=5, workers=workers, input_size=224)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as directory:
            paths = hico_photographs(Path(directory), options.images)
            decoders = {name: partial(decode, options.input_size) for name, decode in _DECODERS.items()}
            alone = {name: partial(_each, decode, paths) for name, decode in decoders.items()}
            for measure in alone.values():
                measure()  # the page cache, and what the libraries set up
            seconds = {name: each / len(paths) for name, each in alternate(alone, options.rounds).items()}
            held = {name: _held(partial(_each, decode, paths[:8])) for name, decode in decoders.items()}
            rates = _together(decoders, paths, options.workers, options.rounds)
            differences = _differences(paths, options.input_size)
    finally:
        torch.set_num_threads(threads)

    print_table(
        ["", "ms an image", "of the original's", "of it with Python's lock"],
        [[name, 1000 * each, each / seconds["original"], held[name]] for name, each in seconds.items()],
    )
    print_table(["images/s", *rates], [[name, *(rate[name] for rate in rates.values())] for name in decoders])
    print_table(
        ["fast against exact", "values that differ", "by, at most", "pixels that differ"],
        [["", f"{differences['share']:.2%}", differences["largest"], f"{differences['pixels']:.2%}"]],
    )
    finish(
        "decode",
        *("pillow", "torchvision", "clip-anytorch"),
        images=options.images,
        rounds=options.rounds,
        input_size=options.input_size,
        seconds_an_image=seconds,
        share_with_pythons_lock=held,
        images_per_second=rates,
        fast_against_exact=differences,
    )


def _original(input_size: int, path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return _transform(input_size)(image)


@lru_cache
def _transform(input_size: int) -> Callable[[Image.Image], torch.Tensor]:
    from benchmarks.peers import preprocessing

    return preprocessing(input_size)


def _patchbank(decode: Decode, input_size: int, path: Path) -> Decoded:
    wanted = Input(size=(input_size, input_size), patch=16, mean=MEAN, std=STD, decoder=decode)
    decoded = load(Sample(path.name, Directory(path.parent), 0), wanted, ByteBudget(_BUDGET))
    if not isinstance(decoded, Decoded):
        raise SystemExit(f"{path.name}: {decoded.reason}")
    return decoded


_DECODERS: dict[str, Callable[[int, Path], object]] = {
    "original": _original,
    "patchbank": partial(_patchbank, "exact"),
    "patchbank fast": partial(_patchbank, "fast"),
}


def _each(decode: Callable[[Path], object], paths: Sequence[Path]) -> float:
    return seconds_of(lambda: [decode(path) for path in paths])


def _held(action: Callable[[], object]) -> float:
    """The share of an action's time in which it holds Python's lock, estimated as the module says."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(10.0)  # the sampler waits until the lock is released, and does not force its release
    try:
        alone = sorted(_lateness(lambda: time.sleep(0.05), _SAMPLING_SECONDS))
        beside = _lateness(action, _SAMPLING_SECONDS)
    finally:
        sys.setswitchinterval(before)
    usual = alone[int(_USUAL * len(alone))]
    late = sum(each > usual for each in beside) / len(beside)
    return min(1.0, max(0.0, (late - (1 - _USUAL)) / _USUAL))


def _lateness(action: Callable[[], object], seconds: float) -> list[float]:
    """How late a thread is at instants chosen at random, while this one repeats an action.

    An instant that passed while the thread was waiting for an earlier one counts too: it is late by what remained.
    """
    late: list[float] = []
    chance = random.Random(0)
    begins = time.perf_counter()
    ends = begins + seconds

    def run() -> None:
        instant = begins
        while (instant := instant + chance.expovariate(1 / _BETWEEN_SAMPLES)) < ends:
            time.sleep(max(0.0, instant - time.perf_counter()))
            late.append(time.perf_counter() - instant)

    sampler = threading.Thread(target=run)
    sampler.start()
    while time.perf_counter() < ends:
        action()
    sampler.join()
    return late


def _together(
    decoders: dict[str, Callable[[Path], object]], paths: Sequence[Path], workers: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Images per second, by number of threads or processes, and by decoder."""
    rates: dict[str, dict[str, float]] = {}
    for count in workers:
        pools: dict[str, Executor] = {
            f"{count} threads": ThreadPoolExecutor(count),
            f"{count} processes": ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            ),
        }
        for name, pool in pools.items():
            with pool:
                chunk = max(1, len(paths) // (8 * count))  # so that passing paths takes negligible time
                measures = {
                    each: partial(_mapped, pool, partial(_discard, decode), paths, chunk)
                    for each, decode in decoders.items()
                }
                for measure in measures.values():
                    measure()
                seconds = alternate(measures, rounds)
            rates[name] = {each: len(paths) / taken for each, taken in seconds.items()}
    return rates


def _discard(decode: Callable[[Path], object], path: Path) -> None:
    """Decode, and keep nothing: the transfer from a process is not measured."""
    decode(path)


def _mapped(pool: Executor, decode: Callable[[Path], None], paths: Sequence[Path], chunk: int) -> float:
    return seconds_of(lambda: list(pool.map(decode, paths, chunksize=chunk)))


def _differences(paths: Sequence[Path], input_size: int) -> dict[str, float]:
    """The differences of the fast pixels: shares of values and of pixels, and the largest difference."""
    values = pixels = largest = 0
    for path in paths:
        exact, fast = (_patchbank(way, input_size, path).pixels.astype(np.int16) for way in ("exact", "fast"))
        difference = np.abs(exact - fast)
        values += np.count_nonzero(difference)
        pixels += np.count_nonzero(difference.any(axis=-1))
        largest = max(largest, int(difference.max()))
    every = len(paths) * input_size**2
    return {"share": values / (3 * every), "pixels": pixels / every, "largest": largest}


if __name__ == "__main__":
    main()
