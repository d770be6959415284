"""How fast this machine decodes and encodes, roughly, from a second or two of each. No checkpoint is needed."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from PIL import Image

from patchbank.bench.pictures import jpeg
from patchbank.budget import ByteBudget
from patchbank.config import Precision, ResizeMode
from patchbank.datasets import Sample
from patchbank.datasets.samples import Decoded, Failure
from patchbank.encoders.openai.random import random_encoder
from patchbank.encoders.openai.registry import Model
from patchbank.preprocess import load, preprocess

_ENCODE_SECONDS = 2.0  # for the measured batch of one model, after a first image
_DECODE_SECONDS = 0.7


@dataclass(frozen=True)
class Speed:
    """What one image takes, in seconds.

    Attributes:
        encode: on the device.
        decode: in one decode thread.
        workers: decode threads.
    """

    encode: float
    decode: float
    workers: int

    @property
    def seconds(self) -> float:
        """For one image of many: the slower of the two stages sets the pace."""
        return max(self.encode, self.decode / self.workers)


def measure_encode(
    model: Model, precision: Precision, device: torch.device, batch_size: int | None, seconds: float = _ENCODE_SECONDS
) -> float:
    """Seconds an image takes in the encoder. Raises RuntimeError where the device's memory does not do."""
    encoder = random_encoder(model, precision, device, batch_size)
    size = encoder.batch_size

    def images(count: int) -> float:
        pixels = torch.randint(0, 256, (count, model.input_size, model.input_size, 3), dtype=torch.uint8)
        began = time.perf_counter()
        encoder(pixels).cpu()  # waits for the device
        return (time.perf_counter() - began) / count

    if device.type == "cuda":
        images(size)  # its libraries load and choose kernels
        return min(images(size) for _ in range(2))
    first = images(1)
    if first > seconds:
        return first
    return images(max(1, min(size, int(seconds / first))))


def measure_decode(
    samples: Sequence[Sample], resize: ResizeMode, input_size: int, seconds: float = _DECODE_SECONDS
) -> tuple[float, list[Failure]]:
    """Seconds an image takes to be decoded and resized, in one thread; and those images that cannot be.

    Takes a synthetic photograph where there are no samples.
    """
    budget, taken, failures = ByteBudget(1 << 30), list[float](), list[Failure]()
    synthetic = None if samples else jpeg()
    ends = time.perf_counter() + seconds
    for number in range(len(samples) or 8):
        began = time.perf_counter()
        if synthetic is not None:
            with Image.open(io.BytesIO(synthetic)) as image:
                preprocess(image, resize, input_size)
            taken.append(time.perf_counter() - began)
        elif isinstance(result := load(samples[number], resize, input_size, budget), Decoded):
            taken.append(time.perf_counter() - began)
        else:
            failures.append(result)
        if time.perf_counter() > ends:
            break
    if not taken:
        return measure_decode([], resize, input_size, seconds)[0], failures
    return median(taken), failures
