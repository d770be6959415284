"""Advice for the stage that bounds a run."""

from __future__ import annotations

import os

from patchbank.bank.manifest import Manifest
from patchbank.config import ExtractConfig

_NEW = " (in a new bank)"  # an option that changes the features


def advise(bound: str | None, manifest: Manifest, config: ExtractConfig) -> str | None:
    """How to make a stage faster, in a few words."""
    precision = manifest.identity.get("precision")
    if bound == "decode":
        if (most := auto_workers()) > (config.workers or most):
            return f"--workers {most}"
        return f"--decode fast{_NEW}" if config.decode == "exact" else "more cores, or --partition on several machines"
    if bound == "encode":
        if manifest.device == "cpu":
            from patchbank.encoders.device import has_bfloat16

            slower = precision == "fp32" and has_bfloat16()
            return f"--precision bf16 where a relative error of 1e-2 will do{_NEW}, or a GPU" if slower else "a GPU"
        if precision in ("fp32", "tf32"):
            return f"--precision fp16 where a relative error of 1e-3 will do{_NEW}"
        return "--partition on several GPUs" if manifest.compiled else f"--compile on for long runs{_NEW}"
    if bound == "write":
        if manifest.dtype == "float32":
            shards = " --layout shards" if manifest.layout == "ezhoi" else ""
            return f"--dtype float16{shards} for half the bytes{_NEW}"
        return f"--layout shards{_NEW}" if manifest.layout == "ezhoi" else "a faster disk"
    return None


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def auto_workers() -> int:
    """The default number of decode threads: one per core, at most 16."""
    return max(1, min(16, cores()))
