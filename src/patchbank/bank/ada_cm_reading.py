"""ADA-CM's file of pairs, whoever wrote it: is it sound, and a bank made of it. Nothing that it names is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchbank.array_pickles import Array, ArrayPickle, shown
from patchbank.bank.ada_cm import FIELDS, REGIONS
from patchbank.bank.check import KINDS, Defects, Finding, Progress, Report
from patchbank.bank.convert import Imported, transfer
from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Feature
from patchbank.datasets.boxes import digest_of
from patchbank.datasets.hoi import HOIAnnotations
from patchbank.datasets.samples import NOT_PLAIN, Failure
from patchbank.errors import BankError
from patchbank.files import is_plain
from patchbank.regions import (
    HUMAN,
    IMAGE,
    OBJECT,
    PERSON,
    UNION,
    Region,
    image_of,
    name_of,
    pair_name,
    pair_of,
    region_key,
)
from patchbank.unpickling import PickleError, UnsafePickleError, short, shortlist

_ROUNDING = 2.0**-9  # relative; three roundings to float16, where other code scales boxes in it too
_NAMES = {IMAGE: "global_feature", **{kind: features for kind, (_, features) in REGIONS.items()}}
_UNIT = 2e-3  # how far float16 moves a norm of 1, at most
_LONGEST = 1000  # characters of an image's name
_FILLED, _MANY = 0.9, 100  # so much of their input's side is reached by the boxes of so many images
_CLASSES = 1 << 16  # of a kind, at most
_NUMBERS = {"float16": "f", "int64": "iu"}  # the kinds of dtype that can become this one

Arrays = Mapping[str, NDArray[Any]]
Take = Callable[[str, Mapping[str, Array]], None]


@dataclass
class PairsReport(Report):
    """What `verify_pairs` found. `bank` is the file, `looked_at` the number of images, `shape` most features' (D,).

    Attributes:
        pairs: how many there are.
        reach: the greatest coordinate of an image's boxes, the median of all images': their input is not smaller.
        furthest: the greatest of all boxes: of many images, their input is hardly larger.
        input: (width, height) of that input in pixels; None if there was nothing to compare with.
    """

    pairs: int = 0
    reach: float = 0.0
    furthest: float = 0.0
    input: tuple[int, int] | None = None


def verify_pairs(
    path: Path, annotated: HOIAnnotations | None = None, progress: Progress | None = None, take: Take | None = None
) -> PairsReport:
    """Read and examine every array of ADA-CM's file. Writes nothing; memory is bounded by one image's pairs.

    Args:
        annotated: the pairs that it should hold; None compares with none.
        progress: called with the bytes that were read, and all.
        take: called with each usable image, and its arrays.

    Raises BankError if the file cannot be read.
    """
    report = PairsReport(path, None, None)
    widths: dict[int, list[str]] = {}
    inputs: dict[tuple[int, int], list[str]] = {}
    reaches: list[float] = []

    def examine(image: str, value: Any) -> None:
        report.looked_at += 1
        plain = is_plain(image) and len(image) <= _LONGEST
        defects = _array_defects(value) if plain else [("arrays", NOT_PLAIN)]
        if not _unusable(defects):
            arrays = {name: file.read(value[name]) for name in FIELDS}
            defects += _number_defects(arrays)
            report.pairs += len(arrays["verbs"])
            widths.setdefault(arrays["global_feature"].size, []).append(image)
            if not _unusable(defects):
                reaches.append(float(arrays["union_boxes"].max(initial=0)))
                if annotated is not None and image in annotated.rows:
                    defects += _row_defects(arrays, annotated, image, inputs)
        if take is not None and not _unusable(defects):
            take(image, value)
        if plain:
            report.sound.append(image)
        report.findings += [Finding(kind, image if plain else short(image), detail) for kind, detail in defects]

    try:
        with ArrayPickle(path) as file:
            file.scan(examine, progress)
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnsafePickleError as error:
        report.findings.append(Finding("unsafe", path.name, str(error)))
    except PickleError as error:
        report.findings.append(Finding("unreadable", path.name, str(error)))
    report.reach, report.furthest = (median_low(reaches), max(reaches)) if reaches else (0.0, 0.0)
    width = _usual(report, "shape", "its features are {} wide, and most are {}", widths)
    report.shape = None if width is None else (width,)
    report.input = _usual(report, "rows", "its boxes are in an input of {} pixels, and most in one of {}", inputs)
    if annotated is not None:
        found = set(report.sound)
        wanted = [image for image, rows in annotated.rows.items() if len(rows)]
        report.listed = len(wanted)
        report.findings += [Finding("missing", image) for image in wanted if image not in found]
        unknown = found - annotated.rows.keys() - {finding.name for finding in report.findings}
        report.findings += [Finding("extra", image) for image in unknown]
    report.sort()
    return report


def _unusable(defects: Defects) -> bool:
    return any(KINDS[kind].fix == "extract" for kind, _ in defects)


def _usual(report: Report, kind: str, text: str, images: Mapping[Any, list[str]]) -> Any:
    """What most images have; a finding for each of the others. None if there are no images."""
    usual = max(images, key=lambda value: len(images[value]), default=None)
    for value, names in images.items():
        if value != usual:
            report.findings += [Finding(kind, name, text.format(value, usual)) for name in names]
    return usual


def _array_defects(value: Any) -> Defects:
    """What is wrong with an image's dict, but for the numbers."""
    if type(value) is not dict:
        return [("arrays", f"it is {shown(value)}, and not a dict of arrays")]
    if missing := [name for name in FIELDS if name not in value]:
        others = shortlist([name for name in value if name not in FIELDS])
        return [("arrays", f"there is no {', '.join(missing)}" + (f", and there is {others}" if others else ""))]
    defects: Defects = []
    sizes: dict[object, int] = {}  # K and D, as the first array that has them
    for name, (dtype, shape) in FIELDS.items():
        array = value[name]
        if not isinstance(array, Array) or array.dtype is None or array.dtype.kind not in _NUMBERS[dtype]:
            return [("arrays", f"{name} is {shown(array)}, and not an array of {dtype}")]
        if len(array.shape) == len(shape):
            sizes = dict(zip(shape, array.shape, strict=True)) | sizes
        expected = tuple(size if isinstance(size, int) else sizes.get(size, size) for size in shape)
        if array.shape != expected:
            return [("shape", f"{name} is {array.shape}, and not {expected}".replace("'", ""))]
        if array.dtype.name != dtype:
            defects.append(("dtype", f"{name} is {array.dtype.name}, and not {dtype}"))
    return defects


