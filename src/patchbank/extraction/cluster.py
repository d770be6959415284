"""A Ray cluster: the connection to it, and the number of workers that fit on it."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from patchbank.config import ExtractConfig
from patchbank.errors import ConfigError, install

_ANSWER = 10.0  # seconds in which a cluster must answer


def connect(address: str) -> Any:
    """The ray module, connected to a cluster until the process ends. Keeps an existing connection.

    A cluster of this machine alone (``local``) listens on its loopback interface alone, unless Ray was imported before.
    Raises ConfigError if Ray is not installed, or no cluster answers.
    """
    if address == "local":
        # Whether other machines may join, and so on which interfaces Ray listens. It looks as it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(f"--engine ray needs Ray: {install('ray')}") from None
    if ray.is_initialized():
        return ray
    _require_answer(address)
    try:
        # Ray's log lines would disturb the progress bar.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        if address == "auto":
            raise ConfigError(
                "No Ray cluster is running here: start one with `ray start --head`, name another with --ray-address "
                "HOST:PORT, or use this machine alone with --ray-address local."
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--ray-address {address} cannot be reached: {reason}") from error
    return ray


def _require_answer(address: str) -> None:
    """Raise ConfigError if nothing answers at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not (host and port.isascii() and port.isdigit()):
        raise ConfigError(f"--ray-address takes auto, local or HOST:PORT, not {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray-address {address} cannot be reached: {error}. Is the cluster up?") from None


def workers(config: ExtractConfig) -> tuple[int, float]:
    """(workers, GPUs of each): the configuration's, or by default as many as the cluster has room for.

    Raises ConfigError as `connect` does, and if options contradict each other.
    """
    alive = nodes(connect(config.ray_address))
    gpus = config.num_gpus_per_worker
    if gpus is None:
        some = any(node.get("GPU", 0) for node in alive)
        gpus = 1 if config.device.startswith("cuda") or (config.device == "auto" and some) else 0
    if ":" in config.device:
        raise ConfigError(f"--device {config.device}: Ray decides which GPU a worker gets. Use cuda, cpu or auto.")
    if (config.device == "cpu" and gpus) or (config.device == "cuda" and not gpus):
        raise ConfigError(f"--device {config.device} and --num-gpus-per-worker {gpus:g} do not go together.")
    if gpus:
        count = sum(int(node.get("GPU", 0) // gpus) for node in alive)
    else:
        count = sum(node.get("CPU", 0) >= 1 for node in alive)
    # If there are no nodes yet, the autoscaler starts them.
    return config.num_workers or max(1, count), gpus


def nodes(ray: Any) -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
