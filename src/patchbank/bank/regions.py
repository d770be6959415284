"""Banks of regions: the regions of each image with their features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchbank.bank.reader import Bank, open_bank
from patchbank.datasets.boxes import digest_of
from patchbank.errors import BankError, KeyNotInBank
from patchbank.features import GRID
from patchbank.regions import (
    GRID_CUT,
    HUMAN,
    IMAGE,
    OBJECT,
    UNION,
    Region,
    image_of,
    name_of,
    pair_of,
    visible_fraction,
)

if TYPE_CHECKING:
    from torch import Tensor


class Pairs(NamedTuple):
    """Features of one image's P annotated pairs: (P, D) each, in the annotations' order.

    A region that could not be extracted is a row of NaN.
    """

    human: Tensor
    object: Tensor
    union: Tensor

    def __repr__(self) -> str:
        return f"<Pairs: human, object and union features, {tuple(self.union.shape)} each>"


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionFeatures:
    """The K regions of one image that have features, in the order of their extraction.

    Attributes:
        key: the image's.
        names: of the regions, such as ``image``, ``human-0`` and ``box-12``.
        boxes: (K, 4) float32, xyxy in original pixels, 0-based; the whole image is (0, 0, W, H).
        features: output -> (K, D) in the bank's stored dtype, not normalised; (K, N, D) of patch tokens.
        labels: (K,) int64, the class of what is in it, of annotated pairs one of COCO's 80; -1 if there is none.
        scores: (K,) float32, a detector's; NaN if there is none.
        visible: (K,) float32, the visible fraction of each box: the part that the encoder saw, 0 to 1.
        verbs: (K,) int64, a pair's class, of its union; -1 elsewhere.
        hois: (K,) int64, likewise.
        size: (width, height) of the image in pixels.
        failures: name -> reason, of regions that could not be extracted.
    """

    key: str
    names: tuple[str, ...]
    boxes: Tensor
    features: Mapping[str, Tensor]
    labels: Tensor
    scores: Tensor
    visible: Tensor
    verbs: Tensor
    hois: Tensor
    size: tuple[int, int]
    failures: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name} {tuple(each.shape)}" for name, each in self.features.items())
        return f"<RegionFeatures {self.key}: {len(self)} regions, {outputs}, {self.size}>"

    def pairs(self, output: str | None = None) -> Pairs:
        """The features of the annotated pairs' humans, objects and unions. None is the bank's main output.

        Pair k is the image's k-th in the annotation file, also if a later one has no features at all.

        Raises BankError if the regions are not those of annotated pairs, or the output was not read.
        """
        name = output or (GRID if GRID in self.features else next(iter(self.features)))
        if name not in self.features:
            raise BankError(f"The output {name!r} was not read. These were: {', '.join(self.features)}.")
        human, object_, union = (self._in_order(self.features[name], kind) for kind in (HUMAN, OBJECT, UNION))
        return Pairs(human, object_, union)

    def pair_classes(self) -> dict[str, Tensor]:
        """``object``, ``verb`` and ``hoi`` of each pair, (P,) int64; -1 if its union could not be extracted."""
        columns = {"object": self.labels, "verb": self.verbs, "hoi": self.hois}
        return {name: self._in_order(column, UNION) for name, column in columns.items()}

    def _in_order(self, column: Tensor, kind: str) -> Tensor:
        """The rows of one kind by the pair's number; without a feature they are NaN, or -1."""
        found = [pair_of(name) for name in (*self.names, *self.failures)]
        if not (numbers := [pair[1] for pair in found if pair]) and {*self.names} <= {IMAGE}:
            raise BankError(f"No pair of {self.key!r} has features yet: the same `patchbank extract pairs` continues.")
        if not numbers:
            raise BankError(f"The regions of {self.key!r} are not those of annotated pairs: {', '.join(self.names)}.")
        rows = [(row, pair[1]) for row, pair in enumerate(found[: len(self)]) if pair and pair[0] == kind]
        missing = float("nan") if column.is_floating_point() else -1
        ordered = column.new_full((max(numbers) + 1, *column.shape[1:]), missing)
        ordered[[number for _, number in rows]] = column[[row for row, _ in rows]]
        return ordered


