"""What do a million boxes cost before the first is encoded? Memory and seconds of a detector's file and the plan.

    python -m benchmarks.boxes [--images 100000] [--boxes 10] [--formats coco,lines,arrays,tensors]

Each format is a process of its own, with a made-up file of so many boxes an image, in COCO's order of results: best
score first, images mixed. Images are names of few small files, by links. Steps: `read` the file, `match` it with the
images and choose (`load_boxes`), `plan` (`make_plan`, with the SHA-256 of all regions), `pass` once over all samples.
`held` is what the process holds then beyond what it held before it read the file, a box; `peak` is of the process, its
imports included, and `before` what these and the images took.

Prints a table, and ends in one JSON line.
"""

from __future__ import annotations

import json
import pickle
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import child, finish, options_of, print_table
from benchmarks.growth_steps import FILES, _config, _memory, _names, _peak, prepare


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, images=100_000, boxes=10, formats=list(_WRITERS), directory=Path, step=str)
    if options.step:
        print(json.dumps(_step(options.directory, options.step, options.images)))
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        prepare(place)
        for directory in range(-(-options.images // FILES)):
            (place / "images" / f"{directory:05}").symlink_to(place / "pictures")
        for each in options.formats:
            _WRITERS[each](place / each, options.images, options.boxes)
            results[each] = child("boxes", "--step", each, "--directory", place, "--images", options.images)
            (place / each).unlink()
    print_table(
        list(_COLUMNS), [[each, *(row[name] for name in list(_COLUMNS.values())[1:])] for each, row in results.items()]
    )
    finish("boxes", "numpy", images=options.images, boxes=options.images * options.boxes, results=results)


_COLUMNS = {
    "format": "format",
    "file MB": "file_mb",
    "read s": "read_seconds",
    "match s": "match_seconds",
    "plan s": "plan_seconds",
    "pass s": "pass_seconds",
    "before MB": "before_mb",
    "peak MB": "peak_mb",
    "held, bytes a box": "held_bytes_a_box",
}


def _step(place: Path, name: str, images: int) -> dict[str, float]:
    from patchbank import load_boxes
    from patchbank.datasets.detections import read_detections
    from patchbank.datasets.samples import Dataset, make_samples
    from patchbank.extraction.plan import make_plan

    directory, config = place / "images", _config(place, "shards")
    data = Dataset("folder", None, directory, make_samples(_names(images), directory, directory))
    before, began = _memory("VmRSS"), time.perf_counter()
    found = read_detections(place / name)
    read = time.perf_counter()
    dataset = load_boxes(data, found)
    matched = time.perf_counter()
    plan = make_plan(dataset, place / "bank", config)
    planned = time.perf_counter()
    held, peak = _memory("VmRSS") - before, _peak()
    count = sum(1 for _ in plan.todo)
    passed = time.perf_counter()
    if count != len(found):
        raise SystemExit(f"{count} of {len(found)} boxes are left to do.")
    return {
        "file_mb": (place / name).stat().st_size / 1e6,
        "read_seconds": read - began,
        "match_seconds": matched - read,
        "plan_seconds": planned - matched,
        "pass_seconds": passed - planned,
        "before_mb": before / 1e6,
        "peak_mb": peak / 1e6,
        "held_bytes_a_box": held / count,
    }


def _made(images: int, boxes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (images, boxes, 4) float32 in 64 x 48 pixels, labels, scores."""
    chance = np.random.default_rng(0)
    corners = chance.uniform(0, (60, 44), (images, boxes, 2))
    sizes = chance.uniform(1, 4, (images, boxes, 2))
    made = np.concatenate([corners, corners + sizes], 2).astype(np.float32)
    return made, chance.integers(0, 80, (images, boxes)), chance.uniform(0, 1, (images, boxes)).astype(np.float32)


def _coco(path: Path, images: int, boxes: int) -> None:
    from patchbank.datasets.classes import COCO_91_TO_80

    made, labels, scores = (each.reshape(images * boxes, -1) for each in _made(images, boxes))
    names, ids = list(_names(images)), list(COCO_91_TO_80)
    with open(path, "w") as file:
        for number, row in enumerate(np.argsort(-scores[:, 0]).tolist()):
            x1, y1, x2, y2 = made[row].tolist()
            bbox = ", ".join(f"{each:.2f}" for each in (x1, y1, x2 - x1, y2 - y1))
            entry = f'"category_id": {ids[labels[row, 0]]}, "bbox": [{bbox}], "score": {scores[row, 0]:.3f}'
            file.write(f'{", " if number else "["}{{"image_id": "{names[row // boxes]}", {entry}}}')
        file.write("]")


def _lines(path: Path, images: int, boxes: int) -> None:
    with open(path, "w") as file:
        for name, *columns in zip(_names(images), *_made(images, boxes), strict=True):
            entry = dict(zip(("boxes", "labels", "scores"), (each.tolist() for each in columns), strict=True))
            file.write(f"{json.dumps({'file_name': name} | entry)}\n")


def _arrays(path: Path, images: int, boxes: int, of: Any = np.copy) -> None:
    """As hicodet_train_bbox_R50.p: with hidden states, which are most of it."""
    hidden = np.random.default_rng(1).standard_normal((boxes, 256), np.float32)
    names = "boxes", "labels", "scores", "hidden_states"
    content = {
        name: [dict(zip(names, (of(each) for each in (*row, hidden)), strict=True))]
        for name, *row in zip(_names(images), *_made(images, boxes), strict=True)
    }
    with open(path, "wb") as file:
        pickle.dump(content, file)


def _tensors(path: Path, images: int, boxes: int) -> None:
    """The same of tensors, each with bytes of its own."""
    import torch

    _arrays(path, images, boxes, torch.tensor)


_WRITERS = {"coco": _coco, "lines": _lines, "arrays": _arrays, "tensors": _tensors}

if __name__ == "__main__":
    main()
