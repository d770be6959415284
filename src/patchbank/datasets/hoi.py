"""Human-object pairs in one form, from any of the field's annotation files.

Boxes are xyxy in original pixels, 0-based; classes are 0-based indices; objects are COCO's 80 in their usual order, the
person first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchbank.datasets.classes import OBJECTS, VERBS
from patchbank.errors import DatasetError
from patchbank.files import read_regular
from patchbank.notebook import geometry, shown, table
from patchbank.transform import ImageTransform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_COLUMNS = ("boxes_h", "boxes_o", "object", "verb", "hoi")
HICO_HOIS = 600  # HICO-DET's classes of verb and object together
_BESIDE = (
    " For HICO-DET, put UPT's instances_train2015.json or instances_test2015.json beside it: they define the classes."
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HOITarget:
    """The K annotated human-object pairs of one image.

    Attributes:
        key: the image's.
        boxes_h: (K, 4) float32, the human's box, xyxy in original pixels, 0-based.
        boxes_o: (K, 4) float32, likewise, the object's box.
        object: (K,) int64, the object's class among COCO's 80; `HOIClasses.objects` names them.
        verb: (K,) int64, HICO-DET's verbs or V-COCO's actions; `HOIClasses.verbs` names them.
        hoi: (K,) int64, HICO-DET's class of verb and object together; None if the file does not define it.
        size: (width, height) of the original image in pixels; None if unknown.
        incomplete: the number of further pairs in the file, which lack the object's box.
        transform: how the image became the grid; None without a bank (`FeatureDataset` sets it).
        regions: features of the pairs' boxes, (K, D) by name, pooled or of crops; empty unless requested.
    """

    key: str
    boxes_h: Tensor
    boxes_o: Tensor
    object: Tensor
    verb: Tensor
    hoi: Tensor | None = None
    size: tuple[int, int] | None = None
    incomplete: int = 0
    transform: ImageTransform | None = None
    regions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes_h)

    def __repr__(self) -> str:
        regions = f", regions {', '.join(self.regions)}" if self.regions else ""
        size = f", {self.size[0]} x {self.size[1]} pixels" if self.size else ""
        return f"<HOITarget {self.key}: {len(self)} pair{'' if len(self) == 1 else 's'}{size}{regions}>"

    def _repr_html_(self) -> str:
        boxes = {"human": self.boxes_h.tolist(), "object": self.boxes_o.tolist()}
        # V-COCO's annotations have no hoi classes, and HICO-DET's verbs need not be its actions.
        columns: dict[str, Iterable[object]] = {
            "verb": [VERBS[each] if self.hoi is not None else each for each in self.verb.tolist()],
            "of": [OBJECTS[each] if each < len(OBJECTS) else each for each in self.object.tolist()],
            **{kind: [", ".join(f"{each:g}" for each in box) for box in several] for kind, several in boxes.items()},
        }
        parts = []
        if self.transform is not None:
            seen = (self.transform.visible_fraction(each).tolist() for each in (self.boxes_h, self.boxes_o))
            columns["visible"] = [
                [f"human {human:.0%}", f"object {thing:.0%}"] for human, thing in zip(*seen, strict=True)
            ]
            parts.append(geometry(self.transform, boxes))
        return shown(repr(self)[1:-1], table(list(columns), list(zip(*columns.values(), strict=True))), *parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process by value: a data-loader worker would send each small tensor as a file."""
        return _received, (vars(self.map(_numpy)),)

    def map(self, function: Callable[[Tensor], Tensor]) -> HOITarget:
        """The same with each tensor replaced."""
        changed: dict[str, Any] = {
            name: function(value) for name in _COLUMNS if (value := getattr(self, name)) is not None
        }
        return replace(self, **changed, regions={name: function(value) for name, value in self.regions.items()})

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HOITarget:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> HOITarget:
        """The same in page-locked memory. A DataLoader with ``pin_memory=True`` calls this."""
        return self.map(lambda tensor: tensor.pin_memory())


def _numpy(tensor: Tensor) -> Any:
    """As an array, if numpy has the dtype and nothing is lost."""
    import torch

    plain = tensor.device.type == "cpu" and not tensor.requires_grad and tensor.dtype != torch.bfloat16
    return tensor.numpy() if plain else tensor


def _received(values: dict[str, Any]) -> HOITarget:
    """The inverse of `HOITarget.__reduce__`."""
    import torch

    return HOITarget(**values).map(torch.as_tensor)


class HOIClasses(NamedTuple):
    """The names of a target's classes.

    Attributes:
        objects: COCO's 80.
        verbs: HICO-DET's 117 verbs, or V-COCO's 24 actions.
        hois: (object, verb) of each of HICO-DET's 600 classes; empty for V-COCO, which has none, and if unknown.
        objects_of: for each verb, the objects it occurs with, ascending; empty if unknown.
    """

    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    hois: tuple[tuple[int, int], ...]
    objects_of: tuple[tuple[int, ...], ...]

    def name(self, hoi: int) -> str:
        """``ride bicycle``."""
        target, verb = self.hois[hoi]
        return f"{self.verbs[verb]} {self.objects[target]}"

    def hois_with(self, *, objects: Iterable[int] = (), verbs: Iterable[int] = ()) -> list[int]:
        """The hoi classes with one of these objects or verbs, such as all of an unseen object.

        Raises DatasetError if the hoi classes are unknown.
        """
        if not self.hois:
            raise DatasetError(f"The annotations do not define hoi classes.{_BESIDE}")
        objects, verbs = set(objects), set(verbs)
        return [hoi for hoi, (target, verb) in enumerate(self.hois) if target in objects or verb in verbs]


