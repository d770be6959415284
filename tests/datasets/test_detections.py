"""A detector's files, each in the structure that its program writes: read alike, chosen from, matched with images."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchbank import Dataset, load_boxes
from patchbank.config import Partition
from patchbank.datasets import boxes, detections
from patchbank.datasets.boxes import digest
from patchbank.datasets.detections import read_detections
from patchbank.datasets.samples import make_samples
from patchbank.errors import DatasetError
from patchbank.regions import Region
from tests.third_party import Call

NAMES = ["COCO_val2014_000000000009.jpg", "COCO_val2014_000000000025.jpg", "COCO_val2014_000000000030.jpg"]
# Image -> rows of x, y, width, height, COCO's category, score; of halves, which every format keeps.
ROWS = {
    NAMES[2]: [(10.5, 20, 30, 40, 1, 0.5), (0, 0, 8, 8, 90, 0.25), (1, 2, 3.5, 4, 18, 0.875)],
    NAMES[0]: [(5, 6, 7, 8, 13, 0.75)],
}
EIGHTY = {1: 0, 90: 79, 18: 16, 13: 11}


def corners(rows: list[Any]) -> list[list[float]]:
    return [[x, y, x + width, y + height] for x, y, width, height, *_ in rows]


def tensors(rows: list[Any]) -> dict[str, Any]:
    return {
        "boxes": torch.tensor(corners(rows)),
        "labels": torch.tensor([EIGHTY[row[4]] for row in rows]),
        "scores": torch.tensor([row[5] for row in rows]),
    }


def results(**names: Callable[[str], Any]) -> list[dict[str, Any]]:
    """COCO's results, images mixed; each image named in these ways."""
    every = [(name, row) for name, rows in ROWS.items() for row in rows]
    return [
        {each: of(name) for each, of in names.items()} | {"category_id": row[4], "bbox": row[:4], "score": row[5]}
        for name, row in (every[0], every[3], *every[1:3])
    ]


def number(name: str) -> int:
    return int(name.split("_")[-1].removesuffix(".jpg"))


def images(*names: str) -> Dataset:
    return Dataset("folder", None, Path("images"), make_samples(names or NAMES, Path("images"), Path("images")))


def as_json(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(value)) and None  # type: ignore[func-returns-value]


def as_lines(*names: str) -> Callable[[Path], None]:
    objects = [
        dict(zip(names, (name, corners(rows), [EIGHTY[row[4]] for row in rows], [row[5] for row in rows]), strict=True))
        for name, rows in ROWS.items()
    ]
    return lambda path: path.write_text("".join(f"{json.dumps(each)}\n" for each in objects)) and None  # type: ignore[func-returns-value]


def dumped(protocol: int, arrays: bool = False) -> Callable[[Path], None]:
    """As hicodet_train_bbox_R50.p, of arrays: with hidden states, in a list."""
    value: dict[str, Any] = {}
    for name, rows in ROWS.items():
        columns = tensors(rows) | {"hidden_states": torch.randn(len(rows), 256)}
        value[name] = [{each: np.asfortranarray(column) if arrays else column for each, column in columns.items()}]
    return lambda path: path.write_bytes(pickle.dumps(value, protocol)) and None  # type: ignore[func-returns-value]


