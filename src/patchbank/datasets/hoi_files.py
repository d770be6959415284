"""Reading human-object pairs from the field's annotation files: HICO-DET's lists, UPT's files, V-COCO's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchbank.datasets.annotations import read_annotations
from patchbank.datasets.classes import COCO_91_TO_80
from patchbank.datasets.hoi import HICO_HOIS, HOIAnnotations, HOIClasses
from patchbank.errors import DatasetError

_HICO_VERBS = 117
_LARGEST = 1 << 24  # pixels; float32 counts them up to here


class _Pair(NamedTuple):
    """One pair as it is read. `box_o` is None if the file has none."""

    box_h: tuple[float, ...]
    box_o: tuple[float, ...] | None
    object: int
    verb: int
    hoi: int | None


class _Image(NamedTuple):
    key: str
    pairs: list[_Pair]
    size: tuple[int, int] | None = None


def read_hoi(path: Path, *, any_box: bool = False) -> HOIAnnotations:
    """All pairs of an annotation file, whose format is recognised by its structure.

    Args:
        any_box: whether boxes may be any four numbers, for a caller that looks at each.

    HICO-DET's lists name no classes; UPT's file beside one does. They also give the hoi class if a list has only verb
    and object.

    Raises DatasetError with file, image and entry if anything is malformed.
    """
    structure, content, _ = read_annotations(path)
    images, classes = _READERS[structure](_Where(path, any_box=any_box), content)
    if structure == "hicodet":
        classes = _classes_beside(path)
    by_key: dict[str, list[_Pair]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    incomplete: dict[str, int] = {}
    for image in images:
        whole = [pair for pair in image.pairs if pair.box_o is not None]
        by_key.setdefault(image.key, []).extend(whole)  # a list may name an image twice
        if image.size is not None:
            sizes[image.key] = image.size
        if lacking := len(image.pairs) - len(whole):
            incomplete[image.key] = incomplete.get(image.key, 0) + lacking
    rows: dict[str, range] = {}
    pairs: list[_Pair] = []
    for key, own in by_key.items():
        rows[key] = range(len(pairs), len(pairs) + len(own))
        pairs += own
    return HOIAnnotations(
        path,
        rows,
        np.array([pair.box_h for pair in pairs], np.float32).reshape(-1, 4),
        np.array([pair.box_o for pair in pairs], np.float32).reshape(-1, 4),
        np.array([pair.object for pair in pairs], np.int64),
        np.array([pair.verb for pair in pairs], np.int64),
        _hois(pairs, classes),
        sizes,
        incomplete,
        classes,
    )


def _hois(pairs: list[_Pair], classes: HOIClasses | None) -> NDArray[np.int64] | None:
    """The file's hoi classes, else those of object and verb; None if a pair has none."""
    known = {both: hoi for hoi, both in enumerate(classes.hois)} if classes else {}
    hois = [known.get((pair.object, pair.verb)) if pair.hoi is None else pair.hoi for pair in pairs]
    if not known and not any(pair.hoi is not None for pair in pairs):
        return None
    return None if None in hois else np.array(hois, np.int64)


def _classes_beside(path: Path) -> HOIClasses | None:
    for split in ("train", "test"):
        if (beside := path.with_name(f"instances_{split}2015.json")).exists():
            structure, content, _ = read_annotations(beside)
            if structure == "upt":
                return _upt_classes(_Where(beside), content)
    return None