def _number_defects(arrays: Arrays) -> Defects:
    for name, (dtype, _) in FIELDS.items():
        if dtype == "float16" and (count := int((~np.isfinite(arrays[name])).sum())):
            return [("not-finite", f"{count:,} of {arrays[name].size:,} numbers of {name}")]
        least, most = (1, 1 << 31) if name == "size_orig" else (0, _CLASSES - 1)
        if dtype == "int64" and len(wrong := arrays[name][(arrays[name] < least) | (arrays[name] > most)]):
            return [("arrays", f"{name} has the number {wrong[0]}")]
    for name, _ in REGIONS.values():
        swapped = (arrays[name][:, 2:] < arrays[name][:, :2]).any(axis=1)
        if swapped.any():
            return [("arrays", f"the corners of box {int(swapped.argmax())} of {name} are swapped")]
    for name in _NAMES.values():
        if count := int((~arrays[name].any(axis=-1)).sum()):
            return [("zero", f"{count:,} of {np.atleast_2d(arrays[name]).shape[0]:,} rows of {name}")]
    for name in _NAMES.values():
        norms = np.linalg.norm(np.atleast_2d(arrays[name]).astype(np.float32), axis=1)
        if len(norms) and (np.abs(norms - 1) < _UNIT).all():
            return [("normalised", f"every row of {name} has the norm 1")]
    return []


def _row_defects(
    arrays: Arrays, annotated: HOIAnnotations, image: str, inputs: dict[tuple[int, int], list[str]]
) -> Defects:
    """Where rows differ from the annotated pairs. Adds the image to those with boxes in an input of the same size."""
    rows = slice(annotated.rows[image].start, annotated.rows[image].stop)
    if (count := len(arrays["verbs"])) != rows.stop - rows.start:
        return [("rows", f"it has {count:,} pairs, and {rows.stop - rows.start:,} are annotated")]
    height, width = arrays["size_orig"].tolist()
    if annotated.sizes.get(image, (width, height)) != (width, height):
        return [("rows", f"its size is {width} x {height}, and {annotated.sizes[image]} is annotated")]
    columns = {"verbs": annotated.verb, "objects": annotated.object, "hois": annotated.hoi}
    for name, column in columns.items():
        if column is not None and (wrong := arrays[name] != column[rows]).any():
            first = int(wrong.argmax())
            return [("rows", f"pair {first} has {arrays[name][first]} in {name}; annotated is {column[rows][first]}")]
    unions = annotated.unions[rows].astype(np.float64)
    boxes: dict[str, NDArray[Any]] = {
        "boxes_h": annotated.boxes_h[rows],
        "boxes_o": annotated.boxes_o[rows],
        "union_boxes": unions,
    }
    # The file does not say in which input its boxes are. Of all numbers together, rounding leaves a whole pixel.
    shares = unions / _corners(width, height)
    in_image, in_input = (each.reshape(-1, 2).sum(axis=0) for each in (shares, arrays["union_boxes"].astype(float)))
    side = np.rint(in_input / np.where(in_image > 0, in_image, 1)).astype(int)
    scale = _corners(*side) / _corners(width, height)
    for name, box in boxes.items():
        found, expected = arrays[name].astype(np.float64), box.astype(np.float64) * scale
        wrong = (abs(found - expected) > _ROUNDING * np.maximum(abs(expected), 1)).any(axis=1)
        if wrong.any():
            first = int(wrong.argmax())
            return [
                ("rows", f"pair {first} has {_text(found[first])} in {name}; annotated is {_text(expected[first])}")
            ]
    inputs.setdefault((int(side[0]), int(side[1])), []).append(image)
    return []