def saved(**options: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({name: tensors(rows) for name, rows in ROWS.items()}, path, **options)


def parts_of_one_storage(path: Path) -> None:
    every = tensors([row for rows in ROWS.values() for row in rows])
    parts = {name: value.split([3, 1]) for name, value in every.items()}
    torch.save({image: {name: parts[name][row] for name in parts} for row, image in enumerate(ROWS)}, path)


FORMATS = {
    "COCO results": as_json(results(image_id=number)),
    "COCO results with names": as_json(results(image_id=number, file_name=str)),
    "JSON Lines": as_lines("file_name", "boxes", "labels", "scores"),
    "JSON Lines by key": as_lines("key", "boxes", "labels", "scores"),
    "pickle, protocol 2": dumped(2),
    "pickle, protocol 4": dumped(4),
    "pickle of arrays, protocol 2": dumped(2, arrays=True),
    "pickle of arrays, protocol 4": dumped(4, arrays=True),
    "pickle of arrays, protocol 5": dumped(5, arrays=True),
    "torch.save": saved(),
    "torch.save, older": saved(_use_new_zipfile_serialization=False),
    "torch.save, parts of one storage": parts_of_one_storage,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    FORMATS[name](path := tmp_path / "detections")
    found = load_boxes(images(), path)
    expected = [
        (f"{image}#box-{place}", Region(tuple(box), EIGHTY[row[4]], row[5]))
        for image in (NAMES[0], NAMES[2])  # the dataset's order
        for place, (row, box) in enumerate(zip(ROWS[image], corners(ROWS[image]), strict=True))
    ]
    assert [(each.key, each.region) for each in found] == expected
    assert [each.position for each in found] == [0, 1, 2, 3]
    assert (found.name, found.notes) == ("boxes", ())


def test_mappings_in_memory() -> None:
    expected = list(load_boxes(images(), {name: tensors(rows) for name, rows in ROWS.items()}))
    arrays = {name: {each: value.numpy() for each, value in tensors(rows).items()} for name, rows in ROWS.items()}
    lists = {name: {each: value.tolist() for each, value in tensors(rows).items()} for name, rows in ROWS.items()}
    trained = {
        name: [{each: value.requires_grad_(value.is_floating_point()) for each, value in tensors(rows).items()}]
        for name, rows in ROWS.items()
    }
    for mapping in (arrays, lists, trained):
        assert list(load_boxes(images(), mapping)) == expected


def test_labels_and_scores_may_be_absent(tmp_path: Path) -> None:
    (path := tmp_path / "boxes.jsonl").write_text(
        '{"image": "a.jpg", "boxes": [[1, 2, 3, 4]]}\n\n{"key": "b.jpg", "boxes": []}'
    )
    [sample] = load_boxes(images("b.jpg", "a.jpg"), path)
    assert (sample.key, sample.region) == ("a.jpg#box-0", Region((1, 2, 3, 4)))


def test_images_of_results_are_named_by_cocos_file(tmp_path: Path) -> None:
    as_json(results(image_id=number))(path := tmp_path / "results.json")
    listed = {"images": [{"id": number(name), "file_name": f"val/{name}", "width": 640} for name in NAMES]}
    (annotations := tmp_path / "instances.json").write_text(json.dumps(listed))
    found = load_boxes(images(*(f"val/{name}" for name in NAMES)), path, annotations=annotations)
    assert [each.image for each in found] == [f"val/{NAMES[0]}"] + 3 * [f"val/{NAMES[2]}"]
    annotations.write_text(json.dumps({"images": listed["images"][:1]}))
    with pytest.raises(DatasetError, match="image_id 30 is none of the images in"):
        load_boxes(images(), path, annotations=annotations)
    annotations.write_text(json.dumps([1]))
    with pytest.raises(DatasetError, match=r"instances.json does not name COCO's images"):
        load_boxes(images(), path, annotations=annotations)


def test_other_categories_than_cocos_stay_as_they_are(tmp_path: Path) -> None:
    def labels(ids: list[int], annotations: Path | None = None) -> list[int | None]:
        (path := tmp_path / "results.json").write_text(
            json.dumps([{"image_id": "a.jpg", "category_id": each, "bbox": [0, 0, 1, 1]} for each in ids])
        )
        return [each.region.label for each in load_boxes(images("a.jpg"), path, annotations=annotations) if each.region]

    assert labels([1, 2, 90]) == [0, 1, 79]
    assert labels([1, 2, 12]) == [1, 2, 12]  # COCO has no 12
    assert "category_id 12 is none of COCO's" in read_detections(tmp_path / "results.json").notes[0]
    for name, expected in (("person", 0), ("cat", 1)):
        (own := tmp_path / "own.json").write_text(json.dumps({"images": [], "categories": [{"id": 1, "name": name}]}))
        assert labels([1], own) == [expected]


def test_a_number_of_two_images_is_ambiguous(tmp_path: Path) -> None:
    as_json(results(image_id=number))(path := tmp_path / "results.json")
    assert len(load_boxes(images("000000000009.jpg", "9_1.jpg"), path)) == 1
    with pytest.raises(DatasetError, match=r"image_id 9 could be a/9\.jpg and 000000000009\.jpg\. Name .* annotations"):
        load_boxes(images("a/9.jpg", "000000000009.jpg"), path)


@pytest.fixture
def mapping() -> dict[str, Any]:
    """Two images; scores of the first are not in order."""
    return {
        "a.jpg": {"boxes": np.eye(4) + 1, "scores": [0.2, 0.9, 0.2, 0.5], "labels": [0, 1, 0, 17]},
        "b.jpg": {"boxes": [[0, 0, 1, 1]], "scores": [0.1], "labels": [1]},
    }


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "a0 a1 a2 a3 b0"),
        ({"min_score": 0.2}, "a0 a1 a2 a3"),
        ({"min_score": 0.3}, "a1 a3"),
        ({"classes": [1, 17]}, "a1 a3 b0"),
        ({"max_boxes": 1}, "a1 b0"),
        ({"max_boxes": 3}, "a0 a1 a3 b0"),  # of equal scores, the first
        ({"max_boxes": 1, "classes": [0]}, "a0"),
        ({"min_score": 0.1, "classes": [1], "max_boxes": 1}, "a1 b0"),
    ],
)
def test_what_is_left_out_renames_nothing(mapping: dict[str, Any], options: dict[str, Any], names: str) -> None:
    every = load_boxes(images("a.jpg", "b.jpg"), mapping)
    found = load_boxes(images("a.jpg", "b.jpg"), mapping, **options)
    assert " ".join(each.key.replace(".jpg#box-", "") for each in found) == names
    assert {each.key: each.region for each in every}.items() >= {each.key: each.region for each in found}.items()