class _Where(NamedTuple):
    """A place in a file, and the checks of what is there."""

    path: Path
    image: str = ""
    entry: str = ""
    any_box: bool = False

    def error(self, what: str) -> DatasetError:
        place = ", ".join(filter(None, (self.image, self.entry)))
        return DatasetError(f"{self.path}: {place}{': ' * bool(place)}{what}.")

    def of(self, entry: Any, name: str) -> Any:
        if not isinstance(entry, dict) or name not in entry:
            raise self.error(f"there is no {name}")
        return entry[name]

    def number(self, entry: Any, name: str, first: int, end: int) -> int:
        return self.within(name, self.of(entry, name), first, end)

    def within(self, name: str, value: Any, first: int, end: int) -> int:
        """A whole number from `first` to less than `end`."""
        if type(value) is not int or not first <= value < end:
            raise self.error(f"{name} {value!r} is not among {first} to {end - 1}")
        return value

    def box(self, value: Any, *, one_based: bool = False) -> tuple[float, ...]:
        """xyxy. Of 1-based pixels, the first that belong to the box become continuous coordinates."""
        if not (isinstance(value, list) and len(value) == 4 and all(type(each) in (int, float) for each in value)):
            raise self.error(f"{value!r} is no box of four numbers")
        x1, y1, x2, y2 = value
        if not self.any_box and not (all(abs(each) <= _LARGEST for each in value) and x1 <= x2 and y1 <= y2):
            raise self.error(f"{value} is no box [x1, y1, x2, y2]")
        if not one_based:
            return x1, y1, x2, y2
        if min(x1, y1) < 1 and not self.any_box:
            raise self.error(f"{value} is no box of pixels that count from 1, as UPT's do")
        return x1 - 1, y1 - 1, x2, y2

    def items(self, entry: Any, name: str) -> list[Any]:
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, list):
            raise self.error(f"there is no list {name}")
        return value

    def columns(self, entry: Any, *names: str) -> Iterator[tuple[Any, ...]]:
        """The rows of lists of one length."""
        columns = [self.items(entry, name) for name in names]
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(f"{len(column):,} {name}" for name, column in zip(names, columns, strict=True))
            raise self.error(f"its columns are of different lengths ({lengths})")
        return zip(*columns, strict=True)

    def names(self, entry: Any, name: str) -> tuple[str, ...]:
        names = self.items(entry, name)
        if not all(isinstance(each, str) for each in names):
            raise self.error(f"{name} are not all names")
        return tuple(names)


# HICO-DET's lists


def _hicodet(file: _Where, content: list[dict[str, Any]]) -> tuple[Iterator[_Image], None]:
    return (_hicodet_image(file._replace(image=entry["file_name"]), entry) for entry in content), None


def _hicodet_image(image: _Where, entry: dict[str, Any]) -> _Image:
    boxes, relations = (image.items(entry, name) for name in ("annotations", "hoi_annotation"))
    things: list[tuple[tuple[float, ...], int]] = []
    for number, thing in enumerate(boxes):
        where = image._replace(entry=f"annotations[{number}]")
        box = where.box(where.of(thing, "bbox"))
        category = where.of(thing, "category_id")
        if type(category) is not int or category not in COCO_91_TO_80:
            raise where.error(f"category_id {category!r} is none of COCO's")
        things.append((box, COCO_91_TO_80[category]))
    pairs: list[_Pair] = []
    for number, relation in enumerate(relations):
        where = image._replace(entry=f"hoi_annotation[{number}]")
        subject = where.number(relation, "subject_id", 0, len(things))
        target = where.number(relation, "object_id", -1, len(things))
        verb = where.number(relation, "category_id", 1, _HICO_VERBS + 1) - 1
        hoi = None
        if "hoi_category_id" in relation:
            hoi = where.number(relation, "hoi_category_id", 1, HICO_HOIS + 1) - 1
        box_o, category = things[target] if target >= 0 else (None, -1)
        pairs.append(_Pair(things[subject][0], box_o, category, verb, hoi))
    return _Image(image.image, pairs)


# UPT's files of HICO-DET


def _upt(file: _Where, content: dict[str, Any]) -> tuple[Iterator[_Image], HOIClasses]:
    classes = _upt_classes(file, content)
    images = file.columns(content, "filenames", "annotation", "size")
    return (_upt_image(file._replace(image=key), entry, size, classes) for key, entry, size in images), classes


