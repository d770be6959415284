"""A small EZ-HOI root made from scikit-image's public-domain photographs, with annotation files in the real formats.

Each picture is one photograph, or a person's beside objects'. The relations are what such a picture shows: the
man with the camera looks at ("inspect" in HICO-DET, "look obj" in V-COCO) what stands before him, the astronaut has
nothing to do with what is beside her ("no_interaction").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbank.datasets import coco, hicodet, vcoco
from patchbank.errors import PatchbankError

if TYPE_CHECKING:
    from PIL.Image import Image

MARK = "PATCHBANK-DEMO.txt"
_HEIGHT = 384  # of every picture, in pixels


class Thing(NamedTuple):
    """What a photograph shows: its COCO class and its box, xyxy in the photograph's pixels."""

    name: str
    box: tuple[int, int, int, int]


# Boxes were drawn by hand. The rocket and the shuttle behind the astronaut are no COCO classes.
_PHOTOGRAPHS: dict[str, Thing | None] = {
    "astronaut": Thing("person", (10, 10, 512, 512)),
    "camera": Thing("person", (0, 60, 334, 512)),
    "chelsea": Thing("cat", (0, 0, 451, 300)),
    "coffee": Thing("cup", (166, 10, 418, 330)),
    "motorcycle": Thing("motorcycle", (120, 70, 690, 448)),
    "horse": Thing("horse", (17, 8, 390, 315)),
    "rocket": None,
}


class _Ids(NamedTuple):
    """A class's numbers: in COCO-91, in V-COCO's list of 81, and HICO-DET's hoi ids of its two relations."""

    coco: int
    vcoco: int
    inspect: int  # 0 where HICO-DET has no such class
    no_interaction: int


_IDS = {
    "cat": _Ids(17, 16, 0, 86),
    "cup": _Ids(47, 42, 299, 305),
    "motorcycle": _Ids(4, 4, 148, 160),
    "horse": _Ids(19, 18, 0, 146),
}
_INSPECT, _NO_INTERACTION = 42, 58  # HICO-DET verbs, 1-based
_LOOK = 3  # V-COCO action, 0-based

# From left to right: a person beside objects, or one photograph alone.
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


@dataclass(frozen=True)
class _Picture:
    image: Image
    things: list[Thing]

    @property
    def person(self) -> int | None:
        """The index of the person among the things."""
        return next((index for index, thing in enumerate(self.things) if thing.name == "person"), None)

    def pairs(self) -> list[tuple[int, int]]:
        """(person, object) indices."""
        person = self.person
        return [(person, index) for index in range(len(self.things)) if person is not None and index != person]


def write_sample(root: Path) -> None:
    """Lay out a small EZ-HOI root. Raises PatchbankError if `root` holds anything that is not an earlier one."""
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not (root / MARK).exists())):
        raise PatchbankError(f"{root} is not empty and no earlier demo: name a new directory, so that nothing is lost.")
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).write_text("Made by `patchbank demo` from scikit-image's public-domain photographs.\n")
    photographs = _load_photographs()
    for split in hicodet.SPLITS:
        _write_hicodet(root, split, photographs)
    for split in vcoco.SPLITS:
        _write_vcoco(root, split, photographs)


def _load_photographs() -> dict[str, Image]:
    try:
        from skimage import data
    except ImportError as error:
        raise PatchbankError(
            'The demo uses scikit-image\'s photographs: pip install "patchbank[demo]" (in a checkout: ".[demo]").'
        ) from error
    from PIL import Image

    directory = Path(data.__file__).parent
    photographs = {}
    for name in _PHOTOGRAPHS:
        path = next(directory.glob(f"{name}.*"), None) or next(directory.glob(f"{name}_left.*"))
        photograph: Image.Image = Image.open(path)
        if photograph.mode == "RGBA":  # the horse is a silhouette on nothing
            white = Image.new("RGBA", photograph.size, "white")
            photograph = Image.alpha_composite(white, photograph)
        photographs[name] = photograph.convert("RGB")
    return photographs


def _compose(scene: tuple[str, ...], photographs: dict[str, Image], mirrored: bool) -> _Picture:
    """The scene's photographs side by side, brought to one height."""
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
    picture = Image.new("RGB", (left, _HEIGHT))
    left = 0
    for part in parts:
        picture.paste(part, (left, 0))
        left += part.width
    if mirrored:  # V-COCO's pictures are HICO-DET's in a mirror, so that the two data sets differ
        width = picture.width
        picture = ImageOps.mirror(picture)
        things = [Thing(name, (width - x2, y1, width - x1, y2)) for name, (x1, y1, x2, y2) in things]
    return _Picture(picture, things)


def _save(picture: _Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.image.save(path, quality=92)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


def _write_hicodet(root: Path, split: str, photographs: dict[str, Image]) -> None:
    entries = []
    for number, scene in enumerate(_SCENES[split], start=1):
        picture = _compose(scene, photographs, mirrored=False)
        file_name = f"HICO_{split}2015_{number:08}.jpg"
        _save(picture, root / hicodet.IMAGES[split] / file_name)
        inspects = scene[0] == "camera"
        relations = []
        for subject, target in picture.pairs():
            ids = _IDS[picture.things[target].name]
            known = inspects and ids.inspect
            relation = {
                "subject_id": subject,
                "object_id": target,
                "category_id": _INSPECT if known else _NO_INTERACTION,
            }
            if split == "train":  # as in the real lists
                relation["hoi_category_id"] = ids.inspect if known else ids.no_interaction
            relations.append(relation)
        boxes = [
            {"bbox": list(thing.box), "category_id": 1 if thing.name == "person" else _IDS[thing.name].coco}
            for thing in picture.things
        ]
        entry: dict[str, Any] = {"file_name": file_name, "annotations": boxes, "hoi_annotation": relations}
        if split == "train":
            entry["img_id"] = number
        entries.append(entry)
    _write_json(root / hicodet.ANNOTATIONS[split][0], entries)


def _write_vcoco(root: Path, split: str, photographs: dict[str, Image]) -> None:
    annotations = []
    for number, scene in enumerate(_SCENES[split], start=1):
        picture = _compose(scene, photographs, mirrored=True)
        file_name = f"COCO_{split}2014_{number:012}.jpg"
        _save(picture, root / vcoco.IMAGES[split] / file_name)
        pairs = picture.pairs() if scene[0] == "camera" else []
        annotations.append(
            {
                "boxes_h": [list(map(float, picture.things[subject].box)) for subject, _ in pairs],
                "boxes_o": [list(map(float, picture.things[target].box)) for _, target in pairs],
                "actions": [_LOOK] * len(pairs),
                "objects": [_IDS[picture.things[target].name].vcoco for _, target in pairs],
                "file_name": file_name,
            }
        )
    content = {
        "annotations": annotations,
        "classes": _VCOCO_ACTIONS,
        "objects": ["background", *coco.OBJECTS],
        "images": list(range(1, len(annotations) + 1)),
        "action_to_object": [list(range(1, 81)) for _ in _VCOCO_ACTIONS],
    }
    _write_json(root / vcoco.ANNOTATIONS[split], content)


# fmt: off
_VCOCO_ACTIONS = [
    "hold obj", "sit instr", "ride instr", "look obj", "hit instr", "hit obj", "eat obj", "eat instr", "jump instr",
    "lay instr", "talk_on_phone instr", "carry obj", "throw obj", "catch obj", "cut instr", "cut obj",
    "work_on_computer instr", "ski instr", "surf instr", "skateboard instr", "drink instr", "kick obj", "read obj",
    "snowboard instr",
]
# fmt: on
