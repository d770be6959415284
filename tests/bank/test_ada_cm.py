"""ADA-CM's file of pairs: what is written, and what is made of files that others wrote."""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from patchbank import open_bank
from patchbank.array_pickles import ArrayPickle, pickle_pieces
from patchbank.bank.ada_cm import FIELDS, write_pairs
from patchbank.bank.ada_cm_reading import import_pairs, verify_pairs
from patchbank.bank.convert import convert
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.datasets.hoi_files import read_hoi
from patchbank.errors import BankError, PatchbankError
from patchbank.regions import Region
from tests.ada_cm import Content, arrays_of, cache_model, extract_pairs, load, pairs_root
from tests.datasets.test_datasets import ANNOTATIONS
from tests.support import TINY, no_leftovers, patchbank
from tests.third_party import Call

FIRST, SECOND, THIRD = (f"HICO_train2015_000{number}.jpg" for number in (1, 2, 3))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pairs_root(tmp_path_factory.mktemp("pairs") / "root")


@pytest.fixture(scope="module")
def bank(root: Path, tiny_weights: Path) -> Path:
    return extract_pairs(root, root.parent / "bank", tiny_weights)


@pytest.fixture(scope="module")
def file(bank: Path) -> Path:
    write_pairs(open_bank(bank), path := bank.with_name("pairs.p"))
    return path


@pytest.fixture(scope="module")
def annotations(root: Path) -> Path:
    return root / "hicodet/trainval_hico.json"


