"""The configuration of a run: `ExtractConfig`. Each option is one field, with its default, its help and its limits.

The command line, its help, docs/reference/commands.md and the errors are made from these fields: nothing is stated
twice. Nothing here imports torch: ``patchbank --help`` stays fast.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path, PurePath
from typing import Any, Literal, cast, get_args, get_origin

from patchbank.errors import ConfigError
from patchbank.files import bytes_text, parse_bytes
from patchbank.regions import parse_cut

Precision = Literal["fp32", "bf16", "fp16", "tf32"]
StoredDtype = Literal["float32", "float16", "bfloat16", "int8"]
Layout = Literal["ezhoi", "shards"]
ExportFormat = Literal["hdf5", "parquet", "webdataset", "npy"]
ResizeMode = Literal["center-crop", "squash", "pad"]
Rounding = Literal["nearest", "down"]
Decode = Literal["exact", "fast"]
Compile = Literal["auto", "on", "off"]
Engine = Literal["local", "ray"]
Activation = Literal["quickgelu", "gelu"]

PAGE_IMAGES = 24  # in the gallery of a bank's page
DRAWN_PAIRS = 8  # of a picture's annotated pairs, unless all are asked for

# Datasets of files with many images each. Their images' positions have gaps, and so the numbers of a bank's shards.
ARCHIVES = ("tar", "parquet")
BOXES = "boxes"  # the dataset of a detector's boxes, which no list of images names


# Other spellings of a value: each option takes those of its own choices.
_SPELLINGS = (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"))


@dataclass(frozen=True)
class Option:
    """A field's description as an option.

    Attributes:
        help: what it does, in one sentence. Names every choice if the field's type is a `Literal`.
        panel: its heading in the help; None is the common one.
        metavar: the word for its value; None is N for a number, else the field's name.
        short: its short name, with the dash.
        default_text: the default in words, or a function of the default that returns them; None is the value itself.
        parse: text or a path -> the value. Raises ValueError.
        minimum, maximum: the least and the greatest value.
        values: usual ones, for the shell's completion; None is the choices.
    """

    help: str
    panel: str | None = None
    metavar: str | None = None
    short: str | None = None
    default_text: str | Callable[[Any], str] | None = None
    parse: Callable[[Any], Any] | None = None
    minimum: float | None = None
    maximum: float | None = None
    values: tuple[str, ...] | None = None

    @classmethod
    def of(cls, each: dataclasses.Field[Any]) -> "Option":
        """The description in a field's metadata."""
        return cast(Option, each.metadata["option"])


def option(default: Any, help: str, panel: str | None = None, **details: Any) -> Any:
    """A dataclass field that is an option; `details`: `Option`'s other attributes. A default of ... means required."""
    return field(default=default, metadata={"option": Option(help, panel, **details)})


