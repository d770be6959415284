"""What to change where a stage bounds a run."""

from __future__ import annotations

import os

from patchbank.bank.manifest import Manifest
from patchbank.config import ExtractConfig
from patchbank.encoder.encoder import has_bfloat16


def advise(bound: str | None, manifest: Manifest, config: ExtractConfig) -> str | None:
    """What makes a stage faster, in a few words."""
    if bound == "decode":
        if (cores := auto_workers()) > (config.workers or cores):
            return f"--workers {cores}"
        return "--decode fast" if config.decode == "exact" else "more cores, or --partition on several machines"
    if bound == "encode":
        if manifest.device == "cpu":
            slower = manifest.fingerprint.precision == "fp32" and has_bfloat16()
            return "--precision bf16 where a relative error of 1e-2 will do, or a GPU" if slower else "a GPU"
        if manifest.fingerprint.precision in ("fp32", "tf32"):
            return "--precision fp16 where a relative error of 1e-3 will do"
        return "--partition on several GPUs" if manifest.compiled else "--compile on for long runs"
    if bound == "write":
        if manifest.dtype == "float32":
            return "--dtype float16 for half the bytes" + (", --layout shards" if manifest.layout == "ezhoi" else "")
        return "--layout shards" if manifest.layout == "ezhoi" else "a faster disk"
    return None


def auto_workers() -> int:
    """One decode thread for each core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores))