def _upt_image(image: _Where, entry: Any, size: Any, classes: HOIClasses) -> _Image:
    if not (isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)):
        raise image.error(f"its size {size!r} is no [width, height]")
    pairs: list[_Pair] = []
    columns = image.columns(entry, "boxes_h", "boxes_o", "object", "verb", "hoi")
    for number, (box_h, box_o, target, verb, hoi) in enumerate(columns):
        where = image._replace(entry=f"pair {number}")
        pairs.append(
            _Pair(
                where.box(box_h, one_based=True),
                where.box(box_o, one_based=True),
                where.within("object", target, 0, len(classes.objects)),
                where.within("verb", verb, 0, len(classes.verbs)),
                where.within("hoi", hoi, 0, len(classes.hois)),
            )
        )
        if classes.hois[hoi] != (target, verb):
            raise where.error(
                f"hoi {hoi} is of object and verb {classes.hois[hoi]}, and the pair's are {(target, verb)}"
            )
    return _Image(image.image, pairs, (size[0], size[1]))


def _upt_classes(file: _Where, content: dict[str, Any]) -> HOIClasses:
    objects, verbs = (file.names(content, name) for name in ("objects", "verbs"))
    hois: dict[int, tuple[int, int]] = {}
    for number, row in enumerate(file.items(content, "correspondence")):
        where = file._replace(entry=f"correspondence, row {number}")
        if not (isinstance(row, list) and len(row) == 3):
            raise where.error(f"{row!r} is no [hoi, object, verb]")
        target, verb = where.within("object", row[1], 0, len(objects)), where.within("verb", row[2], 0, len(verbs))
        hois[where.within("hoi", row[0], 0, HICO_HOIS)] = target, verb
    if sorted(hois) != list(range(len(hois))):
        raise file.error("its correspondence leaves hoi classes out")
    ordered = tuple(hois[hoi] for hoi in range(len(hois)))
    with_verb = tuple(tuple(sorted({target for target, v in ordered if v == verb})) for verb in range(len(verbs)))
    return HOIClasses(objects, verbs, ordered, with_verb)


# V-COCO's files


def _vcoco(file: _Where, content: dict[str, Any]) -> tuple[Iterator[_Image], HOIClasses | None]:
    classes = _vcoco_classes(file, content)
    verbs = len(classes.verbs) if classes else 1 << 31
    objects = 1 + (len(classes.objects) if classes else len(COCO_91_TO_80))
    entries = content["annotations"]
    return (_vcoco_image(file._replace(image=each["file_name"]), each, verbs, objects) for each in entries), classes


def _vcoco_image(image: _Where, entry: dict[str, Any], verbs: int, objects: int) -> _Image:
    pairs: list[_Pair] = []
    columns = image.columns(entry, "boxes_h", "boxes_o", "objects", "actions")
    for number, (box_h, box_o, target, action) in enumerate(columns):
        where = image._replace(entry=f"pair {number}")
        category = where.within("object", target, 0, objects) - 1  # theirs is 0 for the background
        verb = where.within("action", action, 0, verbs)
        pairs.append(_Pair(where.box(box_h), where.box(box_o) if category >= 0 else None, category, verb, None))
    return _Image(image.image, pairs)


def _vcoco_classes(file: _Where, content: dict[str, Any]) -> HOIClasses | None:
    if not (content.get("classes") and content.get("objects")):
        return None
    objects, verbs = file.names(content, "objects"), file.names(content, "classes")
    with_verb: list[tuple[int, ...]] = []
    for number, row in enumerate(file.items(content, "action_to_object")):
        where = file._replace(entry=f"action_to_object, row {number}")
        if not isinstance(row, list):
            raise where.error(f"{row!r} is no list of objects")
        with_verb.append(tuple(sorted(where.within("object", each, 1, len(objects)) - 1 for each in row)))
    return HOIClasses(objects[1:], verbs, (), tuple(with_verb))


_READERS: dict[str, Callable[[_Where, Any], tuple[Iterator[_Image], HOIClasses | None]]] = {
    "hicodet": _hicodet,
    "upt": _upt,
    "vcoco": _vcoco,
}
