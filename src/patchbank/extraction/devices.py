"""The devices of a run: decided once, before the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchbank.config import ExtractConfig
from patchbank.encoders.defaults import check_precision

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        names: this machine's devices, one process for each if there are several; for a cluster, the kind only.
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
        import torch

        return torch.device(self.names[0])

    @property
    def shared(self) -> bool:
        """Whether other processes compute."""
        return self.workers is not None or len(self.names) > 1


def decide(config: ExtractConfig) -> Devices:
    """The devices of a configuration on this machine or cluster.

    Raises ConfigError if a device does not exist or lacks the precision, or if no cluster answers.
    """
    if config.engine == "local":
        from patchbank.encoders.device import resolve_devices

        return Devices(tuple(map(str, resolve_devices(config.device, config.precision))))
    from patchbank.extraction import cluster  # its package is an extra

    workers, gpus = cluster.workers(config)
    kind = "cuda" if gpus else "cpu"
    check_precision(kind, config.precision)
    return Devices((kind,), workers, gpus)


def assume(config: ExtractConfig) -> Devices:
    """Devices for a plan that computes nothing: without torch, as far as the options ask for none that can be missing.

    Raises ConfigError as `decide` does.
    """
    if config.engine == "local" and config.device in ("auto", "cpu") and config.precision in ("fp32", "bf16"):
        return Devices(("cpu",))  # which devices they are decides nothing then
    return decide(config)
