"""The options that the extract commands share, stated once. Defaults come from `ExtractConfig`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from patchbank.config import (
    WHOLE,
    Compile,
    Decode,
    Engine,
    ExtractConfig,
    Layout,
    Partition,
    Precision,
    ResizeMode,
    StoredDtype,
)
from patchbank.encoders.openai.registry import MODELS, get_model
from patchbank.errors import ConfigError
from patchbank.files import bytes_text, parse_bytes
from patchbank.locations import locate

DEFAULTS = ExtractConfig()
SHARD_SIZE = bytes_text(DEFAULTS.shard_size).replace(" ", "")

_WHAT, _HOW, _WHERE, _RUN = "What", "How", "On several machines", "This run"


def flag(name: str, text: str, panel: str | None = None) -> Any:
    """An option that takes no value."""
    return typer.Option(name, metavar="", help=text, rich_help_panel=panel)


Root = Annotated[
    Path,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Where hicodet/, vcoco/ and checkpoints/ lie, as in an EZ-HOI checkout.",
        rich_help_panel=_WHAT,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=f"{', '.join(MODELS)}. May be given several times, for hicodet and vcoco.",
        rich_help_panel=_WHAT,
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        parser=locate,
        metavar="DIR",
        help="Another image directory, or a URL (s3://...), for one --split.",
        rich_help_panel=_WHAT,
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(
        "--annotations",
        metavar="FILE",
        help="Another annotation file, for one --split; told by its structure.",
        rich_help_panel=_WHAT,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="A checkpoint of your own, for exactly one --model.",
        rich_help_panel=_WHAT,
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        metavar="DIR",
        help="Where official checkpoints are looked for first, and downloaded to. By default "
        "ROOT/checkpoints/pretrained_CLIP; without --root that of the current directory, or else ~/.cache/clip.",
        rich_help_panel=_WHAT,
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="What the encoder computes in; fp16 and tf32 need CUDA.", rich_help_panel=_HOW),
]
Dtype = Annotated[
    StoredDtype, typer.Option("--dtype", help="What the bank stores; int8 in shards only.", rich_help_panel=_HOW)
]
LayoutOption = Annotated[
    Layout | None,
    typer.Option(
        "--layout",
        help="How the bank lies on disk: ezhoi, a pickle an image, as EZ-HOI reads it; shards, safetensors files.",
        show_default="ezhoi for hicodet and vcoco, else shards",
        rich_help_panel=_HOW,
    ),
]
ShardSize = Annotated[
    str,
    typer.Option("--shard-size", metavar="BYTES", help="What a shard holds, about.", rich_help_panel=_HOW),
]
Resize = Annotated[
    ResizeMode | None,
    typer.Option(
        "--resize",
        help="How an image becomes square: center-crop as CLIP does; squash: the whole image, aspect ignored; "
        "pad: the whole image, letterboxed.",
        rich_help_panel=_HOW,
    ),
]
DecodeOption = Annotated[
    Decode,
    typer.Option(
        "--decode",
        help="exact: Pillow's pixels, as CLIP's own; fast: resized by torch, which differ by one here and there.",
        rich_help_panel=_HOW,
    ),
]
CompileOption = Annotated[
    Compile,
    typer.Option(
        "--compile",
        help="Whether torch.compile makes the encoder; auto: on CUDA, for long runs.",
        rich_help_panel=_HOW,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto (CUDA where there is one), cpu, cuda (all GPUs, a process each), cuda:1, cuda:0,1.",
        rich_help_panel=_HOW,
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option("--engine", help="local: this machine; ray: a Ray cluster (docs/scaling.md).", rich_help_panel=_WHERE),
]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="auto: the cluster this machine belongs to; local: this machine alone; HOST:PORT.",
        rich_help_panel=_WHERE,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "--num-workers",
        metavar="N",
        help="Workers of the cluster.",
        show_default="one a GPU, or one a node",
        min=1,
        rich_help_panel=_WHERE,
    ),
]
NumGpus = Annotated[
    float | None,
    typer.Option(
        "--num-gpus-per-worker",
        metavar="N",
        help="GPUs of each; 0.5 shares one, 0 computes on the CPU.",
        show_default="1 where there are any",
        min=0,
        rich_help_panel=_WHERE,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Images a forward pass.",
        show_default="8 on the CPU, up to 256 on a GPU",
        min=1,
        rich_help_panel=_HOW,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", help="Decode threads.", show_default="one a core", min=1, rich_help_panel=_HOW
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Only the first N images.", min=1, rich_help_panel=_RUN),
]
PartitionOption = Annotated[
    str | None,
    typer.Option(
        "--partition",
        metavar="I/N",
        help="Only part I of N (0-based), for runs that share a bank; auto: as SLURM's or torchrun's variables say.",
        rich_help_panel=_WHERE,
    ),
]
Overwrite = Annotated[bool, flag("--overwrite", "Start the bank anew: what it holds is deleted.", _RUN)]
DryRun = Annotated[bool, flag("--dry-run", "Say what would be done, and stop.", _RUN)]
Report = Annotated[
    bool, flag("--report", "Write a page about each bank beside it at the end, as `patchbank report` does.", _RUN)
]
Json = Annotated[bool, flag("--json", "The result as JSON on standard output.", _RUN)]


@dataclass(frozen=True)
class RunOptions:
    """What the shared options say.

    Attributes:
        models: as given; empty where none was.
        config: everything but the model.
    """

    models: list[str]
    config: ExtractConfig
    dry_run: bool
    json: bool
    report: bool = False

    def models_or(self, default: list[str]) -> list[str]:
        """The models given, or `default`. Raises ConfigError on an unknown one, or several with --weights."""
        names = list(dict.fromkeys(self.models or default))
        for name in names:
            get_model(name)
        if self.config.weights is not None and len(names) != 1:
            raise ConfigError("--weights is the checkpoint of one model: say which with one --model.")
        return names


def _run_options(
    model: Models = None,
    weights: Weights = None,
    checkpoints: Checkpoints = None,
    precision: PrecisionOption = DEFAULTS.precision,
    layout: LayoutOption = DEFAULTS.layout,
    dtype: Dtype = DEFAULTS.dtype,
    shard_size: ShardSize = SHARD_SIZE,
    resize: Resize = DEFAULTS.resize,
    decode: DecodeOption = DEFAULTS.decode,
    device: Device = DEFAULTS.device,
    batch_size: BatchSize = DEFAULTS.batch_size,
    compile: CompileOption = DEFAULTS.compile,
    workers: Workers = DEFAULTS.workers,
    engine: EngineOption = DEFAULTS.engine,
    ray_address: RayAddress = DEFAULTS.ray_address,
    num_workers: NumWorkers = DEFAULTS.num_workers,
    num_gpus_per_worker: NumGpus = DEFAULTS.num_gpus_per_worker,
    partition: PartitionOption = None,
    limit: Limit = DEFAULTS.limit,
    overwrite: Overwrite = DEFAULTS.overwrite,
    dry_run: DryRun = False,
    report: Report = False,
    json: Json = False,
) -> RunOptions:
    config = ExtractConfig(
        weights=weights,
        checkpoints=checkpoints,
        precision=precision,
        layout=layout,
        dtype=dtype,
        shard_size=parse_shard_size(shard_size),
        resize=resize,
        decode=decode,
        device=device,
        batch_size=batch_size,
        compile=compile,
        workers=workers,
        engine=engine,
        ray_address=ray_address,
        num_workers=num_workers,
        num_gpus_per_worker=num_gpus_per_worker,
        limit=limit,
        partition=WHOLE if partition is None else Partition.parse(partition),
        overwrite=overwrite,
    )
    return RunOptions(model or [], config, dry_run, json, report)


def parse_shard_size(text: str) -> int:
    """``256MB`` to bytes. Raises ConfigError where it is no such thing."""
    try:
        size = parse_bytes(text)
        if size < 1:
            raise ValueError(f"{text!r} holds nothing")
        return size
    except ValueError as error:
        raise ConfigError(f"--shard-size: {error}.") from None


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the shared options beside its own; it gets them as one argument, ``run``."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "run"]
    shared = list(inspect.signature(_run_options).parameters.values())

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        run = _run_options(**{each.name: values.pop(each.name) for each in shared})
        command(**values, run=run)

    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own + shared]
    )
    return wrapper
