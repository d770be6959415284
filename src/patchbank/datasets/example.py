"""A small EZ-HOI root made from scikit-image's public-domain photographs, with annotation files in the real formats.

Each picture is one photograph, or a person's beside objects'. The man with the camera looks at the objects
("inspect" in HICO-DET, "look obj" in V-COCO); the astronaut does not ("no_interaction").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbank.datasets import ANNOTATIONS, IMAGES
from patchbank.datasets.classes import ACTIONS, COCO_91_TO_80, OBJECTS
from patchbank.errors import PatchbankError, install

if TYPE_CHECKING:
    from PIL.Image import Image

MARK = "PATCHBANK-DEMO.txt"
_HEIGHT = 384  # of every picture, in pixels


class Thing(NamedTuple):
    """What a photograph shows: its COCO class and its box, xyxy in the photograph's pixels."""

    name: str
    box: tuple[int, int, int, int]


# Boxes were drawn by hand. COCO has no class for the rocket and the shuttle behind the astronaut.
_PHOTOGRAPHS: dict[str, Thing | None] = {
    "astronaut": Thing("person", (10, 10, 512, 512)),
    "camera": Thing("person", (0, 60, 334, 512)),
    "chelsea": Thing("cat", (0, 0, 451, 300)),
    "coffee": Thing("cup", (166, 10, 418, 330)),
    "motorcycle": Thing("motorcycle", (120, 70, 690, 448)),
    "horse": Thing("horse", (17, 8, 390, 315)),
    "rocket": None,
}


# HICO-DET's hoi ids of "inspect" (0 if there is none) and "no_interaction".
_HOIS = {"cat": (0, 86), "cup": (299, 305), "motorcycle": (148, 160), "horse": (0, 146)}
_INSPECT, _NO_INTERACTION = 42, 58  # HICO-DET verbs, 1-based
_LOOK = 3  # V-COCO action, 0-based

# From left to right: a person and objects, or one photograph alone.
_SCENES = {
    "train": [
        ("astronaut",),
        ("camera", "motorcycle"),
        ("chelsea",),
        ("astronaut", "coffee"),
        ("camera", "coffee"),
        ("rocket",),
        ("astronaut", "chelsea"),
    ],
    "test": [
        ("camera",),
        ("astronaut", "motorcycle"),
        ("coffee",),
        ("camera", "horse"),
        ("camera", "motorcycle", "coffee"),
    ],
}
_SCENES["val"] = _SCENES["test"]


def write_sample(root: Path) -> None:
    """Lay out a small EZ-HOI root. Raises PatchbankError if `root` has other contents than an earlier one."""
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not (root / MARK).exists())):
        raise PatchbankError(f"{root} is not empty, and not an earlier demo: name a new directory.")
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).write_text("Made by `patchbank demo` from scikit-image's public-domain photographs.\n")
    photographs = _load_photographs()
    for split in IMAGES["hicodet"]:
        _write_hicodet(root, split, photographs)
    for split in IMAGES["vcoco"]:
        _write_vcoco(root, split, photographs)


def _load_photographs() -> dict[str, Image]:
    try:
        from skimage import data
    except ImportError as error:
        raise PatchbankError(f"The demo uses scikit-image's photographs: {install('demo')}") from error
    from PIL import Image

    from patchbank.images import open_image

    directory = Path(data.__file__).parent
    photographs = {}
    for name in _PHOTOGRAPHS:
        path = next(directory.glob(f"{name}.*"), None) or next(directory.glob(f"{name}_left.*"))
        with open_image(path) as photograph:
            if photograph.mode == "RGBA":  # the horse is a silhouette on nothing
                white = Image.new("RGBA", photograph.size, "white")
                photograph = Image.alpha_composite(white, photograph)
            photographs[name] = photograph.convert("RGB")
    return photographs


def _compose(scene: tuple[str, ...], photographs: dict[str, Image], path: Path, *, mirrored: bool) -> list[Thing]:
    """Write the scene's photographs side by side, at one height. Returns what they show; a person is the first."""
    import numpy as np
    from PIL import Image, ImageOps

    parts: list[Image.Image] = []
    things: list[Thing] = []
    left = 0
    for name in scene:
        photograph, thing = photographs[name], _PHOTOGRAPHS[name]
        scale = _HEIGHT / photograph.height
        part = photograph.resize((round(photograph.width * scale), _HEIGHT), Image.Resampling.BICUBIC)
        if thing is not None:
            x1, y1, x2, y2 = (round(value * scale) for value in thing.box)
            things.append(Thing(thing.name, (left + x1, y1, left + min(x2, part.width), min(y2, _HEIGHT))))
        parts.append(part)
        left += part.width
    picture = Image.fromarray(np.hstack([np.asarray(part) for part in parts]))
    if mirrored:
        picture = ImageOps.mirror(picture)
        things = [Thing(name, (left - x2, y1, left - x1, y2)) for name, (x1, y1, x2, y2) in things]
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)
    return things


def _write_hicodet(root: Path, split: str, photographs: dict[str, Image]) -> None:
    entries = []
    for number, scene in enumerate(_SCENES[split], start=1):
        file_name = f"HICO_{split}2015_{number:08}.jpg"
        things = _compose(scene, photographs, root / IMAGES["hicodet"][split] / file_name, mirrored=False)
        relations = []
        for target, thing in enumerate(things[1:], start=1):
            inspect, no_interaction = _HOIS[thing.name]
            known = scene[0] == "camera" and inspect
            relation = {"subject_id": 0, "object_id": target, "category_id": _INSPECT if known else _NO_INTERACTION}
            if split == "train":  # as in the real lists
                relation["hoi_category_id"] = inspect if known else no_interaction
            relations.append(relation)
        numbers = list(COCO_91_TO_80)
        boxes = [{"bbox": list(thing.box), "category_id": numbers[OBJECTS.index(thing.name)]} for thing in things]
        entry: dict[str, Any] = {"file_name": file_name, "annotations": boxes, "hoi_annotation": relations}
        if split == "train":
            entry["img_id"] = number
        entries.append(entry)
    (root / ANNOTATIONS["hicodet"][split][0]).write_text(json.dumps(entries) + "\n")


def _write_vcoco(root: Path, split: str, photographs: dict[str, Image]) -> None:
    annotations = []
    names = ["background", *OBJECTS]
    for number, scene in enumerate(_SCENES[split], start=1):
        file_name = f"COCO_{split}2014_{number:012}.jpg"
        # In a mirror, so that the two datasets differ.
        things = _compose(scene, photographs, root / IMAGES["vcoco"][split] / file_name, mirrored=True)
        targets = things[1:] if scene[0] == "camera" else []
        annotations.append(
            {
                "boxes_h": [list(map(float, things[0].box)) for _ in targets],
                "boxes_o": [list(map(float, thing.box)) for thing in targets],
                "actions": [_LOOK] * len(targets),
                "objects": [names.index(thing.name) for thing in targets],
                "file_name": file_name,
            }
        )
    content = {
        "annotations": annotations,
        "classes": ACTIONS,
        "objects": names,
        "images": list(range(1, len(annotations) + 1)),
        "action_to_object": [list(range(1, 81)) for _ in ACTIONS],
    }
    (root / ANNOTATIONS["vcoco"][split][0]).write_text(json.dumps(content) + "\n")