class Regions(Mapping[str, RegionFeatures]):
    """A bank of regions by the key of their image, in the dataset's order. Only indexing reads features.

    It can be pickled and sent to data-loader workers, and threads may share it.

    Attributes:
        bank: with a feature for each region.
        outputs: the names of those that are read.
    """

    def __init__(self, bank: Bank, outputs: Sequence[str] = ()) -> None:
        """Raises BankError if the bank holds no regions, or lacks an output."""
        self.bank = bank
        self.outputs = tuple(map(bank.output_name, outputs)) or tuple(bank.manifest.outputs)
        self._keys = {image: tuple(named.values()) for image, named in regions_by_image(bank).items()}
        self._failed: dict[str, dict[str, str]] = defaultdict(dict)
        for key, reason in bank.failures.items():
            self._failed[image_of(key)][name_of(key)] = reason
        self._failed.default_factory = None

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __getitem__(self, key: str) -> RegionFeatures:
        """The regions of one image, its tensors on the CPU and the caller's own.

        Raises KeyNotInBank, a KeyError, if none of the image's regions has features; BankError as `Bank.output`.
        """
        failures = self._failed.get(key, {})
        if key not in self._keys:
            if failures:
                raise KeyNotInBank(f"No region of {key!r} could be extracted: {next(iter(failures.values()))}.")
            raise KeyNotInBank(
                f"The bank {self.bank.path} has no regions of {key!r}. Its images look like {next(iter(self), None)!r}."
            )
        keys = self._keys[key]
        regions = [self.bank.region(each) or Region() for each in keys]
        if (size := self.bank.size(keys[0])) is None:
            raise BankError(f"The size of {key!r} is not known: {self.bank.path} does not hold it.")
        boxes = np.array([each.box or (0, 0, *size) for each in regions], np.float32)
        visible = self._visible(regions, size)

        import torch

        def classes(name: str) -> Tensor:
            values = (getattr(each, name) for each in regions)
            return torch.tensor([-1 if each is None else each for each in values], dtype=torch.int64)

        scores = [float("nan") if each.score is None else each.score for each in regions]
        return RegionFeatures(
            key=key,
            names=tuple(map(name_of, keys)),
            boxes=torch.from_numpy(boxes),
            features={name: self.bank.batch(keys, name) for name in self.outputs},
            labels=classes("label"),
            scores=torch.tensor(scores, dtype=torch.float32),
            visible=torch.tensor(visible, dtype=torch.float32),
            verbs=classes("verb"),
            hois=classes("hoi"),
            size=size,
            failures=failures,
        )

    def _visible(self, regions: Sequence[Region], size: tuple[int, int]) -> list[float]:
        if self.bank.manifest.input.cut != GRID_CUT:
            return [1.0 if each.box is None else visible_fraction(each.box, size) for each in regions]
        boxes = np.array([each.box or (0, 0, *size) for each in regions], np.float64)
        visible: list[float] = self.bank.manifest.transform(size).visible_fraction(boxes).tolist()
        return visible

    __eq__ = object.__eq__  # a Mapping's would read every feature of both
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Regions of {len(self):,} images in {self.bank!r}>"


def open_regions(bank: Bank | str | Path, *, output: str | Sequence[str] = ()) -> Regions:
    """Open a bank of regions, such as ``patchbank extract pairs`` makes, for reading image by image.

    Args:
        bank: an open one, its directory, or its URL in an object store.
        output: the outputs to read; empty for all.

    Returns:
        A mapping: ``open_regions(bank)["HICO_train2015_00000001.jpg"]`` is the `RegionFeatures` of that image. It
        iterates over images in the dataset's order. An image without any feature is not in it.

    Raises:
        BankError: there is no bank, it holds features of whole images, or it does not store an output.
    """
    return Regions(bank if isinstance(bank, Bank) else open_bank(bank), [output] if isinstance(output, str) else output)


def unfinished(bank: Bank) -> str:
    """That a bank of pairs lacks some of its dataset, for people; empty if it does not, or if its failures say so."""
    made = bank.manifest
    regions = ((key, bank.region(key)) for key in bank.in_order())
    if bank.failures or not made.regions or digest_of(regions) == made.regions:
        return ""
    command = "import" if made.imported else f"extract {'regions' if made.input.cut == GRID_CUT else 'pairs'}"
    return f"{bank.path} lacks regions of its dataset: the same `{command}` completes it."


def regions_by_image(bank: Bank) -> dict[str, dict[str, str]]:
    """image -> {name: key} of its regions with features, in the dataset's order.

    Raises BankError if the bank has none.
    """
    if not bank.manifest.input.cut:
        raise BankError(
            f"{bank.path} holds features of whole images, and not of regions: `patchbank extract pairs` makes a bank "
            "of annotated pairs' boxes."
        )
    found: dict[str, dict[str, str]] = {}
    for key in bank.in_order():
        found.setdefault(image_of(key), {})[name_of(key)] = key
    return found
