"""ADA-CM's file on the command line: convert, verify and import; and a conversion that is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path

import pytest

from patchbank.bank import ada_cm
from tests.ada_cm import extract_pairs, load, pairs_root
from tests.faults.processes import Calls, Run, run
from tests.support import no_leftovers, patchbank, patchbank_process, vcoco_dict, vcoco_root, write_json
from tests.third_party import Call


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one pair, the object's box has no area."""
    return pairs_root(tmp_path_factory.mktemp("pairs") / "root", damaged=True)


@pytest.fixture(scope="module")
def bank(root: Path, tiny_weights: Path) -> Path:
    return extract_pairs(root, root.parent / "bank", tiny_weights, check=1)


@pytest.fixture(scope="module")
def file(bank: Path) -> Path:
    patchbank("convert", bank, path := bank.with_name("pairs.p"), "--layout", "ada-cm", check=1)
    return path


def test_convert_verify_import_and_convert(bank: Path, root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    """As processes of their own. Two pairs lack the object's feature, and are named at each step."""
    file, listed = tmp_path / "pairs.p", ("--dataset", "hicodet", "--split", "train", "--root", root)
    done = patchbank_process("convert", bank, file, "--layout", "ada-cm", check=1)
    assert "4 pairs of 3 images written" in done.stdout
    assert "pooled in float16, 2 left out" in done.stdout
    assert "no feature: HICO_train2015_0001.jpg#object-2: the box (20, 8, 20, 70) has no area" in done.stdout
    assert "no feature: HICO_train2015_0003.jpg#object-0: " in done.stdout
    assert [arrays["verbs"].tolist() for arrays in load(file).values()] == [[3], [5, 7], [9]]

    assert "No problems found; completeness not checked" in patchbank_process("verify", file, check=0).stdout
    done = patchbank_process("verify", file, *listed, "--json", check=1)
    found = json.loads(done.stdout)
    assert (found["pairs"], found["features"], found["listed"], found["counts"]) == (4, 3, 3, {"rows": 2})
    assert found["findings"][0]["detail"] == "it has 2 pairs, and 3 are annotated"

    made = ("--model", "tiny", "--weights", tiny_weights)
    done = patchbank_process("import", file, tmp_path / "new", *made, check=0)
    assert "15 features written" in done.stdout
    assert "imported from ADA-CM's file of pairs" in done.stdout
    patchbank_process("convert", tmp_path / "new", tmp_path / "again.p", "--layout", "ada-cm", check=0)
    assert (tmp_path / "again.p").read_bytes() == file.read_bytes()

    done = patchbank_process("import", file, tmp_path / "one", *made, *listed, "--json", check=1)
    found = json.loads(done.stdout)
    assert (found["features"], [each["kind"] for each in found["left_out"]]) == (4, ["rows", "rows"])


def test_vcoco_has_no_hoi_classes(tiny_weights: Path, tmp_path: Path) -> None:
    root = vcoco_root(tmp_path / "root", 2)
    names = [path.name for path in sorted((root / "vcoco/mscoco2014/train2014").iterdir())]
    content = vcoco_dict(names)
    pairs = {"boxes_h": [[1, 2, 30, 40]], "boxes_o": [[5, 6, 50, 60]], "actions": [3], "objects": [20]}
    content["annotations"] = [{**pairs, "file_name": name} for name in names]
    write_json(root / "vcoco/instances_vcoco_trainval.json", content)
    extract_pairs(root, tmp_path / "bank", tiny_weights, dataset="vcoco")
    done = patchbank("convert", tmp_path / "bank", tmp_path / "pairs.p", "--layout", "ada-cm", check=0)
    assert "hois are the verbs: V-COCO has no classes of verb and object together" in done.stdout
    for arrays in load(tmp_path / "pairs.p").values():
        assert (arrays["verbs"].tolist(), arrays["hois"].tolist(), arrays["objects"].tolist()) == ([3], [3], [19])
    listed = ("--dataset", "vcoco", "--split", "train", "--root", root)
    assert "No problems found." in patchbank("verify", tmp_path / "pairs.p", *listed, check=0).stdout


def test_a_list_without_hoi_classes(tiny_weights: Path, tmp_path: Path) -> None:
    root = pairs_root(tmp_path / "root")
    path = root / "hicodet/trainval_hico.json"
    entries = json.loads(path.read_text())
    for relation in (relation for entry in entries for relation in entry["hoi_annotation"]):
        del relation["hoi_category_id"]
    write_json(path, entries)
    extract_pairs(root, tmp_path / "bank", tiny_weights)
    done = patchbank("convert", tmp_path / "bank", tmp_path / "pairs.p", "--layout", "ada-cm", check=2)
    assert "does not have the pairs' hoi classes" in done.stderr
    assert not (tmp_path / "pairs.p").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float32"), "--dtype: ADA-CM's file holds one output as it is, in float16. Leave it out."),
        (("--pca", "4"), "--pca: ADA-CM's file"),
        (("--output", "pooled"), "--output: ADA-CM's file"),
    ],
)
def test_options_that_do_not_go_with_it(options: tuple[str, ...], message: str, bank: Path, tmp_path: Path) -> None:
    done = patchbank("convert", bank, tmp_path / "pairs.p", "--layout", "ada-cm", *options, check=2)
    assert message in " ".join(done.stderr.split())


