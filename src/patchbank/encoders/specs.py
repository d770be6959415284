"""Specifications of encoders whose weights are files, of the user or of the Hugging Face hub. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Self

from patchbank.encoders import hub
from patchbank.encoders.base import Description, Product, Progress
from patchbank.encoders.outputs import Architecture
from patchbank.encoders.weights import sha256_of_weights
from patchbank.errors import WeightsError
from patchbank.features import Identity, Input, Output
from patchbank.files import sha256_of_chunks

RANDOM = "random numbers"
File = Path | hub.HubFile


@dataclass(frozen=True, kw_only=True)
class FilesSpec:
    """An `EncoderSpec` but for `load`: a library's model before its weights are loaded.

    Attributes:
        name: as ``--model`` takes it.
        made: what the model computes.
        products: the matrix products of one sample; the first one has a row for each patch.
        files: of the weights; none if they are random numbers.
    """

    name: str
    made: Architecture
    input: Input
    outputs: Mapping[str, Output]
    identity: Identity
    products: Sequence[Product]
    files: tuple[File, ...] = ()

    def description(self, *, text: bool) -> Description:
        """The model in a list of models; `text`: whether it has a text tower."""
        made, size, grid = self.made, self.input.size, self.input.grid
        return Description(self.name, size, grid, made.dim or made.width, made.prefix, text)

    def of(self, *files: File) -> Self:
        """The same with the weights of some files, which the identity names."""
        return replace(self, files=files, identity={**self.identity, "weights": _weights_of(files)})

    @property
    def paths(self) -> list[Path | None]:
        """Where the files are on this machine; None where one has to be downloaded."""
        return [each if isinstance(each, Path) else each.path for each in self.files]

    @property
    def weights(self) -> str | None:
        """The path of the file, or of the first of several; or what else the weights are."""
        return RANDOM if self.untrained else None if None in self.paths else str(self.paths[0])

    @property
    def sources(self) -> Sequence[str]:
        """The paths of the files, or their URLs."""
        return [str(each if isinstance(each, Path) else each.path or each.url) for each in self.files]

    @property
    def untrained(self) -> bool:
        """Whether the weights are random numbers."""
        return not self.files

    @property
    def sample_bytes(self) -> int:
        """A pass holds about 18 numbers per token and channel."""
        item = 2 if self.identity["precision"] in ("fp16", "bf16") else 4
        return (self.made.prefix + self.products[0].rows) * 18 * self.made.width * item

    def obtain(self, progress: Progress | None = None) -> Self:
        """Download what this machine lacks. Raises WeightsError, also if a file is not what it was."""
        files = tuple(
            each if (path and path.is_file()) or isinstance(each, Path) else hub.download(each, progress)
            for each, path in zip(self.files, self.paths, strict=True)
        )
        if files and _weights_of(files) != self.identity["weights"]:
            raise WeightsError(f"{files[0]} holds other weights than when the run began.")
        return replace(self, files=files)


def some_of(names: Sequence[str]) -> str:
    """A few names for a message, and how many more there are."""
    more = len(names) - 5
    return (", ".join(names[:5]) or "none") + f" and {more} more" * (more > 0)


def products_of(
    made: Input, width: int, before: int, layers: Iterable[tuple[int, int]], heads: Iterable[int]
) -> list[Product]:
    """The matrix products of one image in a vision transformer.

    Args:
        width: of its tokens.
        before: tokens before those of the patches.
        layers: the widths in and out of each linear layer that all tokens go through.
        heads: of each attention.
    """
    patches = prod(made.patches)
    tokens = before + patches
    return [
        Product(1, patches, 3 * made.patch**2, width),
        *(Product(times, tokens, *shape) for shape, times in Counter(layers).items()),
        *(Product(times, tokens, width // each, tokens, "attention", each) for each, times in Counter(heads).items()),
    ]


def _weights_of(files: Sequence[File]) -> str:
    """The SHA-256 of a file, or of the list of several files' ones; the commit where the hub does not say them."""
    known: list[str] = []
    for each in files:
        if isinstance(each, Path):
            known.append(sha256_of_weights(each))
        elif each.sha256 is not None:
            known.append(each.sha256)
        else:
            return f"{each.repo}@{each.revision}"
    return known[0] if len(known) == 1 else sha256_of_chunks(each.encode() for each in known)
