"""A detector's boxes, read from a file that is recognised by its structure, or from a mapping in memory.

A file is text: COCO's results, ``[{image_id, category_id, bbox: [x, y, width, height], score}]``, or one object an
image, ``{file_name, boxes: [[x1, y1, x2, y2], ...], labels, scores}``, in a list or as JSON Lines. Or it holds
``{file_name: {boxes, labels, scores}}`` of tensors or lists, by `torch.save` or `pickle.dump`, and by this of arrays; a
list of one such dict is read too, as in ``hicodet_train_bbox_R50.p``.

Boxes are xyxy in original pixels. Labels and scores may be absent.

COCO's category ids, 1 to 90, become the 80 classes from 0, of results alone, and unless an id that is none of COCO's,
or the categories of the annotation file, show that they are others. All other labels stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from patchbank.budget import without_collection
from patchbank.datasets.classes import COCO_91_TO_80, OBJECTS
from patchbank.errors import DatasetError
from patchbank.files import open_regular, parse_json, read_regular
from patchbank.regions import Region
from patchbank.unpickling import Opaque, PickleError, UnsafePickleError, refusals, short, shortlist

NO_LABEL = -1
_LABELS = 1 << 53  # labels are below this
_KNOWN = (
    "Expected: COCO results, a list of {image_id, category_id, bbox: [x, y, width, height], score}; JSON Lines of "
    "{file_name, boxes: [[x1, y1, x2, y2], ...], labels, scores}; or {file_name: {boxes, labels, scores}} by "
    "torch.save or pickle.dump."
)
_WINDOW = 1 << 20  # characters of JSON that are read at once
_LONGEST = 1 << 24  # characters of an entry
_BETWEEN = re.compile(r"[\s,]*")
_NUMBER = re.compile(r"(?:^|_)(\d+)$")  # at the end of an image's name
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's older files begin

Image = str | int  # a file name, or COCO's number of an image


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes in columns, image by image. Row by row:

    Attributes:
        source: where they were read, for messages.
        images: the images' names, or COCO's numbers, each once.
        owners: (N,) int64, ascending: the image, an index of `images`.
        numbers: (N,) int64: its place among all of the image's boxes, of which some may be left out.
        boxes: (N, 4) float64 xyxy, in original pixels, not checked.
        labels: (N,) int64; -1 without.
        scores: (N,) float64; NaN without.
        notes: what a user should know of the file, one sentence each.
    """

    source: str
    images: Sequence[Image]
    owners: NDArray[np.int64]
    numbers: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.owners)

    def of(self, rows: NDArray[Any] | slice) -> Detections:
        """Some of the rows."""
        columns = {name: getattr(self, name)[rows] for name in ("owners", "numbers", "boxes", "labels", "scores")}
        return replace(self, **columns)

    def regions(self) -> Iterator[tuple[int, str, Region]]:
        """(owner, ``box-N``, region) of each row."""
        columns = self.owners, self.numbers, self.boxes, self.labels, self.scores
        for owner, number, (x1, y1, x2, y2), label, score in zip(*(each.tolist() for each in columns), strict=True):
            label, score = None if label == NO_LABEL else label, None if score != score else score
            yield owner, f"box-{number}", Region((x1, y1, x2, y2), label, score)

    def chosen(
        self, min_score: float | None = None, classes: Iterable[int] | None = None, max_boxes: int | None = None
    ) -> Detections:
        """Boxes of at least this score, of these classes, and at most so many an image, the best ones.

        Raises DatasetError if none is left, or a class is negative.
        """
        keep = np.ones(len(self), np.bool_)
        if min_score is not None:
            keep &= self.scores >= min_score
        if classes is not None:
            classes = list(classes)
            if wrong := [each for each in classes if each < 0]:
                raise DatasetError(f"There is no class {wrong[0]}: classes are numbers from 0.")
            keep &= np.isin(self.labels, classes)
        rows = keep.nonzero()[0]
        if max_boxes is not None:
            worse = np.where(np.isnan(self.scores), np.inf, -self.scores)
            ordered = rows[np.lexsort((worse[rows], self.owners[rows]))]
            rows = np.sort(ordered[_counted(self.owners[ordered]) < max_boxes])
        if not len(rows):
            known = {"scores": not np.isnan(self.scores).all(), "labels": bool((self.labels != NO_LABEL).any())}
            lacking = "".join(f" They have no {name}." for name, some in known.items() if not some)
            raise DatasetError(
                f"{self.source}: none of the {len(self):,} boxes of these images has such a score and class.{lacking}"
            )
        return self.of(rows)

    def matched(self, keys: Sequence[str]) -> tuple[Detections, int]:
        """The boxes of these images, whose order they get, and the number of images with boxes that are none of these.

        COCO's numbers are those of the images' names: 9 is ``000000000009.jpg`` and ``COCO_val2014_000000000009.jpg``.

        Raises DatasetError if none of the images is one of these, or a number is that of several.
        """
        places = {key: place for place, key in enumerate(keys)}
        by_number = _by_number(keys) if any(isinstance(image, int) for image in self.images) else {}

        def place(image: Image) -> int:
            if isinstance(image, str):
                return places.get(image, -1)
            found = by_number.get(image, [])
            if len(found) > 1:
                raise DatasetError(
                    f"{self.source}: image_id {short(str(image))} could be {found[0]} and {found[1]}. Name the images "
                    "with --annotations, COCO's file of them."
                )
            return places[found[0]] if found else -1

        found = np.array([place(image) for image in self.images], np.int64)
        owners = found[self.owners]
        rows = np.argsort(owners, kind="stable")[np.count_nonzero(owners < 0) :]
        if not len(rows):
            raise DatasetError(
                f"{self.source} has no box of these images: it names {short(repr(self.images[0]))}, and they are named "
                f"{keys[0] if keys else 'nothing'!r}."
            )
        lacking = len(np.unique(self.owners[owners < 0]))
        return replace(self.of(rows), images=keys, owners=owners[rows]), lacking


