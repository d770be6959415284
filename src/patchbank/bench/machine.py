"""This machine, for the results measured on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from patchbank.budget import machine_memory
from patchbank.extraction.advice import cores


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """The processor with its family, model and bfloat16 instructions, cores that this process may use, memory in GB,
    and the GPU if it is used; without names of the host."""
    cpu = _cpuinfo()
    families = [int(cpu[name]) for name in ("cpu family", "model") if name in cpu]
    flags = [name for name in ("avx512_bf16", "amx_bf16") if name in cpu.get("flags", "").split()]
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "family_and_model": families,
        "bfloat16": flags,
        "cores": cores(),
        "memory_gb": round(machine_memory() / 1e9),
        "gpu": torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None,
    }


def machine(device: torch.device | None = None) -> str:
    """The same in words."""
    return words(facts(device))


def words(found: dict[str, Any]) -> str:
    """`facts` in words: ``AMD EPYC (family 25, model 17, avx512_bf16), 2 cores, 25 GB``."""
    kind = [f"{name} {value}" for name, value in zip(("family", "model"), found["family_and_model"], strict=False)]
    inner = ", ".join([*kind, *found["bfloat16"]])
    parts = [found["processor"] + (f" ({inner})" if inner else ""), f"{found['cores']} cores"]
    return ", ".join([*parts, f"{found['memory_gb']} GB", *([found["gpu"]] if found["gpu"] else [])])


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return dict(re.findall(r"^([^\t:]+)\t*: (.*)$", text, re.MULTILINE))