def test_nothing_left_is_an_error(mapping: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"none of the 5 boxes of these images has such a score and class\.$"):
        load_boxes(images("a.jpg", "b.jpg"), mapping, min_score=0.95)
    with pytest.raises(DatasetError, match=r"They have no scores\. They have no labels"):
        load_boxes(images("a.jpg"), {"a.jpg": {"boxes": [[0, 0, 1, 1]]}}, classes=[0])
    with pytest.raises(DatasetError, match="no class -1: classes are numbers from 0"):
        load_boxes(images("a.jpg"), {"a.jpg": {"boxes": [[0, 0, 1, 1]]}}, classes=[-1])


def test_images_that_the_dataset_lacks_are_counted(mapping: dict[str, Any]) -> None:
    found = load_boxes(images("b.jpg"), mapping)
    assert [each.key for each in found] == ["b.jpg#box-0"]
    assert found.notes == ("Left out: the boxes of 1 image that the detections names and images lacks.",)
    with pytest.raises(DatasetError, match=r"it names 'a\.jpg', and they are named 'c\.png'"):
        load_boxes(images("c.png"), mapping)


def test_boxes_are_of_whole_datasets_of_images(mapping: dict[str, Any]) -> None:
    found = load_boxes(images("a.jpg", "b.jpg"), mapping)
    for dataset in (found, replace(images("a.jpg"), part=Partition(0, 2))):
        with pytest.raises(DatasetError, match="load the whole dataset"):
            load_boxes(dataset, mapping)


def test_samples_made_on_access_are_those_of_a_tuple(mapping: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "_AT_ONCE", 2)
    found = load_boxes(images("a.jpg", "b.jpg"), mapping).samples
    every = tuple(found)
    assert len(found) == len(every) == 5
    for part in (slice(None), slice(1, 4), slice(3), slice(4, 1, -2), slice(7, 9)):
        assert (tuple(found[part]), len(found[part])) == (every[part], len(every[part]))
        assert tuple(found[1:][part]) == every[1:][part]
    assert [found[place] for place in (0, 4, -1)] == [every[place] for place in (0, 4, -1)]
    with pytest.raises(IndexError):
        found[5]
    assert pickle.loads(pickle.dumps(found[1:3])) == every[1:3]
    assert digest(found) == digest(every) != digest(every[:4])


def test_the_digest_tells_boxes_without_numbers_apart() -> None:
    def of(**columns: Any) -> str:
        return digest(load_boxes(images("a.jpg"), {"a.jpg": {"boxes": [[0, 0, 1, 1]], **columns}}))

    assert len({of(), of(labels=[0]), of(scores=[0.0]), of(boxes=[[0, 0, 1, float("nan")]])}) == 4


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
def test_the_size_of_windows_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(detections, "_WINDOW", window)
    entries = [
        {"image_id": 'ü {["].jpg', "bbox": [n, 0.25, 3, 4], "segmentation": {"counts": "}{\\"}} for n in range(9)
    ]
    for indent in (None, 1):
        (path := tmp_path / "results.json").write_text(json.dumps(entries, indent=indent, ensure_ascii=False) + "\n")
        assert read_detections(path).boxes[:, 0].tolist() == list(range(9))


def test_numbers_that_are_none_are_read(tmp_path: Path) -> None:
    (path := tmp_path / "results.json").write_text(
        '[{"image_id": 1, "bbox": [NaN, 0, 1, Infinity], "score": NaN}, {"image_id": 1, "bbox": [0, 0, 1, 1]}]'
    )
    assert str(read_detections(path).boxes[0].tolist()) == "[nan, 0.0, nan, inf]"
    assert [region.score for _, _, region in read_detections(path).regions()] == [None, None]
    torch.save({"a.jpg": {"boxes": torch.tensor([[0, 0, 1, torch.nan]])}}, path)
    assert str(read_detections(path).boxes[0].tolist()) == "[0.0, 0.0, 1.0, nan]"