def _corners(width: float, height: float) -> NDArray[np.float64]:
    return np.array([width, height] * 2, np.float64)


def _text(box: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{each:g}" for each in box.round(2).tolist()) + ")"


def import_pairs(
    source: Path,
    target: Path,
    wanted: Manifest,
    annotated: HOIAnnotations | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    writing: Progress | None = None,
    stop: Event | None = None,
) -> Imported:
    """Make a bank of regions of ADA-CM's file: its keys are those of `patchbank.datasets.boxes.annotated_pairs`.

    Boxes are scaled back to original pixels, as exactly as float16 holds them. Images with unusable arrays are left
    out. In memory are the keys of all regions, and where each array lies.

    Args:
        wanted: the new bank's manifest, of one output that is a vector.
        annotated: the pairs that the file should hold; None compares with none.
        overwrite: as in `patchbank.bank.convert.convert`.
        progress, writing: called with the bytes of the file that were read, or the features written, and all.
        stop: set it to end early; the same call continues.

    Raises BankError if nothing is usable, the features' width or the boxes are not the model's; or as `convert`.
    """
    found: dict[str, Mapping[str, Array]] = {}
    report = verify_pairs(source, annotated, progress, found.__setitem__)
    left_out = [finding for finding in report.findings if KINDS[finding.kind].fix == "extract"]
    if broken := next((finding for finding in left_out if finding.kind in ("unsafe", "unreadable")), None):
        raise BankError(f"{source} is not ADA-CM's file of pairs: {broken.detail}. Nothing was written.")
    for finding in left_out:
        found.pop(finding.name, None)
    if not found:
        first = f" {short(left_out[0].name)}: {left_out[0].reason}." if left_out else " It is empty."
        raise BankError(f"{source} has no usable image; nothing was written.{first}")
    (height, width), ((name, output),) = wanted.input.size, wanted.outputs.items()
    if report.shape != output.shape:
        raise BankError(
            f"The features in {source} are {report.shape} and {name} of {wanted.model} is {output.shape}; nothing was "
            "written. Give the --model that made them."
        )
    side, known = max(width, height), ""
    if report.input is not None:
        known = "" if report.input == (width, height) else "of {} x {}".format(*report.input)
    elif report.reach > side * (1 + _ROUNDING):
        known = f"of {report.reach:g} or more"
    elif report.furthest < _FILLED * side:
        if len(found) >= _MANY:
            known = f"of about {report.furthest:g}"
        wanted = replace(wanted, imported=f"{wanted.imported}, whose boxes reach {report.furthest:g} of {side} pixels")
    if known:
        raise BankError(
            f"{source} has boxes in an input {known} pixels, and the input of {wanted.model} is {width} x {height}; "
            "nothing was written. Give the --model that made them, or its --input-size."
        )
    with ArrayPickle(source) as file:

        def region(key: str) -> Region:
            kind, row = _place(key)
            return _region(file, found[image_of(key)], kind, row, _corners(width, height))

        def read(key: str) -> Feature | Failure:
            kind, row = _place(key)
            arrays = found[image_of(key)]
            try:
                feature = file.read(arrays[_NAMES[kind]], None if kind == IMAGE else row)
                tall, wide = file.read(arrays["size_orig"]).tolist()
                return Feature(key, {name: torch.from_numpy(feature)}, (wide, tall), region(key))
            except (OSError, PickleError) as error:
                return Failure(key, f"{source.name} cannot be read any more: {error}")

        keys = [key for image, arrays in found.items() for key in _keys(image, arrays["verbs"].shape[0])]
        try:
            wanted = replace(wanted, regions=digest_of((key, region(key)) for key in keys))
        except (OSError, PickleError) as error:
            raise BankError(f"{source} cannot be read any more: {error}.") from error
        written = transfer(target, wanted, keys, read, set(), overwrite, writing, stop)
    return Imported(written, [finding for finding in report.findings if finding.kind == "dtype"], left_out)


def _keys(image: str, count: int) -> Iterator[str]:
    yield region_key(image, IMAGE)
    for number in range(count):
        for kind in (HUMAN, OBJECT, UNION):
            yield region_key(image, pair_name(kind, number))


def _place(key: str) -> tuple[str, int]:
    """The kind of a region, and its pair's row."""
    return pair_of(name_of(key)) or (IMAGE, 0)


def _region(file: ArrayPickle, arrays: Mapping[str, Array], kind: str, row: int, scale: NDArray[np.float64]) -> Region:
    """A region with its box in original pixels. Raises OSError, PickleError."""
    if kind == IMAGE:
        return Region()
    height, width = file.read(arrays["size_orig"]).tolist()
    box = file.read(arrays[REGIONS[kind][0]], row).astype(np.float64) * _corners(width, height) / scale
    label, verb, hoi = (int(file.read(arrays[name], row)) for name in ("objects", "verbs", "hois"))
    return Region(
        tuple(box.tolist()),
        PERSON if kind == HUMAN else label,
        verb=verb if kind == UNION else None,
        hoi=hoi if kind == UNION else None,
    )
