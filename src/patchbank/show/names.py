"""Texts beside pictures: the names of classes, and of the weights; the names of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.errors import BankError, printable
from patchbank.features import UNKNOWN
from patchbank.locations import is_remote

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.bank.reader import Bank
    from patchbank.bank.runs import Run
    from patchbank.datasets import Dataset
    from patchbank.features import Output

MARK = "patchbank show"  # in every picture that is saved: only marked files are replaced
_LONGEST = 400  # characters of a text from a file


def named_pairs(data: Dataset, key: str) -> list[tuple[list[float], list[float], str, str]]:
    """The annotated pairs of an image: the human's and the object's box, and the names of object and verb.

    The boxes are xyxy in original pixels. The names are those of `Dataset.classes`; beyond them numbers, such as
    ``verb 167``. Raises DatasetError as `Dataset.target`.
    """
    target = data.target(key)
    objects, verbs = data.classes[:2]

    def name(names: tuple[str, ...], number: int, kind: str) -> str:
        return names[number].replace("_", " ") if number < len(names) else f"{kind} {number}"

    columns = (target.boxes_h, target.boxes_o, target.object, target.verb)
    return [
        (human, thing, name(objects, category, "object"), name(verbs, verb, "verb"))
        for human, thing, category, verb in zip(*(each.tolist() for each in columns), strict=True)
    ]


def plain(value: object, longest: int = _LONGEST) -> str:
    """A text with invisible characters escaped; only the end of a long one. A file name may contain anything."""
    text = str(value)
    shown = printable(text[-longest:])
    return shown if max(len(text), len(shown)) <= longest else f"…{shown[1 - longest :]}"


def output_text(output: Output) -> str:
    """What an output is: ``(196, 512) float16, block 12, ln_post, proj``."""
    parts = (f"{output.shape} {output.dtype}", f"block {output.block}", output.norm, output.projection, output.variant)
    return ", ".join(filter(None, parts))


def weights_of(bank: Manifest, runs: Sequence[Run]) -> tuple[str, str]:
    """The kind of a bank's weights (``untrained``, ``unknown`` or ``other``), and a text about them."""
    from patchbank.encoders import known_weights

    weights = bank.identity.get("weights", "")
    if any(run.untrained for run in runs):
        text = "UNTRAINED random weights: the patterns come from the pixels and the architecture, and mean nothing"
        return "untrained", text
    if weights == UNKNOWN:  # imported
        return "unknown", "unknown weights"
    if name := known_weights(bank.identity):
        return "other", name
    if "@" in weights:  # a repository and its commit
        return "other", f"weights {weights}"
    return "other", f"weights not known to patchbank, SHA-256 {weights[:12]}…"


def grid_of_images(bank: Bank, output: str | None = None) -> str:
    """The name of the output that pictures show; None is the main one.

    Raises BankError if it is no grid of patches, or the bank is not one of whole images.
    """
    if bank.manifest.input.cut:
        raise BankError(
            f"{bank.path} holds features of regions, and pictures show whole images: extract these into a bank of "
            "their own. `patchbank info` and `patchbank stats` describe a bank of regions."
        )
    return bank.grid_name(output)


def page_beside(bank: Path) -> Path:
    """The default path of a bank's page: beside it; in the current directory for a bank in an object store."""
    if is_remote(bank):
        return Path(f"{bank.name}-report.html")
    if not bank.name or bank.name == "..":  # the current directory, or the one above it
        bank = bank.resolve()
    return bank.with_name(f"{bank.name}-report.html")
