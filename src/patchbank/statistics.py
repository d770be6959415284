"""Statistics of annotated pairs' features by class: counts, means and covariances, in one pass over a bank."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchbank.bank.manifest import Manifest
from patchbank.bank.reader import Bank, open_bank
from patchbank.bank.reduction import one_thread
from patchbank.bank.regions import Pairs, Regions
from patchbank.datasets.classes import ACTIONS, OBJECTS, VERBS
from patchbank.datasets.hoi import HICO_HOIS
from patchbank.errors import BankError, ConfigError
from patchbank.files import bytes_text, whole_file
from patchbank.regions import IMAGE, OBJECT, UNION

KINDS = ("verb", "object", "hoi")
MARK = "patchbank stats"  # in every file: only marked files are replaced
_TOGETHER = 16384  # pairs whose features are added at once
_CLASSES = 1 << 12  # of a kind, at most
_MOST = 4 << 30  # bytes of covariances
FORMATS = (".safetensors", ".pt")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassStatistics:
    """Statistics of features by the C classes of one kind. They are computed in float64.

    Attributes:
        of: the region whose features they are of: human, object or union.
        names: of the classes; empty where unknown.
        count: (C,) int64, the annotated pairs of each class whose region has features.
        mean: (C, D) float32; zeros for a class without any.
        covariance: (C, D, D) float32, divided by count - 1 as `numpy.cov` does; zeros for a class with fewer than two
            pairs. None unless requested.
    """

    of: str
    names: tuple[str, ...]
    count: Tensor
    mean: Tensor
    covariance: Tensor | None = None


def region_statistics(
    bank: Bank | str | Path,
    by: str | Iterable[str] = (),
    *,
    of: str | None = None,
    covariance: bool = False,
    normalise: bool = False,
    output: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ClassStatistics]:
    """Count, mean and covariance of the features of each class of a bank of annotated pairs.

    Each annotated pair counts once for its verb, its object and its hoi class, also where pairs share a box. Pairs
    whose region could not be extracted are left out. The result does not depend on the number of threads.

    Args:
        bank: of annotated pairs (``patchbank extract pairs``).
        by: some of ``verb``, ``object``, ``hoi``; empty for all that the annotations have.
        of: whose features: ``human``, ``object`` or ``union``. None is the object's for ``object``, else the union's.
        covariance: whether to compute covariances.
        normalise: divide each feature by its norm first.
        output: which of the bank's outputs, a vector; None is the first.
        progress: called with the numbers of images read, and of all.

    Raises:
        BankError: there is no bank, or not one of annotated pairs; or it stores no such output; or features cannot be
            read; or classes have numbers of 4,096 or more.
        ConfigError: a kind or a region does not exist, or the covariances do not fit into memory.
    """
    bank = bank if isinstance(bank, Bank) else open_bank(bank)
    by = [by] if isinstance(by, str) else list(by)
    if wrong := [each for each in by if each not in KINDS]:
        raise ConfigError(f"There are no classes {wrong[0]!r}. Choose from: {', '.join(KINDS)}.")
    if of not in (None, *Pairs._fields):
        raise ConfigError(f"A pair has no region {of!r}. Choose from: {', '.join(Pairs._fields)}.")
    vectors = [name for name, each in bank.manifest.outputs.items() if len(each.shape) == 1]
    if (bank.output_name(output) if output else vectors[0] if vectors else None) not in vectors:
        raise BankError(f"Statistics are of vectors, and {bank.path} stores {', '.join(bank.manifest.outputs)}.")
    regions = Regions(bank, [output or vectors[0]])
    classes = _classes(bank)
    if not classes["verb"]:
        raise BankError(f"{bank.path} holds no annotated pairs: `patchbank extract pairs` makes a bank of them.")
    if "hoi" in by and not classes["hoi"]:
        raise BankError(f"The annotations that {bank.path} was made of have no hoi classes: leave hoi out.")
    kinds = [kind for kind in KINDS if kind in by or (not by and classes[kind])]
    width = bank.manifest.outputs[regions.outputs[0]].shape[0]
    needed = 8 * width**2 * sum(len(classes[kind]) for kind in kinds) * covariance
    if needed > _MOST:
        raise ConfigError(
            f"The covariances of {', '.join(kinds)} take {bytes_text(needed)}, and at most {bytes_text(_MOST)} are "
            "allowed: choose one kind with --by, or reduce the features with `patchbank convert --pca`."
        )
    sums = {kind: _Sums(len(classes[kind]), width, covariance=covariance) for kind in kinds}
    whose = {kind: of or (OBJECT if kind == "object" else UNION) for kind in kinds}
    with one_thread():
        for features, numbers in _read(regions, {*whose.values()}, progress):
            for kind in kinds:
                rows, column = features[whose[kind]], numbers[kind]
                sound = (column >= 0) & ~rows.isnan().any(1)
                rows = rows[sound].double()
                if normalise:
                    norms = rows.norm(dim=1, keepdim=True)
                    rows = rows / norms.where(norms > 0, norms.new_ones(()))
                sums[kind].add(column[sound], rows)
    return {kind: sums.pop(kind).statistics(whose[kind], classes[kind]) for kind in kinds}


def write_statistics(path: Path, made: Mapping[str, ClassStatistics], manifest: Manifest, *, normalised: bool) -> None:
    """Write ``KIND.count``, ``KIND.mean`` and ``KIND.covariance`` into a .safetensors or .pt file.

    The classes' names, and what the statistics are of, are the JSON document ``patchbank`` in the safetensors metadata;
    in a .pt file, a dict of tensors, a text of that name.

    Raises ConfigError on another suffix, OSError if the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: the file must end in {' or '.join(FORMATS)}.")
    tensors = {
        f"{kind}.{name}": value
        for kind, each in made.items()
        for name in ("count", "mean", "covariance")
        if (value := getattr(each, name)) is not None
    }
    about = {
        "made by": MARK,
        "model": manifest.model,
        "dataset": manifest.title,
        "cut": manifest.input.cut,
        "normalised": normalised,
        **{kind: {"of": each.of, "names": each.names} for kind, each in made.items()},
    }
    text = json.dumps(about)
    with whole_file(path) as temporary:
        if path.suffix == ".pt":
            with open(temporary, "wb") as file:  # whose name would be in it
                torch.save({**tensors, "patchbank": text}, file)
        else:
            from safetensors.torch import save_file

            with open(temporary, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            save_file(tensors, temporary, {"patchbank": text})
            temporary.chmod(mode)  # safetensors gives its files to their owner alone


class _Sums:
    """Count, mean, and the sum of the products of deviations from it, of each class."""

    def __init__(self, classes: int, width: int, *, covariance: bool) -> None:
        self._count = torch.zeros(classes, dtype=torch.int64)
        self._mean = torch.zeros(classes, width, dtype=torch.float64)
        self._products = torch.zeros(classes, width, width, dtype=torch.float64) if covariance else None

    def add(self, column: Tensor, rows: Tensor) -> None:
        """Add features (n, D) of classes (n,), as Chan, Golub and LeVeque merge the moments of two samples."""
        for number in column.bincount().nonzero().flatten().tolist():
            some = rows[column == number]
            before, more = int(self._count[number]), len(some)
            mean = some.mean(0)
            apart = mean - self._mean[number]
            if self._products is not None:
                rest = some - mean
                self._products[number] += rest.T @ rest
                self._products[number] += apart.outer(apart) * (before * more / (before + more))
            self._mean[number] += apart * (more / (before + more))
            self._count[number] += more

    def statistics(self, of: str, names: tuple[str, ...]) -> ClassStatistics:
        """In float32. The sums are used up."""
        covariance = None
        if self._products is not None:
            self._products /= (self._count - 1).clamp(min=1)[:, None, None]
            covariance = self._products.float()
        return ClassStatistics(of=of, names=names, count=self._count, mean=self._mean.float(), covariance=covariance)


def _classes(bank: Bank) -> dict[str, tuple[str, ...]]:
    """The names of the classes of each kind; empty if no pair has one."""
    pairs = [region for key in bank if (region := bank.region(key)) and region.verb is not None]
    verbs: tuple[str, ...] = {"hicodet": VERBS, "vcoco": ACTIONS}.get(bank.manifest.dataset, ())
    of_hoi = {each.hoi: each for each in pairs if each.hoi is not None}

    def name(names: tuple[str, ...], number: int | None) -> str:
        return names[number] if number is not None and number < len(names) else ""

    def padded(names: tuple[str, ...], numbers: Iterable[int | None], least: int = 0) -> tuple[str, ...]:
        count = max([least, len(names), *(1 + number for number in numbers if number is not None)])
        if count > _CLASSES:
            raise BankError(
                f"{bank.path} has pairs of class {count - 1}: statistics are of {_CLASSES:,} classes at most."
            )
        return tuple(name(names, number) for number in range(count))

    objects = OBJECTS if verbs else ()
    hois = padded((), of_hoi, HICO_HOIS if verbs is VERBS else 0) if of_hoi else ()
    return {
        "verb": padded(verbs, {each.verb for each in pairs}) if pairs else (),
        "object": padded(objects, {each.label for each in pairs}) if pairs else (),
        "hoi": tuple(
            f"{name(verbs, pair.verb)} {name(objects, pair.label)}".strip() if (pair := of_hoi.get(number)) else ""
            for number in range(len(hois))
        ),
    }


def _read(
    regions: Regions, whose: Iterable[str], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The features of some thousand pairs by region, and their classes by kind, until all are read."""
    features: dict[str, list[Tensor]] = {name: [] for name in whose}
    numbers: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    waiting = 0
    for done, value in enumerate(regions.values(), 1):
        if {*value.names} != {IMAGE}:  # else its pairs are not extracted yet
            pairs, classes = value.pairs(), value.pair_classes()
            for name, some in features.items():
                some.append(getattr(pairs, name))
            for kind, column in numbers.items():
                column.append(classes[kind])
            waiting += len(pairs.union)
        if waiting >= _TOGETHER or (waiting and done == len(regions)):
            yield (
                {name: torch.cat(some) for name, some in features.items()},
                {kind: torch.cat(column) for kind, column in numbers.items()},
            )
            for some in (*features.values(), *numbers.values()):
                some.clear()
            waiting = 0
            if progress:
                progress(done, len(regions))
