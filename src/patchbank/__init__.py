"""patchbank: banks of dense features of frozen vision transformers.

The names below are the public API. They are imported on first use: ``import patchbank`` and ``patchbank --help`` cost
nothing, and a trainer that opens a bank never imports an encoder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank, open_bank
    from patchbank.boxes import human_object_pairs, union_boxes
    from patchbank.config import ExtractConfig
    from patchbank.datasets import Dataset, Sample, load_dataset
    from patchbank.datasets.hoi import HOITarget
    from patchbank.encoders.load import load_encoder
    from patchbank.encoders.runner import Runner
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
    "HOITarget": "patchbank.datasets.hoi",
    "ImageTransform": "patchbank.transform",
    "PatchbankError": "patchbank.errors",
    "RandomHorizontalFlip": "patchbank.train",
    "Runner": "patchbank.encoders.runner",
    "Sample": "patchbank.datasets",
    "collate": "patchbank.train",
    "extract": "patchbank.extraction.run",
    "global_context": "patchbank.pool",
    "horizontal_flip": "patchbank.train",
    "human_object_pairs": "patchbank.boxes",
    "load_dataset": "patchbank.datasets",
    "load_encoder": "patchbank.encoders.load",
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
    "HOITarget",
    "ImageTransform",
    "PatchbankError",
    "RandomHorizontalFlip",
    "Runner",
    "Sample",
    "__version__",
    "collate",
    "extract",
    "global_context",
    "horizontal_flip",
    "human_object_pairs",
    "load_dataset",
    "load_encoder",
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
