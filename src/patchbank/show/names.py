"""Texts beside pictures: the names of classes, and of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from patchbank.datasets import coco, hicodet
from patchbank.errors import DatasetError
from patchbank.features import UNKNOWN

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.bank.runs import Run
    from patchbank.datasets import Dataset

_LONGEST = 400  # characters of a text from a file


class Names(NamedTuple):
    """The names of objects and verbs.

    Attributes:
        objects: the annotations', or COCO's 80.
        verbs: the annotations', or HICO-DET's; empty for other data sets.
    """

    objects: tuple[str, ...]
    verbs: tuple[str, ...]

    def object(self, number: int) -> str:
        """``bicycle``."""
        return self.objects[number].replace("_", " ") if number < len(self.objects) else f"object {number}"

    def verb(self, number: int) -> str:
        """``pick up``, or ``verb 67``."""
        return self.verbs[number].replace("_", " ") if number < len(self.verbs) else f"verb {number}"


def names_of(data: Dataset) -> Names:
    """The names in the annotations; if there are none, COCO's for objects and HICO-DET's for its verbs."""
    try:
        classes = data.classes
    except DatasetError:
        return Names(coco.OBJECTS, hicodet.VERBS if data.name == "hicodet" else ())
    return Names(classes.objects, classes.verbs)


def plain(value: object, longest: int = _LONGEST) -> str:
    """A text with invisible characters escaped; only the end of a long one. A file name may contain anything."""
    text = str(value)
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[-longest:])
    return shown if max(len(text), len(shown)) <= longest else f"…{shown[1 - longest :]}"


def is_unknown(bank: Manifest) -> bool:
    """Whether the bank does not name its weights: it was imported."""
    return bank.identity.get("weights") == UNKNOWN


def is_untrained(runs: Sequence[Run]) -> bool:
    """Whether a run says that the weights are random numbers."""
    return any(run.untrained for run in runs)


def weights_text(bank: Manifest, runs: Sequence[Run]) -> str:
    """The weights, in words."""
    if is_untrained(runs):
        return "UNTRAINED random weights: the patterns come from the pixels and the architecture, and mean nothing"
    if is_unknown(bank):
        return "unknown weights"
    return official(bank) or f"weights with SHA-256 {bank.identity.get('weights', '')[:12]}…"


def official(bank: Manifest) -> str | None:
    """The bank's weights, if they are an official file: ``OpenAI weights``; else None."""
    from patchbank.encoders import official_weights

    name = official_weights(bank.identity)
    return f"{name} weights" if name else None