@without_collection()
def read_detections(
    source: str | os.PathLike[str] | Mapping[str, Any], annotations: str | os.PathLike[str] | None = None
) -> Detections:
    """All boxes of a detector.

    Args:
        source: a file, as this module describes; or a mapping, image -> {boxes, labels, scores} of tensors, arrays or
            lists.
        annotations: COCO's file with ``images: [{id, file_name}]``, for results that number their images.

    Raises DatasetError, with file and entry, if anything is of another form. Nothing that a pickle names is run.
    """
    found = _Columns("the detections" if isinstance(source, Mapping) else str(source))
    if isinstance(source, Mapping):
        found.add_all(source, lambda value: value)
    else:
        with found.reported(), open_regular(Path(source).expanduser()) as file:
            start = file.read(len(_LEGACY))
            file.seek(0)
            if start.startswith((b"PK\x03\x04", b"\x80")):
                _read_pickle(found, Path(file.name), file, start)
            else:
                with io.TextIOWrapper(file, "utf-8-sig") as text:
                    for number, entry in enumerate(_objects(text), 1):
                        found.add_entry(number, entry)
    return found.detections(None if annotations is None else Path(annotations).expanduser())


class _Columns:
    """Boxes in the order of the file."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._places: dict[Image, int] = {}
        self._owners, self._labels = array("q"), array("q")
        self._boxes, self._scores = array("d"), array("d")
        self._coco = False

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Turn the errors of reading into DatasetErrors that name the file."""
        try:
            yield
        except OSError as error:
            raise DatasetError(f"The detections {self._source} cannot be read: {error.strerror or error}.") from error
        except UnsafePickleError as error:
            raise DatasetError(f"{self._source} cannot be read safely: {error}. {_KNOWN}") from None
        except PickleError as error:
            raise DatasetError(f"{self._source} cannot be read as a pickle: {error}. {_KNOWN}") from None
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{self._source} is not JSON of detections: {error}. {_KNOWN}") from None

    def add_all(self, value: Any, plain: Callable[[Any], Any], most: float = np.inf) -> None:
        """Add {image: {boxes, ...}}, or of each image a list of one dict.

        Args:
            plain: makes lists of the file's tensors.
            most: boxes, at most.
        """
        if not isinstance(value, Mapping):
            kind = getattr(value, "name", type(value).__name__)
            raise DatasetError(f"{self._source} holds a {kind}, and not a dict of images. {_KNOWN}")
        for image, entry in value.items():
            if isinstance(entry, list | tuple) and len(entry) == 1:
                (entry,) = entry
            if not isinstance(image, str) or not isinstance(entry, Mapping):
                raise self._error(short(repr(image)), "it is no dict with boxes")
            self._add(image, {name: plain(entry[name]) for name in ("boxes", "labels", "scores") if name in entry})
            if len(self._owners) > most:
                raise self._error(short(repr(image)), "it repeats the boxes of others")

    def add_entry(self, number: int, entry: Mapping[str, Any]) -> None:
        """Add an object of a text: an image's boxes, or one of COCO's results."""
        image = next((entry[name] for name in ("file_name", "image", "key", "image_id") if name in entry), None)
        where = f"entry {number}"
        if not isinstance(image, str | int) or isinstance(image, bool):
            raise self._error(where, f"its keys are {shortlist([*map(repr, entry)])}, and none names an image")
        if "bbox" not in entry:
            self._add(image, entry, where)
            return
        self._coco = True
        label, score = entry.get("category_id", NO_LABEL), entry.get("score")
        if type(label) is not int or not NO_LABEL <= label < _LABELS or type(score) not in (int, float, type(None)):
            raise self._error(where, f"its category_id is {label!r:.60}, its score {score!r:.60}")
        try:
            x, y, width, height = entry["bbox"]
            self._boxes.extend((x, y, x + width, y + height))
            self._scores.append(np.nan if score is None else score)
        except (TypeError, ValueError, OverflowError):
            raise self._error(where, f"its bbox is {str(entry['bbox'])[:60]}, its score {score!r:.60}") from None
        self._labels.append(label)
        self._owners.append(self._places.setdefault(image, len(self._places)))

    def _add(self, image: Image, entry: Mapping[str, Any], where: str = "") -> None:
        where = f"{where} ({short(str(image))})" if where else short(str(image))
        if "boxes" not in entry:
            raise self._error(where, f"it has no boxes, but {shortlist([*map(repr, entry)]) or 'nothing'}")
        boxes = self._numbers(where, "boxes", entry["boxes"], "iuf")
        if not boxes.size:
            boxes = boxes.reshape(0, 4)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise self._error(where, f"its boxes are of shape {boxes.shape}, not (n, 4)")
        columns = {}
        for name, kinds, absent in (("labels", "iu", NO_LABEL), ("scores", "iuf", np.nan)):
            if (value := entry.get(name)) is None:
                columns[name] = np.full(len(boxes), absent)
                continue
            columns[name] = self._numbers(where, name, value, kinds)
            if columns[name].shape != boxes.shape[:1]:
                raise self._error(where, f"it has {name} of shape {columns[name].shape} for {len(boxes)} boxes")
        if not ((columns["labels"] >= NO_LABEL) & (columns["labels"] < _LABELS)).all():
            raise self._error(where, "its labels are negative, or larger than any")
        self._boxes.frombytes(boxes.astype(np.float64).tobytes())
        self._labels.frombytes(columns["labels"].astype(np.int64).tobytes())
        self._scores.frombytes(columns["scores"].astype(np.float64).tobytes())
        owner = self._places.setdefault(image, len(self._places))
        self._owners.frombytes(np.full(len(boxes), owner, np.int64).tobytes())

    def _numbers(self, where: str, name: str, value: Any, kinds: str) -> NDArray[Any]:
        """A tensor, an array or nested lists, as an array."""
        try:
            found = np.array(value.tolist() if hasattr(value, "tolist") else value)
        except (ValueError, OverflowError):
            raise self._error(where, f"its {name} are not of one length, or too large") from None
        if found.size and found.dtype.kind not in kinds:
            raise self._error(where, f"its {name} are not {'whole ' if kinds == 'iu' else ''}numbers")
        return found

    def _error(self, where: str, what: str) -> DatasetError:
        return DatasetError(f"{self._source}: {where}: {what}. {_KNOWN}")

    def detections(self, annotations: Path | None) -> Detections:
        """All boxes, image by image. Raises DatasetError if there are none, or an image's name is not known."""
        if not self._owners:
            raise DatasetError(f"{self._source} has no boxes. {_KNOWN}")
        names, coco = dict[int, str](), self._coco
        if annotations is not None:
            names, only = _read_images(annotations)
            coco = coco and only
        images: list[Image] = []
        for image in self._places:
            if isinstance(image, int) and annotations is not None:
                if image not in names:
                    raise DatasetError(
                        f"{self._source}: image_id {short(str(image))} is none of the images in {annotations}."
                    )
                image = names[image]
            images.append(image)
        owners, labels = np.frombuffer(self._owners, np.int64), np.frombuffer(self._labels, np.int64)
        notes: tuple[str, ...] = ()
        if coco and len(others := np.setdiff1d(labels, [NO_LABEL, *COCO_91_TO_80])):
            notes = (f"category_id {others[0]} is none of COCO's, so all labels are {self._source}'s own numbers.",)
        elif coco:
            classes = np.full(92, NO_LABEL)
            classes[list(COCO_91_TO_80)] = list(COCO_91_TO_80.values())
            labels = classes[labels]
        boxes, scores = np.frombuffer(self._boxes).reshape(-1, 4), np.frombuffer(self._scores)
        found = Detections(self._source, images, owners, owners, boxes, labels, scores, notes)
        if (owners[1:] < owners[:-1]).any():
            found = found.of(np.argsort(owners, kind="stable"))
        return replace(found, numbers=_counted(found.owners))


