"""What a bank is: its outputs, the identity and input that decide its numbers, and how it was begun."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from math import prod
from typing import Annotated

import msgspec

from patchbank import __version__
from patchbank.config import Layout, StoredDtype
from patchbank.errors import ConfigError
from patchbank.features import GRID, UNKNOWN, Input, Output, Reduction, differences, is_grid
from patchbank.regions import GRID_CUT
from patchbank.transform import ImageTransform

_LARGEST = 1 << 31  # no size in a manifest is near it
_MOST_NUMBERS = 1 << 26  # of one output of a sample: memory for one is made before its file is read

Size = Annotated[int, msgspec.Meta(ge=1, lt=_LARGEST)]


def library_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """The versions that can move a feature's last bits; `more`: packages that the encoder is from."""
    return {
        "patchbank": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "pillow", *more)},
    }


def stored_outputs(outputs: Mapping[str, Output], layout: Layout, dtype: StoredDtype) -> dict[str, Output]:
    """What a layout stores of an encoder's or a bank's outputs. A pickle holds the patch tokens alone.

    Raises ConfigError for pickles without patch tokens.
    """
    if layout == "ezhoi" and GRID not in outputs:
        raise ConfigError(f"Pickles store {GRID} alone, and not {', '.join(outputs)}: use --layout shards.")
    return {name: each.stored_as(dtype) for name, each in outputs.items() if layout == "shards" or name == GRID}


