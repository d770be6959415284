"""What a run computes on: decided once, before the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchbank.config import ExtractConfig
from patchbank.encoders.device import check_precision, resolve_devices


@dataclass(frozen=True)
class Devices:
    """What a run computes on.

    Attributes:
        names: of this machine's devices, a process each where there are several; of a cluster the kind alone.
        workers: of a cluster; None for this machine.
        gpus_a_worker: of a cluster.
    """

    names: tuple[str, ...]
    workers: int | None = None
    gpus_a_worker: float = 0

    @property
    def kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.names[0].partition(":")[0]

    @property
    def first(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.names[0])

    @property
    def shared(self) -> bool:
        """Whether other processes than this one compute."""
        return self.workers is not None or len(self.names) > 1


def decide(config: ExtractConfig) -> Devices:
    """The devices that a configuration means on this machine or cluster.

    Raises ConfigError where there is no such device, it does not compute in this precision, or no cluster answers.
    """
    if config.engine == "local":
        return Devices(tuple(map(str, resolve_devices(config.device, config.precision))))
    from patchbank.extraction import cluster  # its package is an extra

    workers, gpus = cluster.workers(config)
    kind = "cuda" if gpus else "cpu"
    check_precision(torch.device(kind), config.precision)
    return Devices((kind,), workers, gpus)
