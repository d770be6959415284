"""Human-object pairs: one form for every annotation file, values read by hand, errors that name the entry."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from patchbank import ImageTransform, load_dataset
from patchbank.boxes import union_boxes
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.example import write_sample
from patchbank.datasets.hoi import read_indices
from patchbank.datasets.hoi_files import COCO_91_TO_80, read_hoi
from patchbank.errors import DatasetError
from patchbank.regions import Region, fault_of, rectangle
from tests.datasets.test_datasets import ANNOTATIONS
from tests.support import hico_root, vcoco_root, write_json

LIST: list[dict[str, Any]] = [
    {
        "file_name": "a.jpg",
        "img_id": 1,
        "annotations": [
            {"bbox": [207, 32, 426, 299], "category_id": 1},
            {"bbox": [58, 97, 571, 404], "category_id": 4},
            {"bbox": [1, 2, 3, 4], "category_id": 90},
        ],
        "hoi_annotation": [
            {"subject_id": 0, "object_id": 1, "category_id": 73, "hoi_category_id": 153},
            {"subject_id": 0, "object_id": -1, "category_id": 58, "hoi_category_id": 160},
            {"subject_id": 0, "object_id": 2, "category_id": 9},
        ],
    },
    {"file_name": "b.jpg", "annotations": [], "hoi_annotation": []},
]
UPT: dict[str, Any] = {
    "filenames": ["a.jpg", "b.jpg"],
    "annotation": [
        {"boxes_h": [[1, 3, 30, 40]], "boxes_o": [[5.5, 6, 50, 60]], "hoi": [1], "object": [1], "verb": [0]},
        {"boxes_h": [], "boxes_o": [], "hoi": [], "object": [], "verb": []},
    ],
    "size": [[640, 480], [32, 64]],
    "empty": [1],
    "objects": ["person", "bicycle"],
    "verbs": ["hold", "ride"],
    "correspondence": [[0, 1, 1], [1, 1, 0], [2, 0, 0]],
}
VCOCO: dict[str, Any] = {
    "annotations": [
        {
            "file_name": "a.jpg",
            "boxes_h": [[1.5, 2, 3, 4], [1.5, 2, 3, 4]],
            "boxes_o": [[5, 6, 7, 8], [0, 0, 0, 0]],
            "actions": [1, 0],
            "objects": [2, 0],
        },
        {"file_name": "b.jpg", "boxes_h": [], "boxes_o": [], "actions": [], "objects": []},
    ],
    "classes": ["hold obj", "ride instr"],
    "objects": ["background", "person", "bicycle"],
    "images": [1, 2],
    "action_to_object": [[2, 1], [2]],
}


def test_coco_91_is_torchvisions() -> None:
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    there = [number for number, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert list(COCO_91_TO_80) == there
    assert list(COCO_91_TO_80.values()) == list(range(80))


def test_hico_dets_list(tmp_path: Path) -> None:
    pairs = read_hoi(write_json(tmp_path / "list.json", LIST))
    target = pairs.target("a.jpg")
    assert target.boxes_h.tolist() == [[207, 32, 426, 299]] * 2
    assert target.boxes_o.tolist() == [[58, 97, 571, 404], [1, 2, 3, 4]]
    assert target.boxes_o.dtype == torch.float32
    assert target.object.tolist() == [3, 79]
    assert target.verb.tolist() == [72, 8]
    assert target.object.dtype == target.verb.dtype == torch.int64
    assert (target.hoi, target.size, target.incomplete, len(target)) == (None, None, 1, 2)  # one has no hoi class
    none = pairs.target("b.jpg")
    assert (len(none), none.boxes_h.shape, none.object.shape) == (0, (0, 4), (0,))


def test_hoi_classes_come_from_the_list_or_from_upts_file_beside_it(tmp_path: Path) -> None:
    content = copy.deepcopy(LIST)
    content[0]["hoi_annotation"].pop()
    path = write_json(tmp_path / "list.json", content)
    hoi = read_hoi(path).target("a.jpg").hoi
    assert hoi is not None and hoi.tolist() == [152]
    del content[0]["hoi_annotation"][0]["hoi_category_id"]
    write_json(path, content)
    assert read_hoi(path).hoi is None
    upt = copy.deepcopy(UPT)
    upt["objects"], upt["verbs"] = [str(each) for each in range(80)], [str(each) for each in range(117)]
    upt["correspondence"] = [[0, 5, 5], [1, 3, 72]]
    write_json(tmp_path / "instances_test2015.json", upt)
    found = read_hoi(path)
    hoi = found.target("a.jpg").hoi
    assert hoi is not None and hoi.tolist() == [1]
    assert found.classes is not None and found.classes.name(1) == "72 3"


def test_upts_file(tmp_path: Path) -> None:
    pairs = read_hoi(write_json(tmp_path / "upt.json", UPT))
    target = pairs.target("a.jpg")
    assert target.boxes_h.tolist() == [[0, 2, 30, 40]]  # theirs are 1-based
    assert target.boxes_o.tolist() == [[4.5, 5, 50, 60]]
    assert (target.object.tolist(), target.verb.tolist(), target.size) == ([1], [0], (640, 480))
    assert target.hoi is not None and target.hoi.tolist() == [1]
    assert pairs.target("b.jpg").size == (32, 64)
    classes = pairs.classes
    assert classes is not None
    assert classes.hois == ((1, 1), (1, 0), (0, 0))
    assert classes.name(0) == "ride bicycle"
    assert classes.objects_of == ((0, 1), (1,))
    assert classes.hois_with(objects=[0]) == [2]
    assert classes.hois_with(verbs=[1], objects=[0]) == [0, 2]


def test_vcocos_file(tmp_path: Path) -> None:
    pairs = read_hoi(write_json(tmp_path / "vcoco.json", VCOCO))
    target = pairs.target("a.jpg")
    assert target.boxes_h.tolist() == [[1.5, 2, 3, 4]]
    assert target.boxes_o.tolist() == [[5, 6, 7, 8]]
    assert (target.object.tolist(), target.verb.tolist()) == ([1], [1])
    assert (target.hoi, target.size, target.incomplete) == (None, None, 1)
    assert pairs.classes == (("person", "bicycle"), ("hold obj", "ride instr"), (), ((0, 1), (1,)))


def test_an_image_named_twice_has_all_its_pairs(tmp_path: Path) -> None:
    pairs = read_hoi(write_json(tmp_path / "list.json", [LIST[0], LIST[1], LIST[0]]))
    assert (len(pairs.target("a.jpg")), pairs.target("a.jpg").incomplete) == (4, 2)
    assert len(pairs.target("b.jpg")) == 0


def test_a_target_is_the_callers_own_and_moves_as_a_whole(tmp_path: Path) -> None:
    pairs = read_hoi(write_json(tmp_path / "upt.json", UPT))
    target = pairs.target("a.jpg")
    target.boxes_h.zero_()
    assert pairs.target("a.jpg").boxes_h.sum() > 0
    assert repr(target) == "<HOITarget a.jpg: 1 pair, 640 x 480 pixels>"
    moved = target.to("meta")
    assert moved.boxes_h.device.type == moved.verb.device.type == "meta"
    assert moved.hoi is not None and moved.hoi.device.type == "meta"
    assert (moved.key, moved.size) == (target.key, target.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_target_goes_to_another_process_by_value(tmp_path: Path, dtype: torch.dtype) -> None:
    target = read_hoi(write_json(tmp_path / "upt.json", UPT)).target("a.jpg")
    target = replace(
        target, regions={"union": torch.randn(1, 8).to(dtype)}, transform=ImageTransform(1, 2, "pad", (32, 32), 8)
    )
    again = pickle.loads(pickle.dumps(target))
    assert again.regions["union"].dtype == dtype and torch.equal(again.regions["union"], target.regions["union"])
    assert torch.equal(again.boxes_h, target.boxes_h) and torch.equal(again.hoi, target.hoi)
    assert (again.key, again.size, again.transform) == (target.key, target.size, target.transform)
    assert copy.deepcopy(target.to("meta")).verb.device.type == "meta"


def _set(*path: Any, value: Any) -> Any:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("content", "change", "words"),
    [
        (LIST, _set(0, "annotations", value=None), "a.jpg: there is no list annotations"),
        (LIST, lambda c: c[0].pop("hoi_annotation"), "a.jpg: there is no list hoi_annotation"),
        (
            LIST,
            _set(0, "annotations", 1, "bbox", value=[1, 2, 3]),
            "a.jpg, annotations[1]: [1, 2, 3] is no box",
        ),
        (LIST, _set(0, "annotations", 1, "bbox", value=[9, 2, 3, 4]), "a.jpg, annotations[1]: [9, 2, 3, 4] is no box"),
        (LIST, _set(0, "annotations", 1, "category_id", value=12), "a.jpg, annotations[1]: category_id 12 is none of"),
        (LIST, _set(0, "annotations", 1, "category_id", value=[1]), "category_id [1] is none of COCO's"),
        (LIST, _set(0, "annotations", 1, value="x"), "a.jpg, annotations[1]: there is no bbox"),
        (LIST, _set(0, "hoi_annotation", 0, "subject_id", value=3), "a.jpg, hoi_annotation[0]: subject_id 3 is not"),
        (LIST, _set(0, "hoi_annotation", 0, "subject_id", value=-1), "subject_id -1 is not among 0 to 2"),
        (LIST, _set(0, "hoi_annotation", 0, "object_id", value=-2), "object_id -2 is not among -1 to 2"),
        (LIST, _set(0, "hoi_annotation", 0, "category_id", value=118), "category_id 118 is not among 1 to 117"),
        (LIST, _set(0, "hoi_annotation", 0, "category_id", value=True), "category_id True is not among 1 to 117"),
        (LIST, _set(0, "hoi_annotation", 0, "hoi_category_id", value=0), "hoi_category_id 0 is not among 1 to 600"),
        (UPT, lambda c: c["size"].pop(), "different lengths (2 filenames, 2 annotation, 1 size)"),
        (UPT, lambda c: c.pop("verbs"), "there is no list verbs"),
        (UPT, _set("size", 1, value=[32]), "b.jpg: its size [32] is no [width, height]"),
        (UPT, _set("annotation", 0, "hoi", value=[]), "a.jpg: its columns are of different lengths (1 boxes_h"),
        (UPT, _set("annotation", 0, "verb", value=[2]), "a.jpg, pair 0: verb 2 is not among 0 to 1"),
        (UPT, _set("annotation", 0, "hoi", value=[3]), "a.jpg, pair 0: hoi 3 is not among 0 to 2"),
        (UPT, _set("annotation", 0, "boxes_h", value=[[1, 2, 3, "4"]]), "a.jpg, pair 0: [1, 2, 3, '4'] is no box"),
        (
            UPT,
            _set("annotation", 0, "boxes_h", value=[[0, 2, 3, 4]]),
            "a.jpg, pair 0: [0, 2, 3, 4] is no box of pixels",
        ),
        (UPT, _set("annotation", 0, "boxes_h", value=[[6, 2, 5, 4]]), "a.jpg, pair 0: [6, 2, 5, 4] is no box"),
        (UPT, _set("annotation", 0, "hoi", value=[2]), "a.jpg, pair 0: hoi 2 is of object and verb (0, 0), and"),
        (
            LIST,
            _set(0, "annotations", 1, "bbox", value=[1e39, 2, 1e40, 4]),
            "annotations[1]: [1e+39, 2, 1e+40, 4] is no",
        ),
        (LIST, _set(0, "annotations", 1, "bbox", value=[1, 2, 10**400, 4]), "annotations[1]: "),
        (UPT, _set("annotation", 0, value=3), "a.jpg: there is no list boxes_h"),
        (UPT, _set("correspondence", 1, value=[1, 2]), "correspondence, row 1: [1, 2] is no [hoi, object, verb]"),
        (UPT, lambda c: c["correspondence"].pop(0), "its correspondence leaves hoi classes out"),
        (UPT, _set("verbs", value=[1, 2]), "verbs are not all names"),
        (VCOCO, _set("annotations", 0, "objects", value=[81, 0]), "a.jpg, pair 0: object 81 is not among 0 to 2"),
        (VCOCO, _set("annotations", 0, "actions", value=[2, 0]), "a.jpg, pair 0: action 2 is not among 0 to 1"),
        (VCOCO, _set("annotations", 0, "boxes_o", value=None), "a.jpg: there is no list boxes_o"),
        (VCOCO, _set("annotations", 0, "boxes_h", 0, value=[1e400, 0, 1, 1]), "Infinity"),
        (VCOCO, _set("action_to_object", 0, value=1), "action_to_object, row 0: 1 is no list of objects"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, content: Any, change: Any, words: str) -> None:
    content = copy.deepcopy(content)
    change(content)
    path = write_json(tmp_path / "some.json", content)
    with pytest.raises(DatasetError) as caught:
        read_hoi(path)
    if words != "Infinity":  # which is no JSON; some parsers take it
        assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_targets_through_the_data_set(tmp_path: Path) -> None:
    hico_root(tmp_path, 4)
    dataset = load_dataset("hicodet", tmp_path, "train")
    assert [len(dataset.target(sample.key)) for sample in dataset.samples] == [0, 1, 0, 1]
    target = dataset.target(dataset.samples[1].key)
    assert target.size == (120, 90)  # the image's, since the list does not have it
    with pytest.raises(DatasetError, match=r"hicodet train has no image 'x\.jpg'.*HICO_train2015"):
        dataset.target("x.jpg")
    assert (dataset.classes.objects[1], dataset.classes.verbs[0]) == ("bicycle", "adjust")  # HICO-DET's own
    with pytest.raises(DatasetError, match=r"do not define hoi classes\. For HICO-DET, put UPT's"):
        dataset.classes.hois_with(objects=[1])
    kept = dataset.with_pairs()
    assert [sample.key for sample in kept.samples] == [dataset.samples[1].key, dataset.samples[3].key]
    again = pickle.loads(pickle.dumps(kept))
    assert torch.equal(again.target(kept.samples[0].key).boxes_o, target.boxes_o)


def test_training_needs_no_images(tmp_path: Path) -> None:
    hico_root(tmp_path, 2)
    images = tmp_path / "hicodet/hico_20160224_det/images/train2015"
    images.rename(tmp_path / "elsewhere")
    dataset = load_dataset("hicodet", tmp_path, "train")
    assert dataset.target(dataset.samples[1].key).size is None


def test_a_folder_has_no_pairs(tmp_path: Path) -> None:
    vcoco_root(tmp_path, 2)
    dataset = load_dataset("folder", tmp_path)
    with pytest.raises(DatasetError, match="loaded as a folder, without annotations"):
        dataset.target(dataset.samples[0].key)


def test_zero_shot_settings_leave_classes_out(tmp_path: Path) -> None:
    write_sample(tmp_path / "root")
    dataset = load_dataset("hicodet", tmp_path / "root", "train")
    counts = dataset.hoi_counts()
    assert (counts.sum(), counts[147], counts[298]) == (4, 1, 1)  # inspect motorcycle, inspect cup
    seen = dataset.without_hois([147])
    assert [sample.key[-6:] for sample in seen.samples] == ["04.jpg", "05.jpg", "07.jpg"]
    assert seen.hoi_counts()[147] == 0 and seen.hoi_counts().sum() == 3
    assert dataset.hoi_counts().sum() == 4
    (tmp_path / "unseen.txt").write_text("147\n298, 85\n")
    (tmp_path / "unseen.json").write_text(json.dumps([147, 298, 85]))
    for name in ("unseen.txt", "unseen.json"):
        left = dataset.without_hois(tmp_path / name)
        assert [left.target(sample.key).hoi for sample in left.samples] == [torch.tensor([304])]
    assert 0 in dataset.rare_hois() and dataset.rare_hois(1) == [hoi for hoi in range(600) if not counts[hoi]]
    with pytest.raises(DatasetError, match="before any are left out"):
        seen.rare_hois()
    assert dataset.without_hois([0]) != dataset.with_pairs()  # the same images
    assert dataset.with_pairs().pairs is dataset.pairs  # read once
    with pytest.raises(DatasetError, match="no image with a pair"):
        dataset.without_hois(range(600))
    with pytest.raises(DatasetError, match="no hoi class 600"):
        dataset.without_hois([1, 600])
    with pytest.raises(DatasetError, match="training split; this is hicodet test"):
        load_dataset("hicodet", tmp_path / "root", "test").rare_hois()
    with pytest.raises(DatasetError, match="does not have the pairs' hoi classes"):
        load_dataset("vcoco", tmp_path / "root", "val").without_hois([1])


@pytest.mark.parametrize("text", ["1 2 x", "{}", "1.5"])
def test_what_is_no_list_of_classes(tmp_path: Path, text: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(DatasetError, match="not a list of whole numbers"):
        read_indices(tmp_path / "list")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_indices(tmp_path / "nowhere")


def _real(name: str) -> Path:
    path = ANNOTATIONS / name
    if not path.exists():
        pytest.skip(f"there is no {path}: set PATCHBANK_ANNOTATIONS to a directory with the field's annotation files")
    return path


def test_the_real_file_of_hico_det(tmp_path: Path) -> None:
    path = _real("instances_test2015.json")
    dataset = load_dataset("hicodet", tmp_path, "test", annotations=path)
    assert (len(dataset), len(dataset.with_pairs())) == (9658, 9658 - 112)
    # Read by hand in the file: two people sit on a bench; their boxes' first two numbers are one less here.
    target = dataset.target("HICO_test2015_00000001.jpg")
    assert target.boxes_h.tolist() == [[319, 305, 359, 349], [269, 302, 311, 350]]
    assert target.boxes_o.tolist() == [[147, 344, 376, 414]] * 2
    assert (target.object.tolist(), target.verb.tolist(), target.size) == ([13, 13], [87, 87], (640, 427))
    assert target.hoi is not None and target.hoi.tolist() == [245, 245]
    assert dataset.classes.name(245) == "sit_on bench"
    target = dataset.target("HICO_test2015_00000006.jpg")
    assert (target.boxes_h.tolist(), target.boxes_o.tolist()) == ([[30, 113, 638, 427]], [[27, 212, 636, 477]])
    assert dataset.classes.name(int(target.hoi[0])) == "lie_on bench"  # type: ignore[index]
    assert len(dataset.target("HICO_test2015_00000154.jpg")) == 0
    assert (len(dataset.classes.objects), len(dataset.classes.verbs), len(dataset.classes.hois)) == (80, 117, 600)
    assert dataset.hoi_counts().sum() == 33405


@pytest.mark.parametrize(
    ("name", "split", "images", "empty"),
    [("instances_vcoco_trainval.json", "train", 5400, 431), ("instances_vcoco_test.json", "val", 4946, 414)],
)
def test_the_real_files_of_vcoco(tmp_path: Path, name: str, split: str, images: int, empty: int) -> None:
    dataset = load_dataset("vcoco", tmp_path, split, annotations=_real(name))
    assert (len(dataset), len(dataset.with_pairs())) == (images, images - empty)
    if split == "val":
        target = dataset.target("COCO_val2014_000000000395.jpg")  # read by hand: he holds a phone, and talks on it
        assert torch.allclose(target.boxes_h, torch.tensor([[118.61, 138.16, 551.33, 573.48]] * 2))
        assert torch.allclose(target.boxes_o, torch.tensor([[291.15, 289.29, 310.99, 312.26]] * 2))
        assert [dataset.classes.objects[index] for index in target.object] == ["cell phone"] * 2
        assert [dataset.classes.verbs[index] for index in target.verb] == ["hold obj", "talk_on_phone instr"]
    else:
        target = dataset.target("COCO_train2014_000000000368.jpg")
        assert [dataset.classes.verbs[index] for index in target.verb] == ["look obj", "kick obj"]
        assert [dataset.classes.objects[index] for index in target.object] == ["sports ball"] * 2
    assert (len(dataset.classes.objects), len(dataset.classes.verbs)) == (80, 24)


@pytest.mark.parametrize(
    ("name", "dataset", "split"),
    [
        ("instances_test2015.json", "hicodet", "test"),
        ("instances_vcoco_trainval.json", "vcoco", "train"),
        ("instances_vcoco_test.json", "vcoco", "val"),
    ],
)
def test_regions_of_the_real_files(tmp_path: Path, name: str, dataset: str, split: str) -> None:
    """Each pair is three regions, none of which is degenerate; boxes are the targets', rows in their order."""
    whole = load_dataset(dataset, tmp_path, split, annotations=_real(name))
    regions = annotated_pairs(whole)
    assert len(regions) == len(whole.with_pairs()) + 3 * len(whole.pairs.verb)
    assert [sample.position for sample in regions] == list(range(len(regions)))
    by_image: dict[str, list[Region]] = {}
    for sample in regions:
        assert sample.region is not None
        by_image.setdefault(sample.image, []).append(sample.region)
    for key, (image, *rest) in by_image.items():
        target = whole.target(key)
        humans, things, unions = (torch.tensor([each.box for each in rest[first::3]]) for first in range(3))
        assert image == Region()
        assert torch.equal(humans, target.boxes_h) and torch.equal(things, target.boxes_o)
        assert torch.equal(unions, union_boxes(target.boxes_h, target.boxes_o))
        assert [each.label for each in rest[1::3]] == target.object.tolist()
        assert [each.verb for each in rest[2::3]] == target.verb.tolist()
        assert [each.hoi for each in rest[2::3]] == (
            [None] * len(target) if target.hoi is None else target.hoi.tolist()
        )
        size = target.size or (10_000, 10_000)
        assert not any(each.box and (fault_of(each.box, size) or not rectangle(each.box, "pad", size)) for each in rest)