@dataclass(frozen=True, eq=False)
class HOIAnnotations:
    """The P pairs of a whole file, in columns: small, and quickly sent to other processes.

    Attributes:
        source: the file.
        rows: key -> the image's rows of the columns.
        boxes_h, boxes_o: (P, 4) float32.
        object, verb: (P,) int64.
        hoi: (P,) int64, or None.
        sizes: key -> (width, height), if the file has sizes.
        incomplete: key -> number of pairs without an object's box, if there are any.
        classes: the classes' names, if the file or UPT's beside it has them.
        left: the places of pairs among those of their image in the file, (P,), if some were left out; else None.
    """

    source: Path
    rows: dict[str, range]
    boxes_h: NDArray[np.float32]
    boxes_o: NDArray[np.float32]
    object: NDArray[np.int64]
    verb: NDArray[np.int64]
    hoi: NDArray[np.int64] | None
    sizes: dict[str, tuple[int, int]]
    incomplete: dict[str, int]
    classes: HOIClasses | None
    left: NDArray[np.int64] | None = None

    @property
    def filtered(self) -> bool:
        """Whether some of the file's pairs were left out."""
        return self.left is not None

    def numbers(self, key: str) -> Sequence[int]:
        """The places of an image's pairs among its pairs in the file. Raises KeyError if it is not listed."""
        rows = self.rows[key]
        return range(len(rows)) if self.left is None else self.left[rows.start : rows.stop].tolist()

    @cached_property
    def unions(self) -> NDArray[np.float32]:
        """(P, 4): the smallest box around both of each pair."""
        first = np.minimum(self.boxes_h[:, :2], self.boxes_o[:, :2])
        return np.concatenate([first, np.maximum(self.boxes_h[:, 2:], self.boxes_o[:, 2:])], axis=1)

    def target(
        self, key: str, size: tuple[int, int] | None = None, transform: ImageTransform | None = None
    ) -> HOITarget:
        """One image's pairs, with its size, of None the file's, and its transform. Raises KeyError if not listed."""
        import torch

        rows = self.rows[key]
        columns: dict[str, Any] = {
            name: torch.from_numpy(column[rows.start : rows.stop].copy())  # the caller's own
            for name in _COLUMNS
            if (column := getattr(self, name)) is not None
        }
        size, incomplete = size or self.sizes.get(key), self.incomplete.get(key, 0)
        return HOITarget(key=key, size=size, incomplete=incomplete, transform=transform, **columns)

    def hoi_counts(self) -> NDArray[np.int64]:
        """(600,): the number of pairs of each hoi class. Raises DatasetError without hoi classes."""
        return np.bincount(self._hois(), minlength=HICO_HOIS)

    def without_hois(self, hois: Iterable[int] | str | Path) -> HOIAnnotations:
        """Leave out the pairs of some hoi classes: 0-based, or a file of them.

        Raises DatasetError without hoi classes, or if a class does not exist.
        """
        unwanted = read_indices(Path(hois)) if isinstance(hois, (str, Path)) else sorted({int(hoi) for hoi in hois})
        wanted = ~np.isin(self._hois(), unwanted)
        if wrong := [hoi for hoi in unwanted if not 0 <= hoi < HICO_HOIS]:
            raise DatasetError(f"There is no hoi class {wrong[0]}: they are 0 to {HICO_HOIS - 1}.")
        return self.only(wanted)

    def only(self, wanted: NDArray[np.bool_]) -> HOIAnnotations:
        """Leave out the pairs where a mask (P,) is false."""
        before = np.concatenate([[0], np.cumsum(wanted)])
        rows = {key: range(int(before[part.start]), int(before[part.stop])) for key, part in self.rows.items()}
        numbers = np.zeros(len(wanted), np.int64)
        for key, part in self.rows.items():
            numbers[part.start : part.stop] = self.numbers(key)
        columns = {name: column[wanted] for name in _COLUMNS if (column := getattr(self, name)) is not None}
        return replace(self, rows=rows, left=self.left if wanted.all() else numbers[wanted], **columns)

    def _hois(self) -> NDArray[np.int64]:
        if self.hoi is None:
            vcoco = self.classes is not None and not self.classes.hois
            why = " V-COCO has none." if vcoco else _BESIDE
            raise DatasetError(f"{self.source} does not have the pairs' hoi classes.{why}")
        return self.hoi


def read_indices(path: Path) -> list[int]:
    """Whole numbers from a file, sorted, each once: a JSON list, or text with spaces, commas or new lines.

    Raises DatasetError on anything else.
    """
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}.") from error
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    try:
        return sorted({int(word) for word in words})
    except ValueError as error:
        raise DatasetError(f"{path} is not a list of whole numbers: {error}.") from error
