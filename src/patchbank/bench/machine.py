"""What machine this is, in words, to stand beside what was measured on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from patchbank.extraction.advice import cores


def machine(device: torch.device | None = None) -> str:
    """The processor, how many of its cores this process may use, and the GPU if it is used."""
    text = f"{_processor()}, {cores()} cores"
    if device is not None and device.type == "cuda":
        text += f", {torch.cuda.get_device_name(device)}"
    return text


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
