"""patchbank: banks of dense features of frozen vision transformers.

The names below are the public API. They are imported on first use: ``import patchbank`` and ``patchbank --help`` cost
nothing, and a trainer that opens a bank never imports an encoder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank as Bank
    from patchbank.bank.reader import open_bank as open_bank
    from patchbank.bank.regions import RegionFeatures as RegionFeatures
    from patchbank.bank.regions import open_regions as open_regions
    from patchbank.boxes import human_object_pairs as human_object_pairs
    from patchbank.boxes import union_boxes as union_boxes
    from patchbank.config import ExtractConfig as ExtractConfig
    from patchbank.datasets import Dataset as Dataset
    from patchbank.datasets import Sample as Sample
    from patchbank.datasets import load_dataset as load_dataset
    from patchbank.datasets.boxes import load_boxes as load_boxes
    from patchbank.datasets.hoi import HOITarget as HOITarget
    from patchbank.demo import prepare_demo as prepare_demo
    from patchbank.encoders.runner import Runner as Runner
    from patchbank.encoders.runner import load_encoder as load_encoder
    from patchbank.errors import PatchbankError as PatchbankError
    from patchbank.extraction.run import ExtractSummary as ExtractSummary
    from patchbank.extraction.run import extract as extract
    from patchbank.pool import global_context as global_context
    from patchbank.pool import pool_regions as pool_regions
    from patchbank.show.page import write_report as write_report
    from patchbank.show.showing import show_features as show_features
    from patchbank.statistics import ClassStatistics as ClassStatistics
    from patchbank.statistics import region_statistics as region_statistics
    from patchbank.train import FeatureDataset as FeatureDataset
    from patchbank.train import RandomHorizontalFlip as RandomHorizontalFlip
    from patchbank.train import collate as collate
    from patchbank.train import horizontal_flip as horizontal_flip
    from patchbank.transform import ImageTransform as ImageTransform

_NAMES = {
    "bank.reader": ["Bank", "open_bank"],
    "bank.regions": ["RegionFeatures", "open_regions"],
    "boxes": ["human_object_pairs", "union_boxes"],
    "config": ["ExtractConfig"],
    "datasets": ["Dataset", "Sample", "load_dataset"],
    "datasets.boxes": ["load_boxes"],
    "datasets.hoi": ["HOITarget"],
    "demo": ["prepare_demo"],
    "encoders.runner": ["Runner", "load_encoder"],
    "errors": ["PatchbankError"],
    "extraction.run": ["ExtractSummary", "extract"],
    "pool": ["global_context", "pool_regions"],
    "show.page": ["write_report"],
    "show.showing": ["show_features"],
    "statistics": ["ClassStatistics", "region_statistics"],
    "train": ["FeatureDataset", "RandomHorizontalFlip", "collate", "horizontal_flip"],
    "transform": ["ImageTransform"],
}
_HOME = {name: f"patchbank.{module}" for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
