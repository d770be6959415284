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
    from patchbank.boxes import human_object_pairs, union_boxes
    from patchbank.config import ExtractConfig, Fingerprint
    from patchbank.datasets import Dataset, Sample, load_dataset
    from patchbank.datasets.hoi import HOITarget
    from patchbank.encoders.encoder import PatchEncoder
    from patchbank.errors import PatchbankError
    from patchbank.extraction.run import ExtractSummary, extract
    from patchbank.pool import global_context, pool_regions
    from patchbank.train import FeatureDataset, RandomHorizontalFlip, collate, horizontal_flip
    from patchbank.transform import ImageTransform

_HOME = {
    "Bank": "patchbank.bank.reader",
    "Dataset": "patchbank.datasets",
    "ExtractConfig": "patchbank.config",
    "ExtractSummary": "patchbank.extraction.run",
    "FeatureDataset": "patchbank.train",
    "Fingerprint": "patchbank.config",
    "HOITarget": "patchbank.datasets.hoi",
    "ImageTransform": "patchbank.transform",
    "PatchEncoder": "patchbank.encoders.encoder",
    "PatchbankError": "patchbank.errors",
    "RandomHorizontalFlip": "patchbank.train",
    "Sample": "patchbank.datasets",
    "collate": "patchbank.train",
    "extract": "patchbank.extraction.run",
    "global_context": "patchbank.pool",
    "horizontal_flip": "patchbank.train",
    "human_object_pairs": "patchbank.boxes",
    "load_dataset": "patchbank.datasets",
    "open_bank": "patchbank.bank.reader",
    "pool_regions": "patchbank.pool",
    "union_boxes": "patchbank.boxes",
}

__all__ = [
    "Bank",
    "Dataset",
    "ExtractConfig",
    "ExtractSummary",
    "FeatureDataset",
    "Fingerprint",
    "HOITarget",
    "ImageTransform",
    "PatchEncoder",
    "PatchbankError",
    "RandomHorizontalFlip",
    "Sample",
    "__version__",
    "collate",
    "extract",
    "global_context",
    "horizontal_flip",
    "human_object_pairs",
    "load_dataset",
    "open_bank",
    "pool_regions",
    "union_boxes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
