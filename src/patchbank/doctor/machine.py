"""This machine: the device, batch size and decode threads that an extraction would take, and how fast they are."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from patchbank.config import ExtractConfig
from patchbank.datasets import Sample
from patchbank.datasets.samples import Directory
from patchbank.doctor.findings import Finding
from patchbank.doctor.splits import Split
from patchbank.doctor.timing import Speed, measure_decode, measure_encode
from patchbank.encoders.encoder import auto_batch_size, resolve_device
from patchbank.encoders.openai.registry import Model
from patchbank.errors import ConfigError, PatchbankError
from patchbank.extraction.advice import auto_workers

_SAMPLED = 16  # images that are decoded
_DRIVER = Path("/proc/driver/nvidia/version")


def examine_device(models: Sequence[Model], config: ExtractConfig) -> tuple[Finding, torch.device | None]:
    """What an extraction would compute on; None where it would refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of drivers that are too old; the finding says that it sees none
        try:
            device = resolve_device(config.device, config.precision)
        except ConfigError as error:
            mend = "Leave --device and --precision out, or give those that this machine has."
            return Finding(what="device", level="problem", text=str(error), mend=mend, data={"device": None}), None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    batches = {model.name: config.batch_size or auto_batch_size(model, device) for model in models}
    workers = config.workers or auto_workers()
    sizes = ", ".join(f"{size} for {model}" for model, size in batches.items())
    if len(set(batches.values())) == 1:
        sizes = str(next(iter(batches.values())))
    where = f"{device} ({name})" if name else f"{device} ({torch.get_num_threads()} threads)"
    data: dict[str, Any] = {
        "torch": str(torch.__version__),
        "device": str(device),
        "cuda": name,
        "precision": config.precision,
        "batch_size": batches,
        "workers": workers,
    }
    text = (
        f"torch {torch.__version__} on {where}, {config.precision}, batch size {sizes}, "
        f"{workers} decode thread{'s' * (workers != 1)}."
    )
    if device.type == "cpu" and config.device == "auto" and (_DRIVER.exists() or shutil.which("nvidia-smi")):
        why = "is built without CUDA" if torch.version.cuda is None else "does not see it"
        return Finding(
            what="device",
            level="note",
            text=f"{text} There is an NVIDIA driver, but this torch {why}.",
            mend="Install torch's CUDA build for that driver (https://pytorch.org/get-started/locally).",
            data=data,
        ), device
    return Finding(what="device", level="ok", text=text, data=data), device


def sample(splits: Sequence[Split]) -> list[Sample]:
    """A few of the images that are there, from all over the splits."""
    directories = {split.actual: Directory(split.actual) for split in splits}
    there = [Sample(key, directories[split.actual], 0) for split in splits for key in split.there]
    return there[:: max(1, -(-len(there) // _SAMPLED))]


def measure(
    models: Sequence[Model], config: ExtractConfig, device: torch.device, samples: Sequence[Sample]
) -> tuple[dict[str, Speed], list[Finding]]:
    """Each model's speed, and findings that say it; also those of images that cannot be decoded."""
    speeds: dict[str, Speed] = {}
    findings: list[Finding] = []
    failures: dict[str, str] = {}
    workers = config.workers or auto_workers()
    for model in models:
        try:
            decode, failed = measure_decode(samples, config.resize, model.input_size)
            failures.update(failed)
            encode = measure_encode(model, config.precision, device, config.batch_size)
        except (PatchbankError, RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            findings.append(
                Finding(
                    what=model.name,
                    level="note",
                    text=f"its speed could not be measured: {reason}",
                    mend="If memory was short: end what else uses the device, or extract with a smaller --batch-size.",
                )
            )
            continue
        speed = speeds[model.name] = Speed(encode, decode, workers)
        slower = "encoding" if speed.seconds == speed.encode else "decoding"
        findings.append(
            Finding(
                what=model.name,
                level="ok",
                text=f"about {_two_digits(1 / speed.seconds)} images/s, bound by {slower}: {_milliseconds(encode)} to "
                f"encode, {_milliseconds(decode)} to decode in each of {workers} threads. Rough: a short measurement.",
                data={"encode_seconds": encode, "decode_seconds": decode, "images_per_second": 1 / speed.seconds},
            )
        )
    if failures:
        findings.append(_unreadable(failures, len(samples)))
    return speeds, findings


def _unreadable(failures: Mapping[str, str], sampled: int) -> Finding:
    key, reason = next(iter(failures.items()))
    return Finding(
        what="images",
        level="problem",
        text=f"{len(failures)} of {sampled} images tried cannot be decoded: {key}: {reason}.",
        mend="Copy the images again: extract lists those it cannot read as failed, and ends with exit code 1.",
        data={"tried": sampled, "failures": dict(failures)},
    )


def _milliseconds(seconds: float) -> str:
    return f"{_two_digits(1000 * seconds)} ms"


def _two_digits(number: float) -> str:
    """A rough number: ``0.17``, ``6.6``, ``150``, ``5,900``."""
    rounded = float(f"{number:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