BOX = "[0, 0, 1, 1]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no boxes"),
        ("[]", "has no boxes"),
        ("nonsense", "is not JSON of detections: entry 1 begins with 'nonsense'"),
        ("[1, 2]", "entry 1 begins with '1, 2]'"),
        (f'[{{"image_id": 1, "bbox": {BOX}}}', "the list has no end: was its download cut short"),
        (f'[{{"image_id": 1, "bbox": {BOX}}}] more', "entry 2 begins with"),
        (f'{{"image_id": 1, "bbox": {BOX}}}\n{{"image_id": 1, "bb', "entry 2: .* or it ends early"),
        ('{"images": [], "annotations": []}', "entry 1: its keys are 'images', 'annotations', and none names an image"),
        (f'[{{"image_id": 1, "bbox": {BOX}}}, {{"image_id": 1.5, "bbox": {BOX}}}]', "entry 2: its keys are"),
        ('{"file_name": "a.jpg"}', r"entry 1 \(a\.jpg\): it has no boxes, but 'file_name'"),
        ('[{"image_id": 1, "bbox": [0, 0, 1]}]', r"entry 1: its bbox is \[0, 0, 1\]"),
        ('[{"image_id": 1, "bbox": "abcd"}]', "entry 1: its bbox is abcd"),
        ('[{"image_id": 1, "bbox": [0, 0, 1, null]}]', "entry 1: its bbox is"),
        (f'[{{"image_id": 1, "category_id": "cat", "bbox": {BOX}}}]', "entry 1: its category_id is 'cat'"),
        (f'[{{"image_id": 1, "score": "0.5", "bbox": {BOX}}}]', "its score '0.5'"),
        (f'[{{"image_id": true, "bbox": {BOX}}}]', "entry 1: its keys are"),
        (f'[{{"image_id": 1, "score": {10**400}, "bbox": {BOX}}}]', "its score 1000"),
        (f'[{{"image_id": 1, "bbox": [0, 0, 1, {10**400}]}}]', r"its bbox is \[0, 0, 1, 1000"),
        (f'{{"key": "a.jpg", "boxes": [[0, 0, 1.5, {10**400}]]}}', "its boxes are"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "scores": [{10**400}]}}', "its scores are"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "labels": [{10**400}]}}', "its labels are"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "labels": [{2**64 - 1}]}}', "its labels are negative, or larger"),
        ('{"key": "a.jpg", "boxes": [[0, 0, 1]]}', r"\(a\.jpg\): its boxes are of shape \(1, 3\), not \(n, 4\)"),
        ('{"key": "a.jpg", "boxes": [[0, 0, 1, 1], [0]]}', "its boxes are not of one length"),
        ('{"key": "a.jpg", "boxes": [["0", "0", "1", "1"]]}', "its boxes are not numbers"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "labels": [1, 2]}}', r"it has labels of shape \(2,\) for 1 boxes"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "labels": [1.5]}}', "its labels are not whole numbers"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "labels": [-2]}}', "its labels are negative"),
        (f'{{"key": "a.jpg", "boxes": [{BOX}], "scores": ["high"]}}', "its scores are not numbers"),
    ],
)
def test_other_texts_are_refused_with_file_and_entry(tmp_path: Path, text: str, words: str) -> None:
    (path := tmp_path / "detections.json").write_text(text)
    with pytest.raises(DatasetError, match=words) as error:
        read_detections(path)
    assert str(path) in str(error.value) and "Expected: COCO results" in str(error.value)


@pytest.mark.parametrize(
    "value",
    [{"a\n" * 5000: {"labels": [1]}}, {"a\n" * 5000: 1}, {"a": {"b\n" * 5000: 1, **{"c" * n: 1 for n in range(900)}}}],
)
def test_names_of_any_length_are_cut(tmp_path: Path, value: Any) -> None:
    (path := tmp_path / "detections.p").write_bytes(pickle.dumps(value))
    with pytest.raises(DatasetError) as error:
        read_detections(path)
    assert len(str(error.value)) < 900 and "\n" not in str(error.value)
    (path := tmp_path / "detections.json").write_text(
        "\n".join(json.dumps({**dict.fromkeys(value, 1), "key": k}) for k in value)
    )
    with pytest.raises(DatasetError) as error:
        read_detections(path)
    assert len(str(error.value)) < 900 and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("absent", "No such file"), ("pipe", "not a regular file"), (".", "directory")):
        with pytest.raises(DatasetError, match=f"cannot be read: .*{words}"):
            read_detections(tmp_path / name)
    (path := tmp_path / "latin.json").write_bytes(b'{"key": "\xff.jpg", "boxes": []}')
    with pytest.raises(DatasetError, match="is not JSON of detections"):
        read_detections(path)


