"""patchbank: banks of dense CLIP patch features.

The names below are the public door. They are imported on first use, so that ``import patchbank`` (and with it
``patchbank --help``) costs nothing, and a trainer that opens a bank never imports the encoder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank, open_bank
    from patchbank.config import ExtractConfig, Fingerprint
    from patchbank.datasets import Dataset, Record, load_dataset
    from patchbank.encoder.encoder import PatchEncoder
    from patchbank.errors import PatchbankError
    from patchbank.extraction import ExtractSummary, extract
    from patchbank.geometry import ImageTransform

_HOME = {
    "Bank": "patchbank.bank.reader",
    "Dataset": "patchbank.datasets",
    "ExtractConfig": "patchbank.config",
    "ExtractSummary": "patchbank.extraction",
    "Fingerprint": "patchbank.config",
    "ImageTransform": "patchbank.geometry",
    "PatchEncoder": "patchbank.encoder.encoder",
    "PatchbankError": "patchbank.errors",
    "Record": "patchbank.datasets",
    "extract": "patchbank.extraction",
    "load_dataset": "patchbank.datasets",
    "open_bank": "patchbank.bank.reader",
}

__all__ = [
    "Bank",
    "Dataset",
    "ExtractConfig",
    "ExtractSummary",
    "Fingerprint",
    "ImageTransform",
    "PatchEncoder",
    "PatchbankError",
    "Record",
    "__version__",
    "extract",
    "load_dataset",
    "open_bank",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