def choices(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal`, or of those in a union; none for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(value for part in get_args(kind) for value in choices(part))


def checked(each: dataclasses.Field[Any], value: Any) -> Any:
    """The field's value: parsed if it is text, and checked.

    Raises ConfigError if it is not one of the choices, too small, too large, or cannot be parsed.
    """
    stated, allowed, name = Option.of(each), choices(each.type), flag(each.name)
    if value is None and type(None) in get_args(each.type):
        return None
    if get_args(each.type)[1:] == (...,):
        return tuple(dict.fromkeys([value] if isinstance(value, str) else value))
    if stated.parse is not None and isinstance(value, str | PurePath):
        try:
            value = stated.parse(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}.") from None
    if allowed and value not in allowed:
        same = {other for spellings in _SPELLINGS if value in spellings for other in spellings}
        value = next((each for each in allowed if each in same), value)
    if allowed and value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
    if stated.minimum is not None and not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, not {value!r}.")
    if stated.minimum is not None and not stated.minimum <= value < math.inf:
        raise ConfigError(f"{name} must be at least {stated.minimum}, not {value}.")
    if stated.maximum is not None and value > stated.maximum:
        raise ConfigError(f"{name} must be at most {stated.maximum}, not {value}.")
    return value


def as_path(text: str | PurePath) -> Path:
    """A local path; ``~`` is the home directory. Raises ValueError if it is empty."""
    if not str(text):
        raise ValueError("the path is empty")
    return Path(text).expanduser()


def as_size(text: str | PurePath) -> tuple[int, int]:
    """``448`` -> (448, 448); ``448x672`` -> (448, 672), height first. Raises ValueError."""
    if (match := re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", str(text), re.ASCII)) is None:
        raise ValueError(f"{text!r} is no size: give pixels, such as 448, or height x width, such as 448x672")
    return int(match[1]), int(match[2] or match[1])


def flag(name: str) -> str:
    """A field's name on the command line: ``batch_size`` -> ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Partition:
    """Part `index` (0-based) of `count`: a contiguous run of the dataset's samples."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """``"0/4"`` -> ``Partition(0, 4)``; ``"auto"`` -> `partition_of_environment`. Raises ConfigError otherwise."""
        if text == "auto":
            return partition_of_environment(os.environ)
        if (match := re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)) is None:
            raise ConfigError(f"--partition takes I/N, such as 0/4 (the first of four), not {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--partition {self}: parts are numbered from 0 to N-1, and N is at least 1.")
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"--partition {self}: parts are numbered from 0 to N-1, so I must be less than N "
                f"({self.count} parts are 0/{self.count} to {self.count - 1}/{self.count})."
            )

    def of(self, total: int) -> range:
        """The indices of this part, of `total` things."""
        first, last = (part * total // self.count for part in (self.index, self.index + 1))
        return range(first, last)

    def overlaps(self, other: "Partition") -> bool:
        """Whether two parts share things in a set of any size."""
        first, second = (Fraction(part.index, part.count) for part in (self, other))
        return first < second + Fraction(1, other.count) and second < first + Fraction(1, self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Partition(0, 1)

# (index, count, other variables) of a job array's tasks, of torchrun's processes, and of a job's tasks.
_FIRST, _STEP = "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"
_VARIABLES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", _FIRST, _STEP),
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def partition_of_environment(environment: Mapping[str, str]) -> Partition:
    """This process's part, as a job array, torchrun or `srun` numbers it.

    If a job array's tasks run several processes each, every process gets a part. Raises ConfigError if the environment
    does not number this process.
    """
    parts: list[Partition] = []
    for index, count, *others in _VARIABLES:
        if index not in environment or count not in environment:
            continue
        if parts and "RANK" in environment and index == "SLURM_PROCID":
            continue  # torchrun's processes, started by srun
        texts = {name: environment[name] for name in (index, count, *others) if name in environment}
        try:
            numbers = {name: int(text) for name, text in texts.items()}
        except ValueError:
            raise ConfigError(
                f"--partition auto: {_listed(texts)} must be integers, got {_listed(texts.values())}."
            ) from None
        if (step := numbers.get(_STEP, 1)) == 0:
            raise ConfigError(f"--partition auto: {_STEP} must not be 0.")
        parts.append(Partition((numbers[index] - numbers.get(_FIRST, 0)) // step, numbers[count]))
    if not parts:
        for index, count, *_ in _VARIABLES:
            if (index in environment) != (count in environment):
                found, missing = (index, count) if index in environment else (count, index)
                raise ConfigError(
                    f"--partition auto: {found} is set, and {missing} is not. Give the part: --partition 0/4."
                )
        raise ConfigError(
            "--partition auto: neither SLURM_ARRAY_TASK_ID, SLURM_PROCID nor RANK is set. Start it in a SLURM job or "
            "with torchrun, or give the part: --partition 0/4."
        )
    outer = parts[0]
    for inner in parts[1:]:
        outer = Partition(outer.index * inner.count + inner.index, outer.count * inner.count)
    return outer


def _listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}"


_MODEL, _BANK, _MACHINE, _CLUSTER = "Model", "Bank", "Machine", "Several machines"


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """The configuration of one extraction. Raises ConfigError on invalid values."""

    model: str = option("ViT-B/16", "Model that encodes the images.", _MODEL)
    weights: Path | None = option(
        None, "Checkpoint (.pt, .safetensors), if not OpenAI's.", _MODEL, metavar="FILE", parse=as_path
    )
    checkpoints: Path | None = option(
        None,
        "Directory of official checkpoints, for searching and downloading.",
        _MODEL,
        metavar="DIR",
        default_text="ROOT/checkpoints/pretrained_CLIP, else ~/.cache/clip",
        parse=as_path,
    )
    activation: Activation | None = option(
        None,
        "Activation of a checkpoint that does not say it: quickgelu (OpenAI) or gelu (LAION, DataComp).",
        _MODEL,
        metavar="NAME",
    )
    round_weights: bool = option(False, "Round float32 weights to float16, as OpenAI's clip.load does.", _MODEL)
    precision: Precision = option(
        "fp32", "Precision of the encoder: fp32, bf16, fp16 or tf32; fp16 and tf32 need CUDA.", _MODEL
    )
    output: tuple[str, ...] = option(
        (),
        "Output to store: patch_tokens, cls, registers, pooled, block:6, block:6:raw (without the last norm), or a "
        "dense variant of CLIP: maskclip, sclip, clearclip, naclip; repeatable.",
        _MODEL,
        metavar="NAME",
        default_text="patch_tokens, and cls in shards",
        values=("patch_tokens", "cls", "registers", "pooled", "block:", "maskclip", "sclip", "clearclip", "naclip"),
    )
    input_size: tuple[int, int] | None = option(
        None,
        "Size of the input in pixels, N or HEIGHTxWIDTH, if not the model's own; multiples of the patch.",
        _MODEL,
        metavar="N",
        default_text="the model's own",
        parse=as_size,
    )
    pool_grid: int = option(1, "Store the mean of each N x N patches.", _BANK, default_text="", minimum=1, maximum=1024)
    layout: Layout | None = option(
        None,
        "Files of the bank: ezhoi (one pickle per image, as EZ-HOI reads them) or shards (safetensors).",
        _BANK,
        default_text="ezhoi for hicodet and vcoco, else shards",
    )
    dtype: StoredDtype = option("float32", "Stored numbers: float32, float16, bfloat16 or int8 (shards only).", _BANK)
    shard_size: int = option(
        256_000_000,
        "Approximate size of a shard.",
        _BANK,
        metavar="BYTES",
        default_text=lambda size: bytes_text(size).replace(" ", ""),
        parse=parse_bytes,
        minimum=1,
    )
    resize: ResizeMode | None = option(
        None,
        "How images become the input: center-crop, squash (aspect ratio ignored) or pad (letterboxed).",
        _BANK,
        default_text="the model's own: center-crop for CLIP",
    )
    crop: str | None = option(
        None,
        "How boxes are cut out of images: pad (on a black square), squash, or context=1.5 (a square around the box, so "
        "many times as long).",
        _BANK,
        metavar="HOW",
        default_text="pad, as ADA-CM",
        parse=parse_cut,
        values=("pad", "squash", "context=1.5"),
    )
    decode: Decode = option(
        "exact",
        "exact: resize with Pillow, as CLIP does; fast: resize with torch; some pixel values differ by 1.",
        _BANK,
    )
    device: str = option(
        "auto", "auto (CUDA if there is one), cpu, cuda (all GPUs, one process each), cuda:1 or cuda:0,1.", _MACHINE
    )
    batch_size: int | None = option(
        None, "Images per forward pass.", _MACHINE, default_text="8 on the CPU, up to 256 on a GPU", minimum=1
    )
    compile: Compile = option(
        "auto", "Compile the encoder with torch.compile: on, off or auto (long runs on CUDA).", _MACHINE
    )
    workers: int | None = option(
        None, "Decode threads.", _MACHINE, default_text="one per core, at most 16", minimum=1, maximum=1024
    )
    engine: Engine = option("local", "local (this machine) or ray (a Ray cluster, docs/guides/scaling.md).", _CLUSTER)
    ray_address: str = option(
        "auto", "auto (this machine's cluster), local (this machine alone) or HOST:PORT.", _CLUSTER, metavar="ADDRESS"
    )
    num_workers: int | None = option(
        None, "Workers of the cluster.", _CLUSTER, default_text="one per GPU, or one per node without GPUs", minimum=1
    )
    num_gpus_per_worker: float | None = option(
        None,
        "GPUs of each worker; 0.5 shares one, 0 computes on the CPU.",
        _CLUSTER,
        default_text="1, or 0 without GPUs",
        minimum=0,
    )
    partition: Partition = option(
        WHOLE,
        "Only part I of N (0-based), for runs that share a bank; auto reads the variables of SLURM or torchrun.",
        _CLUSTER,
        metavar="I/N",
        default_text="",
        parse=Partition.parse,
    )
    limit: int | None = option(None, "Only the first N images.", minimum=1)
    overwrite: bool = option(False, "Start the bank from scratch; it replaces the old one when it is complete.")

    def __post_init__(self) -> None:
        if isinstance(self.input_size, int):  # as people write it in Python
            object.__setattr__(self, "input_size", (self.input_size, self.input_size))  # type: ignore[unreachable]
        for each in fields(self):
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))
        if self.input_size is not None and (len(self.input_size) != 2 or min(self.input_size) < 1):
            raise ConfigError(f"--input-size must be two positive numbers, height and width, not {self.input_size}.")
        if self.overwrite and self.partition != WHOLE:
            raise ConfigError(
                "--overwrite together with a --partition would delete what the other partitions wrote. "
                "Remove the bank first, then start the partitions without --overwrite."
            )

    @property
    def variant(self) -> str:
        """The end of a bank's default name, where EZ-HOI would not read its features rightly: ``_squash_float16``."""
        size = self.input_size and "x".join(map(str, dict.fromkeys(self.input_size)))
        parts = size, self.pool_grid > 1 and f"pool{self.pool_grid}", self.resize, self.dtype
        return "".join(f"_{each}" for each in parts if each and each not in ("center-crop", "float32"))

    def arguments(self) -> tuple[str, ...]:
        """The options of ``patchbank extract`` that give this configuration, without the model."""
        words: list[str] = []
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if value != each.default:
                words += _words(flag(each.name), value)
        return tuple(words)


def _words(name: str, value: object) -> list[str]:
    """An option with its value, as a command takes it."""
    match value:
        case True:
            return [name]
        case (int() as height, int() as width):
            return [name, f"{height}x{width}"]
        case tuple():
            return [word for each in value for word in (name, str(each))]
        case _:
            return [name, str(value)]


ExtractConfig.__doc__ = f"{ExtractConfig.__doc__}\n\n    Attributes:\n" + "\n".join(
    f"        {each.name}: {Option.of(each).help}" for each in fields(ExtractConfig)
)


def check_dtype(layout: str, dtype: str) -> None:
    """Raise ConfigError if a layout cannot hold a stored dtype."""
    if layout == "ezhoi" and dtype == "int8":
        raise ConfigError("--dtype int8 is for --layout shards: a pickle holds one tensor and no scales.")