class Rebuilt:
    """Stands for an object of a class of its own."""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "holds a list, and not a dict"),
        ({}, "has no boxes"),
        (torch.zeros(3), "holds a View, and not a dict"),
        ({"a.jpg": torch.zeros(1, 4)}, "'a.jpg': it is no dict with boxes"),
        ({"a.jpg": [tensors(ROWS[NAMES[0]])] * 2}, "'a.jpg': it is no dict with boxes"),
        ({"a.jpg": {"labels": torch.zeros(3)}}, "a.jpg: it has no boxes"),
        ({"a.jpg": {"boxes": torch.zeros(1, 5)}}, r"a.jpg: its boxes are of shape \(1, 5\)"),
        ({"a.jpg": {"boxes": torch.zeros(1, 4), "labels": torch.zeros(1)}}, "its labels are not whole numbers"),
        ({"a.jpg": {"boxes": np.zeros((1, 4), object)}}, "tensors are needed|an array of dtype O"),
        ({"a.jpg": {"boxes": [[[0.0]]]}}, "a list of other things than numbers or boxes"),
        ({"a.jpg": Rebuilt()}, "cannot be read safely: it names .*Rebuilt"),
    ],
)
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_other_pickles_are_refused(tmp_path: Path, value: Any, words: str, write: Callable[..., Any]) -> None:
    write(value, path := tmp_path / "detections.p")
    with pytest.raises(DatasetError, match=words) as error:
        read_detections(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_run_nothing(tmp_path: Path, protocol: int, zipped: bool) -> None:
    mark = tmp_path / "mark"
    value = {"a.jpg": {"boxes": Call(Path.touch, mark), "scores": Call(os.system, f"touch {mark}")}}
    path = tmp_path / "hostile.p"
    if zipped:
        torch.save(value, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(DatasetError, match="nothing was run"):
        read_detections(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(value)) if not zipped else torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_one_text_of_a_storage_is_not_loaded_many_times(tmp_path: Path, protocol: int) -> None:
    content = torch.ones(4000)._typed_storage().__reduce__()[1][0]
    load = torch.storage._load_from_bytes
    storages = [Call(load, content) for _ in range(5)]
    (path := tmp_path / "detections.p").write_bytes(pickle.dumps({"a.jpg": {"boxes": storages}}, protocol))
    with pytest.raises(DatasetError, match="it makes more bytes of its texts than it has"):
        read_detections(path)


def test_values_that_repeat_take_no_more_than_the_file(tmp_path: Path) -> None:
    many = {"boxes": torch.zeros(1000, 4)}
    bomb: list[Any] = [0.0]
    for _ in range(60):
        bomb = [bomb, bomb]
    pairs: Any = 0.0
    for _ in range(60):
        pairs = (pairs, pairs)
    itself: list[Any] = []
    itself += [itself]
    for value, words in (
        ({f"{n}.jpg": many for n in range(1000)}, "it repeats the boxes of others"),
        ({"a.jpg": {"boxes": bomb}}, "a list of other things"),
        ({"a.jpg": {"boxes": np.zeros((2**40, 0))}}, "has no boxes"),
        ({"a.jpg": {"boxes": pairs}}, "a list of other things"),
        ({"a.jpg": {"boxes": [[0, 0, 1, 1]], "labels": pairs}}, "a list of other things"),
        ({"a.jpg": {"boxes": [[0, 0, 1, pairs]]}}, "a list of other things"),
        ({"a.jpg": {"boxes": [[0, 0, 1, 1]], "scores": {"b": pairs}}}, "a list of other things"),
        ({"a.jpg": {"boxes": itself}}, "a list of other things"),
        ({"a.jpg": itself}, "no dict with boxes"),
    ):
        (path := tmp_path / "detections.p").write_bytes(pickle.dumps(value))
        with pytest.raises(DatasetError, match=words):
            read_detections(path)


def test_files_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    for name in ("pickle, protocol 2", "pickle, protocol 4", "torch.save", "torch.save, older"):
        FORMATS[name](path := tmp_path / "whole")
        content = path.read_bytes()
        for end in (30, len(content) // 2, len(content) - 40):
            path.write_bytes(content[:end])
            with pytest.raises(DatasetError, match="whole cannot be read as a pickle"):
                read_detections(path)