def _counted(owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of ascending values, each one's place among its equals."""
    return np.arange(len(owners)) - np.searchsorted(owners, owners)


def _by_number(keys: Iterable[str]) -> dict[int, list[str]]:
    """The numbers at the end of images' names -> the names."""
    found: dict[int, list[str]] = {}
    for key in keys:
        if match := _NUMBER.search(Path(key).stem):
            found.setdefault(int(match[1]), []).append(key)
    return found


class _Named(msgspec.Struct, gc=False):
    id: int
    file_name: str


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str = ""


class _Images(msgspec.Struct):
    images: list[_Named]
    categories: list[_Category] = []


def _read_images(path: Path) -> tuple[dict[int, str], bool]:
    """The names of images by their numbers, and whether the categories are COCO's, as far as the file says."""
    try:
        found = parse_json(read_regular(path), _Images)
    except OSError as error:
        raise DatasetError(f"The annotation file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} does not name COCO's images, images: [{{id, file_name}}]: {error}.") from None
    coco = all(
        each.id in COCO_91_TO_80 and each.name in ("", OBJECTS[COCO_91_TO_80[each.id]]) for each in found.categories
    )
    return {each.id: each.file_name for each in found.images}, coco


def _objects(text: io.TextIOWrapper) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, or of a text of one after the other; no more than a window of it is in memory.

    Raises ValueError if it is anything else.
    """
    decode = json.JSONDecoder().raw_decode
    window = text.read(_WINDOW)
    at = len(window) - len(window.lstrip())
    listed = window[at : at + 1] == "["
    at += listed
    number = 0
    while True:
        at = _BETWEEN.match(window, at).end()  # type: ignore[union-attr]
        if window[at : at + 1] == "{":
            try:
                value, at = decode(window, at)
            except json.JSONDecodeError as error:
                if len(window) - at > _LONGEST or not (more := text.read(_WINDOW)):
                    raise ValueError(f"entry {number + 1}: {error.msg}, or it ends early") from None
                window, at = window[at:] + more, 0
            else:
                number += 1
                yield value
        elif at < len(window):
            if listed and window[at] == "]" and not (window[at + 1 :] + text.read()).strip():
                return
            raise ValueError(f"entry {number + 1} begins with {window[at : at + 20]!r}, and not with {{")
        elif more := text.read(_WINDOW):
            window, at = more, 0
        elif listed:
            raise ValueError("the list has no end: was its download cut short?")
        else:
            return


def _read_pickle(found: _Columns, path: Path, file: BinaryIO, start: bytes) -> None:
    """Add the boxes of a pickle, image by image, or of a file of `torch.save`."""
    import torch

    from patchbank.array_pickles import ARRAY_NAMES, Array, ArrayPickle
    from patchbank.torch_files import Entries, numbers_of
    from patchbank.torch_pickles import TENSOR_NAMES, Storage, View, plain_names, read_legacy

    size = os.fstat(file.fileno()).st_size  # there are no more instructions, and no more boxes, than bytes

    @lru_cache(8)  # tensors may be parts of one storage
    def legacy(storage: Storage) -> torch.Tensor:
        file.seek(places[storage.key])
        return numbers_of(file, storage)

    def held(storage: Storage) -> torch.Tensor:
        if storage.numbers is None:
            raise PickleError("it holds a tensor without numbers")
        return torch.frombuffer(bytearray(storage.numbers), dtype=torch.uint8)

    def plain(value: Any) -> Any:
        if isinstance(value, View):
            return value.of(read(value.storage)).tolist() if 0 not in value.size else []
        if isinstance(value, Array) and value.dtype is not None:
            return arrays.read(value).tolist() if 0 not in value.shape else []
        if isinstance(value, Opaque):
            raise PickleError(f"it holds a {short(value.name)}, and tensors are needed")
        # A list in lists may hold itself, or more values than the file has bytes.
        rows = value if type(value) in (list, tuple) else [value]
        if value is not None and not all(
            type(each) in (int, float) for row in rows for each in (row if _is_row(row) else [row])
        ):
            raise PickleError("it holds a list of other things than numbers or boxes")
        return value

    read: Callable[[Storage], torch.Tensor] = held
    with refusals(), ArrayPickle(path) as arrays:
        if start.startswith(b"PK"):
            entries = Entries(file, size)
            value, read = entries.value(TENSOR_NAMES.get, size), lru_cache(8)(entries.numbers)
            found.add_all(value, plain, size)
        elif start == _LEGACY:
            value, places = read_legacy(file, TENSOR_NAMES.get, size, size)
            read = legacy
            found.add_all(value, plain, size)
        else:
            tensors = plain_names(size, arrays.bytes_of)
            arrays.scan(
                lambda image, entry: found.add_all({image: entry}, plain, size),
                names=lambda name: tensors(name) or ARRAY_NAMES.get(name),
            )


def _is_row(value: Any) -> bool:
    return type(value) in (list, tuple) and len(value) == 4