def saved(path: Path, content: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def read(path: Path) -> Content:
    """All arrays, by our own reader."""
    found: Content = {}
    with ArrayPickle(path) as opened:
        opened.scan(lambda image, arrays: found.update({image: {n: opened.read(a) for n, a in arrays.items()}}))
    return found


def assert_same(found: Content, expected: Content) -> None:
    assert list(found) == list(expected)
    for image in expected:
        assert list(found[image]) == list(expected[image])
        for name, array in expected[image].items():
            assert found[image][name].dtype == array.dtype
            assert np.array_equal(found[image][name], array), (image, name)


# Writing


def test_the_file_is_what_the_readers_take(file: Path, bank: Path, annotations: Path) -> None:
    content, stored, pairs = load(file), open_bank(bank), read_hoi(annotations)
    assert type(content) is dict
    assert list(content) == [image for image, rows in pairs.rows.items() if len(rows)]
    for image, arrays in content.items():
        assert type(arrays) is dict
        assert list(arrays) == [
            *("boxes_h", "boxes_o", "union_boxes", "verbs", "hois", "objects", "huamn_features", "object_features"),
            *("union_features", "global_feature", "size_orig"),
        ]
        target = pairs.target(image)
        width, height = stored.size(f"{image}#image") or (0, 0)
        assert arrays["size_orig"].tolist() == [height, width]
        for name in ("verbs", "hois", "objects", "size_orig"):
            assert (type(arrays[name]), arrays[name].dtype) == (np.ndarray, np.int64)
        assert arrays["verbs"].tolist() == target.verb.tolist()
        assert arrays["objects"].tolist() == target.object.tolist()
        assert target.hoi is not None
        assert arrays["hois"].tolist() == target.hoi.tolist()
        for row in range(len(target)):
            human, thing = target.boxes_h[row].tolist(), target.boxes_o[row].tolist()
            union = [*map(min, human[:2], thing[:2]), *map(max, human[2:], thing[2:])]
            for name, box in (("boxes_h", human), ("boxes_o", thing), ("union_boxes", union)):
                squashed = [each * 32 / side for each, side in zip(box, (width, height) * 2, strict=True)]
                assert arrays[name].dtype == np.float16
                assert arrays[name][row].tolist() == np.float16(squashed).tolist()
            for name, region in (("huamn", "human"), ("object", "object"), ("union", "union")):
                feature = stored[f"{image}#{region}-{row}"].half().numpy()
                assert arrays[f"{name}_features"].dtype == np.float16
                assert np.array_equal(arrays[f"{name}_features"][row], feature)
        assert arrays["global_feature"].dtype == np.float16
        assert np.array_equal(arrays["global_feature"], stored[f"{image}#image"].half().numpy())
        assert {array.shape for name, array in arrays.items() if name.endswith("_features")} == {
            (len(target), TINY.output_dim)
        }


def test_the_file_names_numpy_alone_and_old_pythons_read_it(file: Path) -> None:
    opcodes = [(opcode, argument) for opcode, argument, _ in pickletools.genops(file.read_bytes())]
    assert {argument for opcode, argument in opcodes if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST")} == {
        "numpy.core.multiarray _reconstruct",
        "numpy ndarray",
        "numpy dtype",
    }
    assert max(opcode.proto for opcode, _ in opcodes) <= 4
    python = os.environ.get("PATCHBANK_OLD_PYTHON", sys.executable)
    program = "import pickle, sys; found = pickle.load(open(sys.argv[1], 'rb')); print(len(found))"
    done = subprocess.run([python, "-W", "error", "-c", program, file], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_the_arrays_are_their_owners_own(file: Path) -> None:
    arrays = next(iter(load(file).values()))
    assert all(array.flags.writeable and array.flags.c_contiguous for array in arrays.values())
    arrays["boxes_h"] += 1
    assert not np.array_equal(arrays["boxes_h"], next(iter(load(file).values()))["boxes_h"])


def test_the_bytes_depend_on_the_features_alone(
    file: Path, root: Path, bank: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    small = extract_pairs(root, tmp_path / "small", tiny_weights, "--shard-size", 2000, "--batch-size", 1)
    assert len(list(small.glob("shard-*"))) > len(list(bank.glob("shard-*")))
    write_pairs(open_bank(small), tmp_path / "again.p")
    assert (tmp_path / "again.p").read_bytes() == file.read_bytes()


def test_a_converted_bank_gives_the_same_file(file: Path, bank: Path, tmp_path: Path) -> None:
    old = open_bank(bank)
    convert(old, tmp_path / "half", "shards", "float16", shard_size=700)
    new = open_bank(tmp_path / "half")
    assert list(new.in_order()) == list(old.in_order())
    assert [new.region(key) for key in new] == [old.region(key) for key in old]
    write_pairs(new, tmp_path / "pairs.p")
    assert (tmp_path / "pairs.p").read_bytes() == file.read_bytes()


def test_adacm_trains_on_it(file: Path) -> None:
    features, labels = cache_model(load(file))
    assert features.shape == (5, 3 * TINY.output_dim)  # of six pairs: two are of the same boxes
    assert labels.sum(dim=1).tolist() == [1, 1, 2, 1, 1]
    torch.manual_seed(0)
    adapter = torch.nn.Linear(features.shape[1], 8)
    keys = torch.nn.Parameter(features.clone())
    optimizer = torch.optim.AdamW([*adapter.parameters(), keys], lr=1e-2)
    losses = []
    for _ in range(3):
        scores = (torch.nn.functional.normalize(adapter(features)) @ adapter(keys).T) @ labels
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def rewritten(bank: Path, target: Path, change: Callable[[Feature], Feature | None]) -> Path:
    """A bank with other features, or without some."""
    old = open_bank(bank)
    keys = list(old.in_order())
    features = (Feature(key, {old.manifest.main: old[key]}, old.size(key), old.region(key)) for key in keys)
    with BankWriter(target, old.manifest, keys) as writer:
        writer.add([new for each in features if (new := change(each))], [])
    return target


def test_a_number_beyond_float16_leaves_out_its_pair(bank: Path, tmp_path: Path) -> None:
    image = "HICO_train2015_0001.jpg"

    def change(feature: Feature) -> Feature:
        large = feature.key in (f"{image}#object-1", "HICO_train2015_0002.jpg#image")
        return feature._replace(outputs={name: value + 70000 * large for name, value in feature.outputs.items()})

    done = write_pairs(open_bank(rewritten(bank, tmp_path / "large", change)), tmp_path / "pairs.p")
    assert done.left_out == dict.fromkeys(
        [f"{image}#object-1", "HICO_train2015_0002.jpg#image"], "its numbers are too large for float16"
    )
    assert (done.images, done.pairs, done.pairs_left_out) == (2, 4, 2)
    content = load(tmp_path / "pairs.p")
    assert content[image]["verbs"].tolist() == [5, 5]
    assert "HICO_train2015_0002.jpg" not in content


def test_a_box_beyond_float16_leaves_out_its_pair(bank: Path, tmp_path: Path) -> None:
    def change(feature: Feature) -> Feature:
        large = Region((0.0, 0.0, 1e7, 20.0), 1)
        return feature._replace(region=large) if feature.key == f"{FIRST}#human-1" else feature

    done = write_pairs(open_bank(rewritten(bank, tmp_path / "large", change)), tmp_path / "pairs.p")
    assert done.left_out == {f"{FIRST}#human-1": "its box is too large for float16"}
    assert (done.pairs, done.pairs_left_out) == (5, 1)
    assert load(tmp_path / "pairs.p")[FIRST]["verbs"].tolist() == [5, 5]


def test_a_pair_that_is_not_extracted_yet_is_named(bank: Path, tmp_path: Path) -> None:
    missing = "HICO_train2015_0003.jpg#human-1"
    part = rewritten(bank, tmp_path / "part", lambda feature: None if feature.key == missing else feature)
    done = write_pairs(open_bank(part), tmp_path / "pairs.p")
    assert list(done.left_out) == [missing]
    assert load(tmp_path / "pairs.p")["HICO_train2015_0003.jpg"]["verbs"].tolist() == [3]


def test_a_bank_that_lacks_whole_images_is_not_finished(file: Path, bank: Path, tmp_path: Path) -> None:
    def part(source: Path, name: str) -> Path:
        return rewritten(source, tmp_path / name, lambda each: None if each.key.startswith(SECOND) else each)

    patchbank("convert", bank, tmp_path / "whole.p", "--layout", "ada-cm", check=0)
    done = patchbank("convert", part(bank, "part"), tmp_path / "part.p", "--layout", "ada-cm", check=1)
    assert "2 images written" in done.stdout
    assert f"{tmp_path / 'part'} lacks regions of its dataset: the same `extract pairs` completes it." in done.stderr
    wanted = replace(open_bank(bank).manifest.stored_as("shards", "float16"), imported="from ADA-CM's file of pairs")
    import_pairs(file, tmp_path / "new", wanted)
    assert write_pairs(open_bank(tmp_path / "new"), tmp_path / "new.p").note == ""
    assert "the same `import`" in write_pairs(open_bank(part(tmp_path / "new", "less")), tmp_path / "less.p").note


def test_damaged_features_are_left_out(bank: Path, tmp_path: Path) -> None:
    copy = rewritten(bank, tmp_path / "copy", lambda feature: feature)
    shard = next(copy.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = write_pairs(open_bank(copy), tmp_path / "pairs.p")
    assert list(done.left_out) == [f"{SECOND}#union-0"]
    assert "is damaged" in done.left_out[f"{SECOND}#union-0"]


def test_a_file_without_pairs_is_not_written(bank: Path, tmp_path: Path) -> None:
    whole = rewritten(bank, tmp_path / "whole", lambda each: each if each.key.endswith("#image") else None)
    with pytest.raises(BankError, match="no annotated pairs: `patchbank extract pairs`"):
        write_pairs(open_bank(whole), tmp_path / "pairs.p")
    humans = rewritten(bank, tmp_path / "humans", lambda each: each if "#object" not in each.key else None)
    with pytest.raises(BankError, match="nothing was written"):
        write_pairs(open_bank(humans), tmp_path / "pairs.p")
    assert not (tmp_path / "pairs.p").exists()
    assert no_leftovers(tmp_path)


# Reading


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_are_read(protocol: int, file: Path, tmp_path: Path) -> None:
    content = load(file)
    content |= {f"{number}.jpg": arrays for number, arrays in enumerate([*content.values()] * 400)}  # several batches
    shared = content["1.jpg"]
    content["shared.jpg"] = {**shared, "hois": shared["verbs"]}  # one array twice
    content["none.jpg"] = {name: array[:0] for name, array in shared.items()}
    assert_same(read(saved(tmp_path / "pairs.p", content, protocol)), content)


@pytest.mark.parametrize("protocol", range(6))
def test_columns_first_and_other_dicts(protocol: int, file: Path, bank: Path, tmp_path: Path) -> None:
    content = load(file)
    other: Any = defaultdict(dict)
    for image, arrays in content.items():
        other[image] = OrderedDict((name, np.asfortranarray(array)) for name, array in arrays.items())
    path = saved(tmp_path / "pairs.p", other, protocol)
    assert_same(read(path), content)
    wanted = open_bank(bank).manifest.stored_as("shards", "float16")
    import_pairs(path, tmp_path / "new", wanted)
    write_pairs(open_bank(tmp_path / "new"), tmp_path / "again.p")
    assert (tmp_path / "again.p").read_bytes() == file.read_bytes()
    assert_same(read(saved(path, OrderedDict(content), protocol)), content)


def test_read_as_written(file: Path) -> None:
    assert_same(read(file), load(file))


def test_numpy_names_of_both_versions(file: Path, tmp_path: Path) -> None:
    written = pickle.dumps(load(file), protocol=2)
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        (tmp_path / "pairs.p").write_bytes(written.replace(old, new))
        assert_same(read(tmp_path / "pairs.p"), load(file))


def test_import_and_convert_give_the_same_bytes(file: Path, bank: Path, annotations: Path, tmp_path: Path) -> None:
    old = open_bank(bank)
    wanted = replace(old.manifest.stored_as("shards", "float16"), imported="from ADA-CM's file of pairs")
    done = import_pairs(file, tmp_path / "new", wanted, read_hoi(annotations))
    assert (done.fixed, done.left_out, done.written.features) == ([], [], len(old))
    new = open_bank(tmp_path / "new")
    assert list(new.in_order()) == list(old.in_order())
    for key in new:
        assert new.size(key) == old.size(key)
        assert torch.equal(new[key], old[key].half())
        found, expected = new.region(key), old.region(key)
        assert found is not None
        assert expected is not None
        assert found._replace(box=None) == expected._replace(box=None)
        if expected.box is not None:
            assert found.box == pytest.approx(expected.box, rel=2**-11)
    write_pairs(new, tmp_path / "again.p")
    assert (tmp_path / "again.p").read_bytes() == file.read_bytes()


def test_import_leaves_out_unusable_images_and_takes_other_dtypes(file: Path, bank: Path, tmp_path: Path) -> None:
    content = arrays_of(load(file))
    first, second = content[FIRST], content[SECOND]
    first["huamn_features"] = first["huamn_features"].astype(np.float32)
    first["verbs"] = first["verbs"].astype(np.int32)
    second["global_feature"][0] = np.nan
    wanted = open_bank(bank).manifest.stored_as("shards", "float16")
    done = import_pairs(saved(tmp_path / "pairs.p", content), tmp_path / "new", wanted)
    assert {finding.detail for finding in done.fixed} == {
        "huamn_features is float32, and not float16",
        "verbs is int32, and not int64",
    }
    assert [(each.kind, each.name) for each in done.left_out] == [("not-finite", "HICO_train2015_0002.jpg")]
    assert len(open_bank(tmp_path / "new")) == 1 + 3 * 3 + 1 + 3 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda wanted: replace(wanted, outputs={"cls": replace(wanted.outputs[wanted.main], shape=(31,))}),
            r"\(32,\) and",
        ),
        (lambda wanted: replace(wanted, input=replace(wanted.input, size=(24, 24))), "input .*is 24 x 24"),
        (lambda wanted: replace(wanted, input=replace(wanted.input, size=(40, 40))), "an input of 32 x 32 pixels"),
    ],
)
def test_another_models_file_is_not_imported(
    change: Callable[[Any], Any], message: str, file: Path, bank: Path, annotations: Path, tmp_path: Path
) -> None:
    with pytest.raises(BankError, match=message):
        import_pairs(file, tmp_path / "new", change(open_bank(bank).manifest), read_hoi(annotations))
    assert not (tmp_path / "new").exists()


def test_boxes_that_reach_half_of_the_input_are_of_a_smaller_one(file: Path, bank: Path, tmp_path: Path) -> None:
    wanted = replace(open_bank(bank).manifest.stored_as("shards", "float16"), imported="from a file")
    content = load(file)
    for arrays in content.values():
        arrays |= {name: array / 2 for name, array in arrays.items() if "boxes" in name}
    reach = max(float(arrays["union_boxes"].max()) for arrays in content.values())
    done = import_pairs(saved(tmp_path / "few.p", content), tmp_path / "few", wanted)
    assert done.written.manifest.imported == f"from a file, whose boxes reach {reach:g} of 32 pixels"
    many = {f"{number}.jpg": content[FIRST] for number in range(100)} | content
    with pytest.raises(BankError, match=f"an input of about {reach:g} pixels, and the input of .* is 32 x 32"):
        import_pairs(saved(tmp_path / "many.p", many), tmp_path / "many", wanted)
    content[SECOND]["union_boxes"][0, 2] = 30
    import_pairs(saved(tmp_path / "many.p", many), tmp_path / "many", wanted)


def change(image: str, name: str, function: Callable[[Any], Any]) -> Callable[[Content], Any]:
    return lambda content: content[image].update({name: function(content[image][name])})


def put(place: Any, value: Any) -> Callable[[Any], Any]:
    def function(array: Any) -> Any:
        array[place] = value
        return array

    return function


@pytest.mark.parametrize(
    ("damage", "kind", "image", "detail"),
    [
        (
            change(FIRST, "union_features", put((1, 2), np.nan)),
            "not-finite",
            FIRST,
            "1 of 96 numbers of union_features",
        ),
        (change(FIRST, "boxes_o", put((0, 0), np.inf)), "not-finite", FIRST, "1 of 12 numbers of boxes_o"),
        (change(FIRST, "object_features", put(1, 0)), "zero", FIRST, "1 of 3 rows of object_features"),
        (change(FIRST, "global_feature", put(slice(None), 0)), "zero", FIRST, "1 of 1 rows of global_feature"),
        (
            lambda content: content[FIRST].update(human_features=content[FIRST].pop("huamn_features")),
            *("arrays", FIRST, "there is no huamn_features, and there is human_features"),
        ),
        (change(FIRST, "verbs", lambda array: array[:2]), "shape", FIRST, "verbs is (2,), and not (3,)"),
        (change(FIRST, "boxes_h", lambda array: array[0]), "shape", FIRST, "boxes_h is (4,), and not (K, 4)"),
        (
            change(FIRST, "union_features", lambda array: array / np.linalg.norm(array, axis=1, keepdims=True)),
            *("normalised", FIRST, "every row of union_features has the norm 1"),
        ),
        (change(FIRST, "union_features", lambda array: array[:, 1:]), "shape", FIRST, "(3, 31), and not (3, 32)"),
        (change(FIRST, "verbs", lambda array: array.astype(np.float16)), "arrays", FIRST, "of float16, and not"),
        (change(FIRST, "verbs", list), "arrays", FIRST, "verbs is a list, and not an array of int64"),
        (change(FIRST, "verbs", put(0, -1)), "arrays", FIRST, "verbs has the number -1"),
        (change(FIRST, "size_orig", put(0, 0)), "arrays", FIRST, "size_orig has the number 0"),
        (change(FIRST, "size_orig", put(1, 2**60)), "arrays", FIRST, f"size_orig has the number {2**60}"),
        (change(FIRST, "verbs", put(1, 2 * 10**9)), "arrays", FIRST, "verbs has the number 2000000000"),
        (
            change(FIRST, "boxes_o", lambda array: array[:, [2, 1, 0, 3]].copy()),
            *("arrays", FIRST, "the corners of box 0 of boxes_o are swapped"),
        ),
        (change(FIRST, "hois", lambda array: array.astype(np.int32)), "dtype", FIRST, "hois is int32, and not int64"),
        (lambda content: content.update({FIRST: []}), "arrays", FIRST, "it is a list, and not a dict of arrays"),
        (change(FIRST, "verbs", put(2, 9)), "rows", FIRST, "pair 2 has 9 in verbs; annotated is 5"),
        (change(FIRST, "objects", put(0, 9)), "rows", FIRST, "pair 0 has 9 in objects; annotated is 17"),
        (change(FIRST, "boxes_h", put((1, 0), 2.6)), "rows", FIRST, "pair 1 has (2.6, 2.84, 16, 24.89) in boxes_h"),
        (change(FIRST, "boxes_o", lambda array: array[::-1].copy()), "rows", FIRST, "in boxes_o; annotated is"),
        (
            lambda content: content[FIRST].update({n: a[:2] for n, a in content[FIRST].items() if len(a) == 3}),
            *("rows", FIRST, "it has 2 pairs, and 3 are annotated"),
        ),
        (lambda content: content.pop(SECOND), "missing", SECOND, ""),
        (
            lambda content: content.update({"../other.jpg": content[SECOND]}),
            *("arrays", "../other.jpg", "its name is not a plain relative path"),
        ),
        (lambda content: content.update({"other.jpg": content[SECOND]}), "extra", "other.jpg", ""),
    ],
)
def test_verify_finds(
    damage: Callable[[Content], Any],
    kind: str,
    image: str,
    detail: str,
    file: Path,
    annotations: Path,
    tmp_path: Path,
) -> None:
    content = arrays_of(load(file))
    damage(content)
    report = verify_pairs(saved(tmp_path / "pairs.p", content), read_hoi(annotations))
    assert [(finding.kind, finding.name) for finding in report.findings] == [(kind, image)]
    assert detail in report.findings[0].detail


def test_names_of_any_length_are_cut(file: Path, annotations: Path, bank: Path, tmp_path: Path) -> None:
    long, arrays = 3000 * "a", load(file)[FIRST]
    cut = 99 * "a" + "…"
    path = saved(tmp_path / "pairs.p", {long: arrays, "a\n.jpg": {long: 1, "b\nc": 2} | dict.fromkeys("defgh", 3)})
    found = [(each.name, each.detail) for each in verify_pairs(path, read_hoi(annotations)).problems][:2]
    assert found[0] == ("a\n.jpg", f"there is no {', '.join(FIELDS)}, and there is {cut}, b\\nc, d, e, f, g and 1 more")
    assert found[1] == (cut, "its name is not a plain relative path")
    with pytest.raises(BankError) as error:
        import_pairs(saved(path, {"a\n.jpg": {}}), tmp_path / "new", open_bank(bank).manifest)
    assert "\n" not in str(error.value)
    for unknown in (f"c{long}\nb\n.", f"\x80\2X\xb8\x0b\0\0{long}cnumpy\ndtype\nh\0."):
        path.write_bytes(unknown.encode("latin1"))
        assert len(verify_pairs(path).findings[0].detail) <= 300


def test_verify_finds_what_differs_between_images(file: Path, annotations: Path, tmp_path: Path) -> None:
    content = arrays_of(load(file))
    narrow, larger = content[FIRST], content[SECOND]
    narrow |= {name: array[..., :8] for name, array in narrow.items() if "feature" in name}
    larger |= {name: array * 2 for name, array in larger.items() if "boxes" in name}
    report = verify_pairs(saved(tmp_path / "pairs.p", content), read_hoi(annotations))
    assert [(finding.kind, finding.name, finding.detail) for finding in report.findings] == [
        ("shape", FIRST, "its features are 8 wide, and most are 32"),
        ("rows", SECOND, "its boxes are in an input of (64, 64) pixels, and most in one of (32, 32)"),
    ]


def test_a_sound_file(file: Path, annotations: Path) -> None:
    report = verify_pairs(file, read_hoi(annotations))
    assert (report.findings, report.pairs, report.looked_at, report.listed) == ([], 6, 3, 3)
    assert (report.shape, report.input) == ((TINY.output_dim,), (32, 32))
    assert report.sound == [THIRD, FIRST, SECOND]


@pytest.mark.parametrize("name", ["instances_test2015.json", "instances_vcoco_trainval.json"])
@pytest.mark.parametrize("half", [False, True], ids=["once", "thrice"])
def test_boxes_of_the_field_are_recognised_after_rounding(name: str, half: bool, tmp_path: Path) -> None:
    """Also where other code scaled them in float16, which rounds three times."""
    if not (path := ANNOTATIONS / name).exists():
        pytest.skip(f"there is no {path}: set PATCHBANK_ANNOTATIONS to a directory with the field's annotation files")
    pairs = read_hoi(path)
    images = [image for image, rows in pairs.rows.items() if len(rows)][:400]

    def entries() -> Iterator[tuple[str, dict[str, Any]]]:
        dtype = np.float16 if half else np.float64
        for image in images:
            target = pairs.target(image)
            width, height = target.size or (640, 480)
            scale = np.array([336 / width, 336 / height] * 2, dtype)
            boxes_h, boxes_o = target.boxes_h.numpy(), target.boxes_o.numpy()
            unions = np.concatenate([np.minimum(boxes_h, boxes_o)[:, :2], np.maximum(boxes_h, boxes_o)[:, 2:]], axis=1)
            boxes = {"boxes_h": boxes_h, "boxes_o": boxes_o, "union_boxes": unions}
            verbs, features = target.verb.numpy(), np.ones((len(target), 2), np.float16)
            arrays = {
                **{each: (box.astype(dtype) * scale).astype(np.float16) for each, box in boxes.items()},
                **{"verbs": verbs, "hois": verbs if target.hoi is None else target.hoi.numpy()},
                **dict.fromkeys(["union_features", "huamn_features", "object_features"], features),
                **{"objects": target.object.numpy(), "global_feature": features[0]},
                "size_orig": np.array([height, width]),
            }
            yield image, arrays

    (tmp_path / "pairs.p").write_bytes(b"".join(pickle_pieces(entries(), list(FIELDS))))
    report = verify_pairs(tmp_path / "pairs.p", pairs)
    assert {finding.kind for finding in report.findings} == {"missing"}
    assert (report.input, len(report.sound)) == ((336, 336), 400)


def test_hostile_pickles_run_nothing(file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content: dict[str, Any] = load(file)
    for hostile in (
        Call(os.system, f"touch {marker}"),
        {**content, "evil.jpg": Call(exec, f"open({str(marker)!r}, 'w')")},
        {FIRST: {**content[FIRST], "verbs": Call(getattr, Call(__import__, "os"), "getcwd")}},
    ):
        report = verify_pairs(saved(tmp_path / "pairs.p", hostile))
        assert [finding.kind for finding in report.findings] == ["unsafe"]
        assert "nothing was run" in report.findings[0].detail
    assert not marker.exists()


def test_a_key_or_value_of_another_kind_is_no_array(file: Path, tmp_path: Path) -> None:
    content: dict[Any, Any] = load(file)
    arrays = content[FIRST]
    for other in (torch.ones(3, 4).half(), np.float16(1), np.array([{}] * 3)):
        path = saved(tmp_path / "pairs.p", {FIRST: {**arrays, "boxes_h": other}})
        report = verify_pairs(path)
        assert [finding.kind for finding in report.findings] in (["arrays"], ["unreadable"]), other
    assert verify_pairs(saved(tmp_path / "pairs.p", {7: arrays, FIRST: arrays})).sound == [FIRST]
    assert (
        verify_pairs(saved(tmp_path / "pairs.p", [arrays])).findings[0].detail
        == "it holds a list, and not a dict of images"
    )
    big_endian = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    assert "big-endian" in verify_pairs(saved(tmp_path / "pairs.p", {FIRST: big_endian})).findings[0].detail


def test_cut_and_changed_files(file: Path, bank: Path, tmp_path: Path) -> None:
    """Anything may be in a file: it has findings, or is refused; nothing else happens."""
    wanted = open_bank(bank).manifest.stored_as("shards", "float16")
    path, random = tmp_path / "pairs.p", Random(0)
    for whole in (file.read_bytes(), pickle.dumps(load(file), 4)):
        for length in sorted({0, 1, 2, len(whole) - 1, *random.sample(range(len(whole)), 40)}):
            path.write_bytes(whole[:length])
            assert [finding.kind for finding in verify_pairs(path).findings] == ["unreadable"]
        with pytest.raises(BankError, match=r"not ADA-CM's file of pairs: it ends early\. Nothing was written"):
            import_pairs(path, tmp_path / "new", wanted)
        for _ in range(300):
            changed = bytearray(whole)
            for _ in range(random.randint(1, 3)):
                changed[random.randrange(len(changed))] = random.randrange(256)
            path.write_bytes(changed)
            verify_pairs(path)
        assert not (tmp_path / "new").exists()


def test_sizes_that_a_pickle_states_take_no_memory(tmp_path: Path) -> None:
    for opcode, length in ((b"B", 4), (b"X", 4), (b"\x8e", 8)):
        content = b"\x80\x04}" + opcode + (2**31).to_bytes(length, "little")
        (tmp_path / "pairs.p").write_bytes(content + b"abc")
        detail = verify_pairs(tmp_path / "pairs.p").findings[0].detail
        assert detail == "it ends early, or holds a value of 2,147,483,648 bytes"


DOUBLED = b"K\0" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(29))  # 2^29 numbers


def test_a_value_of_any_size_is_not_shown(tmp_path: Path) -> None:
    for value, detail in (
        (b"cnumpy\ndtype\n" + DOUBLED + b"\x85R", "an array of dtype a tuple"),
        (DOUBLED, "it is a tuple, and not a dict of arrays"),
        (b"}X\1\0\0\0a" + DOUBLED + b"s", "there is no"),
    ):
        (tmp_path / "pairs.p").write_bytes(b"\x80\4}X\5\0\0\0a.jpg" + value + b"s.")
        assert verify_pairs(tmp_path / "pairs.p").findings[0].detail.startswith(detail)


def test_bytes_of_texts_are_no_more_than_the_file(tmp_path: Path) -> None:
    """Of one text of a kilobyte, each image's value is made again."""
    made = b"c_codecs\nencode\nh\0X\6\0\0\0latin1\x86R"
    text = b"X\0\4\0\0" + b"a" * 1024 + b"q\0"
    images = b"".join(b"X\3\0\0\0%03d" % number + made + b"s" for number in range(100))
    (tmp_path / "pairs.p").write_bytes(b"\x80\2" + text + b"0}" + images + b".")
    assert verify_pairs(tmp_path / "pairs.p").findings[0].detail == "it makes more bytes of its texts than it has"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "nothing"):
        with pytest.raises(PatchbankError, match="cannot be read"):
            verify_pairs(path)
