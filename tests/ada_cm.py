"""A small HICO-DET with several pairs an image, its bank, and a reader of ADA-CM's file as ADA-CM has it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support import patchbank, photographs, write_json

Content = dict[str, dict[str, Any]]

PERSON, HORSE, BALL = [10, 8, 60, 70], [30, 20, 85, 80], [31, 20, 84.5, 81]
NO_AREA = [20, 8, 20, 70]


def pair(verb: int, target: int, subject: int = 0) -> dict[str, int]:
    return {"subject_id": subject, "object_id": target, "category_id": verb + 1, "hoi_category_id": 100 + verb}


def pairs_root(root: Path, *, damaged: bool = False) -> Path:
    """HICO-DET's training split of five images with 0, 3, 1, 2 and 0 pairs; the one with 2 comes first.

    Damaged: one object's box has no area.
    """
    names = photographs(root / "hicodet/hico_20160224_det/images/train2015", 5, prefix="HICO_train2015")
    boxes = [
        {"bbox": box, "category_id": category}
        for box, category in zip([PERSON, HORSE, NO_AREA if damaged else BALL], (1, 19, 37), strict=True)
    ]
    pairs = [[], [pair(5, 1), pair(7, 1), pair(5, 2)], [pair(9, 1)], [pair(3, 2), pair(3, 1)], []]
    entries = [
        {"file_name": name, "img_id": number, "annotations": boxes, "hoi_annotation": pairs[number]}
        for number, name in enumerate(names)
    ]
    write_json(root / "hicodet/trainval_hico.json", [entries.pop(3), *entries])
    return root


def extract_pairs(
    root: Path, bank: Path, weights: Path, *more: object, dataset: str = "hicodet", check: int = 0
) -> Path:
    """The bank of the tiny model's features of the pairs."""
    patchbank(
        *("extract", "pairs", dataset, "--root", root, "--out", bank, "--model", "tiny", "--weights", weights, *more),
        check=check,
    )
    return bank


def load(path: Path) -> Content:
    """As plain Python unpickles it."""
    with path.open("rb") as file:
        content: Content = pickle.load(file)
    return content


def overlap(first: Tensor, second: Tensor) -> float:
    """Intersection over union."""
    low, high = torch.maximum(first[:2], second[:2]), torch.minimum(first[2:], second[2:])
    inner = float((high - low).clamp(min=0).prod())
    areas = sum(float((box[2:] - box[:2]).prod()) for box in (first, second))
    return inner / (areas - inner)


def cache_model(content: Content, verbs: int = 117) -> tuple[Tensor, Tensor]:
    """What ADA-CM makes of its file: unit features of each pair, (M, 3D), and multi-hot verbs, (M, verbs).

    Pairs of an image whose humans and whose objects overlap by more than 0.6 are one, with the verbs of all.
    """
    features, labels = [], []
    for arrays in content.values():
        humans, objects = (torch.from_numpy(arrays[name]).float() for name in ("boxes_h", "boxes_o"))
        taken: set[int] = set()
        for first in range(len(arrays["verbs"])):
            if first in taken:
                continue
            label = torch.zeros(verbs)
            for other in range(first, len(arrays["verbs"])):
                same = arrays["objects"][first] == arrays["objects"][other]
                if same and min(overlap(humans[first], humans[other]), overlap(objects[first], objects[other])) > 0.6:
                    label[int(arrays["verbs"][other])] = 1
                    taken.add(other)
            vectors = (torch.from_numpy(arrays[f"{name}_features"][first]) for name in ("huamn", "object", "union"))
            features.append(torch.cat([vector.float() / vector.float().norm() for vector in vectors]))
            labels.append(label)
    return torch.stack(features), torch.stack(labels)


def arrays_of(content: Content) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """A copy that a test may change."""
    return {image: {name: array.copy() for name, array in arrays.items()} for image, arrays in content.items()}
