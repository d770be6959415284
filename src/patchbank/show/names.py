"""What is written beside pictures: classes' names, and what the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from patchbank.config import UNKNOWN
from patchbank.datasets import coco, hicodet
from patchbank.encoders.openai.registry import MODELS
from patchbank.errors import DatasetError

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.bank.runs import Run
    from patchbank.datasets import Dataset

_LONGEST = 400  # characters of a text of which nobody knows what it is


class Names(NamedTuple):
    """The names of objects and verbs, as far as they are known.

    Attributes:
        objects: COCO's 80.
        verbs: those of the annotations, or HICO-DET's; empty where neither tells them.
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
    """Those that the annotations tell; where they do not, COCO's of the objects, and of the verbs HICO-DET's."""
    try:
        classes = data.classes
    except DatasetError:
        return Names(coco.OBJECTS, hicodet.VERBS if data.name == "hicodet" else ())
    return Names(classes.objects, classes.verbs)


def plain(value: object, longest: int = _LONGEST) -> str:
    """A text as it is, less what cannot be seen, and its end if it is long: a file name may hold anything."""
    text = str(value)
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text[-longest:])
    return shown if max(len(text), len(shown)) <= longest else f"…{shown[1 - longest :]}"


def is_official(bank: Manifest) -> bool:
    """Whether the bank was made with OpenAI's file."""
    return bank.fingerprint.weights_sha256 in {model.sha256 for model in MODELS.values()}


def is_unknown(bank: Manifest) -> bool:
    """Whether nobody knows what weights the bank was made with: it was adopted."""
    return bank.fingerprint.weights_sha256 == UNKNOWN


def is_untrained(bank: Manifest, runs: Sequence[Run]) -> bool:
    """Whether the weights are known to be random numbers."""
    return not is_official(bank) and any(run.untrained for run in runs)


def weights_text(bank: Manifest, runs: Sequence[Run]) -> str:
    """What the weights are, for people."""
    if is_official(bank):
        return "OpenAI's weights"
    if is_untrained(bank, runs):
        return "UNTRAINED random weights: these patterns come from the pixels and the architecture, and mean nothing"
    if is_unknown(bank):
        return "weights not known"
    return f"weights of the user's, SHA-256 {bank.fingerprint.weights_sha256[:12]}…"