def _shown(value: object) -> str:
    """A field's value for people: no Python, and of a checksum the first digits."""
    if isinstance(value, tuple) and value and all(type(each) is int for each in value):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    text = "none" if value in (None, "") else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bank is.

    Attributes:
        layout: how the features lie on disk, ``ezhoi`` or ``shards``.
        dataset, split: what was extracted; `split` is None for a dataset without splits. `dataset` is ``unknown`` for
            imported pickles unless an option named it.
        outputs: name -> what is stored of each sample, in the order that was asked for.
        identity: named fields that decide the numbers: family, model, weights, activation, precision, ...
        input: what the encoder took; with an image's size it gives its `ImageTransform`.
        rounded: the dtypes that rounded a converted bank's numbers before the stored one.
        reduction: what reduced a converted bank's features; None if nothing did.
        part_size: samples in one full part of the index.
        batch_size: samples of a forward pass; with `device`, `compiled` and `versions` it can decide the last bits.
        device: the kind of device, ``cpu`` or ``cuda``.
        compiled: whether the encoder was compiled with `torch.compile`.
        versions: of the libraries that the bank was begun with.
        imported: how an imported bank was made; empty for any other.
        regions: the SHA-256 of all regions' names and boxes; empty for a bank of images.
    """

    layout: Layout
    dataset: str
    split: str | None
    outputs: dict[str, Output]
    identity: dict[str, str]
    input: Input
    rounded: tuple[StoredDtype, ...] = ()
    reduction: Reduction | None = None
    part_size: Size
    batch_size: Size
    device: str
    compiled: bool = False
    versions: dict[str, str] = field(default_factory=library_versions)
    imported: str = ""
    regions: str = ""

    @property
    def model(self) -> str:
        """The model's name, as ``--model`` takes it."""
        return self.identity.get("model", UNKNOWN)

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw): rows and columns of tokens."""
        return self.input.grid

    @property
    def main(self) -> str:
        """The name of the output that ``bank[key]`` gives: ``patch_tokens`` if it is stored, else the first."""
        return GRID if GRID in self.outputs else next(iter(self.outputs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The main output's shape, of one sample: (N, D) for patch tokens."""
        return self.outputs[self.main].shape

    @property
    def dtype(self) -> StoredDtype:
        """The stored dtype that was asked for; of int8, vectors are stored as float16."""
        dtypes = [each.dtype for each in self.outputs.values()]
        return "int8" if "int8" in dtypes else dtypes[0]

    @property
    def grids(self) -> list[str]:
        """The names of the outputs that have a row for each token of the grid."""
        return [name for name, output in self.outputs.items() if is_grid(name, output)]

    @property
    def title(self) -> str:
        """``hicodet train``, ``folder``: for people."""
        return f"{self.dataset} {self.split}" if self.split else self.dataset

    @property
    def noun(self) -> str:
        """What it has a feature of, for people: ``image``, or ``region``."""
        return "region" if self.input.cut else "image"

    @property
    def atom(self) -> int:
        """Positions that one process writes together: a shard's, or one for pickles."""
        return self.part_size if self.layout == "shards" else 1

    def transform(self, size: tuple[int, int]) -> ImageTransform:
        """How an image of (width, height) pixels became the encoder's input."""
        return self.input.transform(size)

    def stored_as(self, layout: Layout, dtype: StoredDtype) -> Manifest:
        """The manifest after converting the features to another layout or dtype.

        float32 holds the numbers of all other dtypes exactly, and rounding to the same dtype twice changes nothing: so
        `rounded` keeps the dtypes that changed the numbers, without the last.
        """
        made = replace(self, layout=layout, outputs=stored_outputs(self.outputs, layout, dtype))
        chain = [each for each in (*self.rounded, self.dtype) if each != "float32"]
        if chain[-1:] == [made.dtype]:
            chain.pop()
        return replace(made, rounded=tuple(chain))

    def with_outputs(self, names: Sequence[str]) -> Manifest:
        """The manifest with only these outputs, in this order."""
        reduced = tuple(name for name in names if self.reduction and name in self.reduction.outputs)
        reduction = replace(self.reduction, outputs=reduced) if self.reduction and reduced else None
        return replace(self, outputs={name: self.outputs[name] for name in names}, reduction=reduction)

    def begun_as(self, other: Manifest) -> bool:
        """Whether the same command, again, would begin the other bank. An encoder may have failed to compile."""
        return replace(self, compiled=other.compiled) == other

    def differences(self, other: Manifest) -> list[tuple[str, str, str]]:
        """(field, own value, other's value), for people, of each difference between two banks' features or layouts."""
        names = ("layout", "dataset", "split", "regions", "rounded", "reduction")
        mine, theirs = (
            {name: getattr(each, name) for name in names} | {"outputs": tuple(each.outputs)} for each in (self, other)
        )
        found = differences(mine, theirs)
        found += differences(self.identity, other.identity)
        found += differences(asdict(self.input), asdict(other.input), prefix="input ")
        for name, one in self.outputs.items():
            if (two := other.outputs.get(name)) is not None:
                found += differences(asdict(one), asdict(two), prefix="" if name == self.main else f"{name} ")
        return [(name, _shown(one), _shown(two)) for name, one, two in found]

    def check(self) -> None:
        """Raise ValueError where fields contradict each other."""
        if not self.outputs or (self.layout == "ezhoi" and list(self.outputs) != [GRID]):
            raise ValueError(f"the layout {self.layout} does not store the outputs {', '.join(self.outputs) or 'none'}")
        for name, output in self.outputs.items():
            if not 1 <= len(output.shape) <= 2 or not all(1 <= size < _LARGEST for size in output.shape):
                raise ValueError(f"output {name} has the shape {output.shape}")
            if prod(output.shape) > _MOST_NUMBERS:
                raise ValueError(f"output {name} has more than {_MOST_NUMBERS:,} numbers")
            if output.dtype == "int8" and len(output.shape) == 1:
                raise ValueError(f"output {name} is a vector of int8, which only tokens are stored in")
        if (made := self.reduction) is not None:
            widths = {self.outputs[name].shape[-1] if name in self.outputs else 0 for name in made.outputs}
            if (
                widths != {made.components}
                or not re.fullmatch("[0-9a-f]{64}", made.sha256)
                or self.layout != "shards"
                or not 0 <= made.explained <= 1 + 1e-9
            ):
                raise ValueError(f"its outputs do not fit its reduction to {made.components} components")
        sizes = (*self.input.size, *(self.input.cover or ()), self.input.patch, self.input.pool)
        small = any(whole < part for whole, part in zip(self.input.cover or (), self.input.size, strict=False))
        if min(sizes) < 1 or max(sizes) >= _LARGEST or small:
            raise ValueError(f"an input of {self.input.size} has no grid")
        for name in {*([GRID] if self.input.cut != GRID_CUT else []), *self.grids} & self.outputs.keys():
            if len(shape := self.outputs[name].shape) != 2 or shape[0] != prod(self.grid):
                raise ValueError(f"an input of {self.input.size} has no grid of {shape[0]} tokens, as {name} has")
