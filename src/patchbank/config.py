"""What a run is asked to do: `ExtractConfig`.

The defaults stand here and nowhere else: the command line, the Python API and the engines read them from these
classes. Nothing here imports torch, so that ``patchbank --help`` stays fast.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

from patchbank.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16", "tf32"]
Activation = Literal["quickgelu", "gelu"]
StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]
Layout = Literal["ezhoi", "shards"]
ResizeMode = Literal["center-crop", "squash", "pad"]
Decode = Literal["exact", "fast"]
Compile = Literal["auto", "on", "off"]
Engine = Literal["local", "ray"]
Activation = Literal["quickgelu", "gelu"]


MOST_WORKERS = 1024  # decode threads
PAGE_IMAGES = 24  # of a bank, in the gallery of a page about it

# Data sets of files that hold many images each. Their images' positions, and so a bank's shards, have gaps in between.
ARCHIVES = ("tar", "parquet")


@dataclass(frozen=True)
class Partition:
    """Part `index` (0-based) of `count`: a contiguous run of the dataset's samples."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Partition:
        """``"0/4"`` -> ``Partition(0, 4)``; ``"auto"`` -> what the environment says, by `partition_of_environment`.

        Raises ConfigError where it is no such thing.
        """
        if text == "auto":
            return partition_of_environment(os.environ)
        first, slash, second = text.partition("/")
        if not (slash and first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
            raise ConfigError(f"--partition takes I/N, such as 0/4 (the first of four), not {text!r}.")
        return cls(int(first), int(second))

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--partition {self}: parts are numbered from 0 to N-1, and there is one at least: 0/1.")
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"--partition {self}: parts are numbered from 0 to N-1, so I must be less than N "
                f"({self.count} parts are 0/{self.count} to {self.count - 1}/{self.count})."
            )

    def of(self, total: int) -> range:
        """Which of `total` things are this part's."""
        first, last = (part * total // self.count for part in (self.index, self.index + 1))
        return range(first, last)

    def overlaps(self, other: Partition) -> bool:
        """Whether the two have things in common, of a set of any size."""
        first, second = (Fraction(part.index, part.count) for part in (self, other))
        return first < second + Fraction(1, other.count) and second < first + Fraction(1, self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Partition(0, 1)

# (index, count, lowest index) of a job array's tasks, of a job's tasks, and of a torchrun's processes.
_VARIABLES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("RANK", "WORLD_SIZE", None),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
)


def partition_of_environment(environment: Mapping[str, str]) -> Partition:
    """This process's part, as a job array, torchrun or `srun` numbers it.

    An array whose tasks run several processes each is parted in all of them. Raises ConfigError where nothing is told.
    """
    parts: list[Partition] = []
    for index, count, lowest in _VARIABLES:
        if index not in environment or count not in environment:
            continue
        if parts and "RANK" in environment and index == "SLURM_PROCID":
            continue  # torchrun's processes, started by srun
        try:
            first = int(environment.get(lowest, "0")) if lowest else 0
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1")) if lowest else 1
            parts.append(Partition((int(environment[index]) - first) // step, int(environment[count])))
        except (ValueError, ZeroDivisionError):  # a step of 0 is none either
            raise ConfigError(
                f"--partition auto: {index}={environment[index]} of {count}={environment[count]} are no numbers."
            ) from None
    if not parts:
        for index, count, _ in _VARIABLES:
            if (index in environment) != (count in environment):
                there, missing = (index, count) if index in environment else (count, index)
                raise ConfigError(
                    f"--partition auto: {there} is set, and {missing} is not. Say which part it is: --partition 0/4."
                )
        raise ConfigError(
            "--partition auto: neither SLURM_ARRAY_TASK_ID, SLURM_PROCID nor RANK is set. Start it in a SLURM job or "
            "by torchrun, or say which part it is: --partition 0/4."
        )
    outer = parts[0]
    for inner in parts[1:]:
        outer = Partition(outer.index * inner.count + inner.index, outer.count * inner.count)
    return outer


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What one extraction does. Raises ConfigError on values that cannot be.

    Attributes:
        model: one of `patchbank.encoders.openai.registry.MODELS`.
        weights: a checkpoint of your own; None looks the official one up.
        checkpoints: the directory looked in first for official files, and the one a download goes to; None is
            ``checkpoints/pretrained_CLIP`` in the dataset's root, or ``~/.cache/clip`` where it has none.
        precision: what the encoder computes in. ``fp16`` and ``tf32`` need CUDA.
        layout: how the bank lies on disk; None continues a bank in its own, and starts one in ``shards`` for a folder
            and in ``ezhoi`` for the others.
        dtype: what the bank stores; ``int8``, with a scale a token, in shards only.
        shard_size: bytes a shard holds, about.
        resize: how an image of any shape becomes the model's square input.
        decode: ``exact`` resizes as Pillow does; ``fast`` as torch does, in two thirds of the time: one number in
            some hundreds differs, by one, seldom by two.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` (all GPUs of this machine), ``cuda:1``, or
            ``cuda:0,1``.
        engine: ``local`` computes on this machine, in one process a device; ``ray`` on a cluster.
        ray_address: ``auto`` (the cluster that this machine belongs to), ``local`` (this machine alone), ``HOST:PORT``.
        num_workers: of a cluster; None is one a GPU, or one a node where there are none.
        num_gpus_per_worker: of a cluster; None is 1 where there are any, a fraction shares a GPU.
        batch_size: images a forward pass; None chooses by device and model.
        compile: whether `torch.compile` makes the encoder; ``auto`` decides by the device and the number of images.
        workers: decode threads; None is one a core, at most 16.
        limit: only the first this many samples of the dataset.
        partition: only this part of the samples, for runs that share one bank.
        overwrite: start the bank anew instead of completing it.
    """

    model: str = "ViT-B/16"
    weights: Path | None = None
    checkpoints: Path | None = None
    activation: Activation | None = None
    round_weights: bool = False
    precision: Precision = "fp32"
    layout: Layout | None = None
    dtype: StoredDtype = "float32"
    shard_size: int = 256_000_000
    resize: ResizeMode | None = None
    decode: Decode = "exact"
    device: str = "auto"
    engine: Engine = "local"
    ray_address: str = "auto"
    num_workers: int | None = None
    num_gpus_per_worker: float | None = None
    batch_size: int | None = None
    compile: Compile = "auto"
    workers: int | None = None
    limit: int | None = None
    partition: Partition = WHOLE
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", get_args(Precision)),
            ("layout", (None, *get_args(Layout))),
            ("dtype", get_args(StoredDtype)),
            ("resize", (None, *get_args(ResizeMode))),
            ("decode", get_args(Decode)),
            ("compile", get_args(Compile)),
            ("engine", get_args(Engine)),
        ):
            value = getattr(self, name)
            if value not in choices:
                choices = tuple(choice for choice in choices if choice)
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
        for name in ("batch_size", "workers", "num_workers", "limit", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', '-')} must be at least 1, not {value}.")
        if self.workers is not None and self.workers > MOST_WORKERS:
            raise ConfigError(f"workers must be at most {MOST_WORKERS}, not {self.workers}. One a core is enough.")
        if self.num_gpus_per_worker is not None and not 0 <= self.num_gpus_per_worker < math.inf:
            raise ConfigError(f"num-gpus-per-worker must be at least 0, not {self.num_gpus_per_worker}.")
        for name in ("weights", "checkpoints"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path).expanduser())
        if self.overwrite and self.partition != WHOLE:
            raise ConfigError(
                "overwrite together with a partition would delete what the other partitions wrote. "
                "Remove the bank first, then start the partitions without overwrite."
            )


def check_dtype(layout: str, dtype: str) -> None:
    """Raise ConfigError where a layout cannot hold a stored dtype."""
    if layout == "ezhoi" and dtype == "int8":
        raise ConfigError("--dtype int8 is for --layout shards: a pickle holds one tensor and no scales.")