def test_an_existing_file_is_replaced_only_if_asked(file: Path, bank: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.p"
    path.write_bytes(b"mine")
    done = patchbank("convert", bank, path, "--layout", "ada-cm", check=2)
    assert "exists. --overwrite replaces it; else choose another." in " ".join(done.stderr.split())
    assert path.read_bytes() == b"mine"
    assert "is a directory" in patchbank("convert", bank, tmp_path, "--layout", "ada-cm", check=2).stderr
    patchbank("convert", bank, path, "--layout", "ada-cm", "--overwrite", check=1)
    assert path.read_bytes() == file.read_bytes()


def test_banks_without_pairs_or_vectors(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    extract_pairs(root, tmp_path / "tokens", tiny_weights, "--output", "patch_tokens", check=1)
    done = patchbank("convert", tmp_path / "tokens", tmp_path / "pairs.p", "--layout", "ada-cm", check=2)
    assert "stores patch_tokens, and ADA-CM's file takes one vector of each region" in " ".join(done.stderr.split())
    images = root / "hicodet/hico_20160224_det/images/train2015"
    tiny = ("--model", "tiny", "--weights", tiny_weights)
    patchbank("extract", "folder", images, "--out", tmp_path / "whole", *tiny, check=0)
    done = patchbank("convert", tmp_path / "whole", tmp_path / "pairs.p", "--layout", "ada-cm", check=2)
    assert "holds features of whole images, and not of regions" in " ".join(done.stderr.split())


def test_a_killed_conversion_leaves_nothing_of_the_name(file: Path, bank: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "made" / "pairs.p", tmp_path / "printed"
    words = ("convert", bank, path, "--layout", "ada-cm")
    process = Run(output, *words, pause_after=Calls(2, ada_cm.__name__, "_entry")).paused()
    assert list(path.parent.glob(".*")), "it writes under a temporary name"
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    run(output, *words, check=1)
    assert path.read_bytes() == file.read_bytes()
    assert no_leftovers(path.parent)
    process = Run(output, *words, "--overwrite", pause_after=Calls(2, ada_cm.__name__, "_entry")).paused()
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    assert process.wait() == 130
    assert "nothing was written" in process.printed
    assert path.read_bytes() == file.read_bytes()
    assert no_leftovers(path.parent)


def test_a_full_disk(bank: Path, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "made" / "pairs.p"
    printed = run(
        *(tmp_path / "printed", "convert", bank, path, "--layout", "ada-cm"),
        check=2,
        limits={resource.RLIMIT_FSIZE: 600},
    )
    assert "cannot be written: File too large" in " ".join(printed.split())
    assert list(path.parent.iterdir()) == []


def test_what_verify_and_import_refuse(file: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "pairs.p"
    path.write_bytes(pickle.dumps({"a.jpg": Call(os.system, f"touch {marker}")}))
    tiny = ("--model", "tiny")
    done = patchbank("verify", path, check=1)
    assert "would run code when unpickled; was not run" in done.stdout
    done = patchbank("import", path, tmp_path / "new", *tiny, check=2)
    assert "it names posix.system, which no tensor's pickle does; nothing was run" in " ".join(done.stderr.split())
    assert not marker.exists()
    path.write_bytes(file.read_bytes()[:-100])
    assert "it ends early" in patchbank("verify", path, check=1).stdout
    assert "it ends early. Nothing was written" in patchbank("import", path, tmp_path / "new", *tiny, check=2).stderr
    for option in (("--sample", 1), ("--resize", "pad"), ("--pool-grid", 2), ("--layout", "ezhoi")):
        done = patchbank("import", file, tmp_path / "new", *tiny, *option, check=2)
        assert "is for EZ-HOI's pickles" in " ".join(done.stderr.split())
    done = patchbank("import", file, tmp_path / "new", "--model", "ViT-B/16", check=2)
    assert "The features in" in done.stderr
    assert not (tmp_path / "new").exists()
    assert "--sample" in patchbank("verify", file, "--sample", 2, check=2).stderr
    assert "A folder has no annotated pairs" in patchbank("verify", file, "--images", tmp_path, check=2).stderr
