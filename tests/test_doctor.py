"""The doctor's findings on made-up roots; where a mend is a command, it is run, and the next look finds nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patchbank.bank.ezhoi import pickle_name

from patchbank.bank.pickles import pickle_bytes
from patchbank.config import ExtractConfig
from patchbank.datasets import load_dataset
from patchbank.doctor import Finding, Report, disks, examine, machine
from patchbank.encoders.openai.registry import MODELS
from patchbank.errors import ConfigError
from patchbank.extraction.run import extract
from tests.support import contents, hico_list, hico_root, photographs, vcoco_dict, vcoco_root, write_json

HICO = "hicodet/hico_20160224_det/images"
COCO = "vcoco/mscoco2014"


def look(root: Path, weights: Path, **config: Any) -> Report:
    """The tiny model's report, nothing measured."""
    return examine(root, ["tiny"], ExtractConfig(model="tiny", weights=weights, **config), timing=False)


def problem(report: Report, section: str = "Data") -> Finding:
    """The only problem there is; it lies in this section, and has a mend."""
    assert [finding.what for finding in report.problems] == [finding.what for finding in report.problems[:1]]
    [finding] = report.problems
    assert finding in report.sections[section]
    assert finding.mend
    return finding


def mend(finding: Finding) -> None:
    """Run a mend's commands, as a shell does what is pasted into it."""
    commands = [line.removeprefix("$ ") for line in (finding.mend or "").splitlines() if line.startswith("$ ")]
    assert commands
    subprocess.run(["bash", "-e"], input="\n".join(commands), text=True, check=True)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def counts(report: Report) -> dict[str, tuple[int, int]]:
    """title -> (found, listed) of each split."""
    return {
        finding.what: (finding.data["found"], finding.data["listed"])
        for finding in report.sections["Data"]
        if "listed" in finding.data
    }


def finding(report: Report, section: str, what: str) -> Finding:
    [found] = [each for each in report.sections[section] if each.what == what]
    return found


def test_a_root_that_is_ready(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(hico_root(tmp_path, 4), 3)
    before = contents(tmp_path)
    report = look(tmp_path, tiny_weights)
    assert not report.problems
    assert counts(report) == {
        "hicodet train": (4, 4),
        "hicodet test": (4, 4),
        "vcoco train": (3, 3),
        "vcoco val": (3, 3),
    }
    assert [command.split()[2] for command in report.commands] == ["hicodet", "vcoco"]
    for command in report.commands:  # they are this extraction's
        assert f"--root {tmp_path}" in command
        assert f"--model tiny --weights {tiny_weights}" in command
    assert json.loads(json.dumps(report.to_dict()))["problems"] == 0
    assert contents(tmp_path) == before


def test_neither_data_set_is_a_problem_and_one_of_them_is_not(tmp_path: Path, tiny_weights: Path) -> None:
    report = look(tmp_path, tiny_weights)
    assert [each.what for each in report.problems] == ["hicodet", "vcoco"]
    assert "Is --root an EZ-HOI checkout?" in report.problems[0].text
    hico_root(tmp_path, 2)
    report = look(tmp_path, tiny_weights)
    assert not report.problems
    assert finding(report, "Data", "vcoco").level == "note"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"file_name": "a.j', "not valid JSON"),
        (b'{"rows": []}', "another structure"),
        (b"[]", "lists no images"),
        (b'["\xff\xff"]', "not UTF-8"),
        (b'[{"file_name": "../a.jpg"}]', "'../a.jpg'"),
        (b'[{"file_name": "a.b.jpg"}, {"file_name": "a.c.jpg"}]', "would share one pickle"),
        (None, "no annotation file hicodet/test_hico.json or hicodet/instances_test2015.json"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, tiny_weights: Path, content: bytes | None, words: str) -> None:
    hico_root(tmp_path, 2)
    path = tmp_path / "hicodet/test_hico.json"
    path.unlink() if content is None else path.write_bytes(content)
    found = problem(look(tmp_path, tiny_weights))
    assert found.what == "hicodet test"
    assert words in found.text
    assert str(path) in (found.mend or "")


def test_missing_images_are_counted_and_named(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 6)
    for number in (1, 3, 4, 5):
        (tmp_path / HICO / f"train2015/HICO_train2015_000{number}.jpg").unlink()
    report = look(tmp_path, tiny_weights)
    found = problem(report)
    assert found.data["missing"] == [f"HICO_train2015_000{number}.jpg" for number in (1, 3, 4)]
    assert "Nowhere in this root: 4 (HICO_train2015_0001.jpg, " in found.text
    assert counts(report)["hicodet train"] == (2, 6)


def test_no_image_directory(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 2)
    shutil.rmtree(tmp_path / COCO / "val2014")
    found = problem(look(tmp_path, tiny_weights))
    assert "val2014, which is not there" in found.text
    assert "http://images.cocodataset.org/zips/val2014.zip" in (found.mend or "")


def test_a_link_that_leads_nowhere(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 2)
    shutil.rmtree(tmp_path / COCO / "val2014")
    (tmp_path / COCO / "val2014").symlink_to("/no/such/disk")
    assert "a link to /no/such/disk, which is not there" in problem(look(tmp_path, tiny_weights)).text


def test_names_in_subdirectories_and_linked_directories(tmp_path: Path, tiny_weights: Path) -> None:
    directory = tmp_path / "other disk/test"
    names = [f"a/{name}" for name in photographs(directory / "a", 3)] + photographs(directory, 2, prefix="top")
    (directory / "a/link.jpg").symlink_to("photo_0000.jpg")
    (directory / "a/gone.jpg").symlink_to("nowhere.jpg")
    write_json(tmp_path / "root/hicodet/test_hico.json", hico_list([*names, "a/link.jpg", "a/gone.jpg"]))
    hico_root(tmp_path / "root", 1, splits=["train"])
    (tmp_path / "root" / HICO / "test2015").symlink_to(directory)
    report = look(tmp_path / "root", tiny_weights)
    assert counts(report)["hicodet test"] == (6, 7)
    assert problem(report).data["missing"] == ["a/gone.jpg"]


def test_swapped_coco_directories(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 4)
    train, val = tmp_path / COCO / "train2014", tmp_path / COCO / "val2014"
    train.rename(tmp_path / "aside")
    val.rename(train)
    (tmp_path / "aside").rename(val)
    found = problem(look(tmp_path, tiny_weights))
    assert found.what == "vcoco train, val"
    assert "swapped" in found.text
    assert found.data["cause"] == "elsewhere"
    mend(found)
    assert not look(tmp_path, tiny_weights).problems


def test_swapped_lists(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 4)
    write_json(tmp_path / "vcoco/instances_vcoco_test.json", vcoco_dict(names_in(tmp_path / COCO / "train2014")))
    write_json(tmp_path / "vcoco/instances_vcoco_trainval.json", vcoco_dict(names_in(tmp_path / COCO / "val2014")))
    found = problem(look(tmp_path, tiny_weights))
    assert "the two lists are swapped" in found.text
    mend(found)
    assert not look(tmp_path, tiny_weights).problems


def test_a_list_of_the_other_split(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 4)
    write_json(tmp_path / "vcoco/instances_vcoco_test.json", vcoco_dict(names_in(tmp_path / COCO / "train2014")))
    found = problem(look(tmp_path, tiny_weights))
    assert "lists images of the split train" in found.text
    assert "instances_vcoco_test.json" in (found.mend or "")


@pytest.mark.parametrize("place", [f"{COCO}/val2014/val2014", "vcoco/val2014", "coco/images/val2014"])
def test_images_in_another_place(tmp_path: Path, tiny_weights: Path, place: str) -> None:
    """An archive that was unpacked a directory too deep, or elsewhere."""
    vcoco_root(tmp_path, 4)
    (tmp_path / COCO / "val2014").rename(tmp_path / "aside")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "aside").rename(tmp_path / place)
    found = problem(look(tmp_path, tiny_weights))
    assert (found.what, found.data["place"]) == ("vcoco val", str(tmp_path / place))
    mend(found)
    assert not look(tmp_path, tiny_weights).problems


def test_an_empty_directory_in_the_way(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 2)
    (tmp_path / COCO / "val2014").rename(tmp_path / "vcoco/elsewhere")
    (tmp_path / COCO / "val2014").mkdir()
    mend(problem(look(tmp_path, tiny_weights)))
    assert not look(tmp_path, tiny_weights).problems
    assert not (tmp_path / "vcoco/elsewhere").exists()


def test_both_splits_images_in_one_directory_and_nothing_in_their_names(tmp_path: Path, tiny_weights: Path) -> None:
    """No pattern tells them apart: a loop would move the other split's too."""
    vcoco_root(tmp_path, 1)
    names = photographs(tmp_path / COCO / "train2014", 6)
    shutil.rmtree(tmp_path / COCO / "val2014")
    write_json(tmp_path / "vcoco/instances_vcoco_trainval.json", vcoco_dict(names[:3]))
    write_json(tmp_path / "vcoco/instances_vcoco_test.json", vcoco_dict(names[3:]))
    found = problem(look(tmp_path, tiny_weights))
    last = (found.mend or "").splitlines()[-1]
    assert last == (f"$ patchbank extract vcoco --root {tmp_path} --split val --images {tmp_path / COCO / 'train2014'}")


def test_both_splits_images_in_one_directory(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 4)
    for path in (tmp_path / COCO / "val2014").iterdir():
        path.rename(tmp_path / COCO / "train2014" / path.name)
    found = problem(look(tmp_path, tiny_weights))
    assert f"4 of the 4 listed images lie in {COCO}/train2014" in found.text
    mend(found)
    assert not look(tmp_path, tiny_weights).problems
    assert len(names_in(tmp_path / COCO / "train2014")) == 4


def test_coco_2017s_names(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 3)
    (tmp_path / COCO / "train2014").rename(tmp_path / COCO / "train2017")
    for path in (tmp_path / COCO / "train2017").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_train2014_")))
    found = problem(look(tmp_path, tiny_weights))
    assert f"in {COCO}/train2017 under COCO 2017's names" in found.text
    assert "train2014.zip" in (found.mend or "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("hicodet", "Hicodet"),
        ("hicodet/hico_20160224_det/images", "hicodet/hico_20160224_det/Images"),
        (f"{HICO}/train2015", f"{HICO}/Train2015"),
        ("hicodet/test_hico.json", "hicodet/Test_HICO.json"),
    ],
)
def test_directories_and_lists_whose_names_differ_by_case(
    tmp_path: Path, tiny_weights: Path, before: str, after: str
) -> None:
    hico_root(tmp_path, 3)
    (tmp_path / before).rename(tmp_path / after)
    report = look(tmp_path, tiny_weights)
    found = problem(report)
    assert (found.data["found"], found.data["expected"]) == (str(tmp_path / after), str(tmp_path / before))
    assert counts(report) == {"hicodet train": (3, 3), "hicodet test": (3, 3)}
    mend(found)
    assert not look(tmp_path, tiny_weights).problems


def test_lists_and_images_in_two_directories_whose_names_differ_by_case(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 2)
    (tmp_path / "Hicodet").mkdir()
    (tmp_path / "hicodet/hico_20160224_det").rename(tmp_path / "Hicodet/hico_20160224_det")
    mend(problem(look(tmp_path, tiny_weights)))
    assert not look(tmp_path, tiny_weights).problems


@pytest.mark.parametrize(
    ("listed", "on_disk"),
    [
        (".jpg", ".JPG"),
        (".jpg", ".Jpg"),
        ("HICO_train", "HICO_Train"),
        ("HICO_", "hico_"),
        ("train", "TRAIN"),
    ],
)
def test_images_whose_names_differ_by_case(tmp_path: Path, tiny_weights: Path, listed: str, on_disk: str) -> None:
    root = hico_root(tmp_path / "a root's directory", 5)
    images = sorted((root / HICO / "train2015").iterdir())
    for path in images[:4]:
        path.rename(path.with_name(path.name.replace(listed, on_disk)))
    report = look(root, tiny_weights)
    found = problem(report)
    assert found.data == {
        "cause": "case",
        "count": 4,
        "found": images[0].name.replace(listed, on_disk),
        "expected": images[0].name,
    }
    assert counts(report)["hicodet train"] == (1, 5)
    mend(found)
    assert not look(root, tiny_weights).problems


def test_names_that_no_loop_can_rename(tmp_path: Path, tiny_weights: Path) -> None:
    """Their mend shows one rename, quoted; none is run on more than was meant."""
    hico_root(tmp_path, 1, splits=["train"])
    directory = tmp_path / HICO / "test2015"
    names = photographs(directory, 6)
    listed = [f"Odd $name {number}.jpg" for number in range(6)]
    for name, wanted in zip(names, listed, strict=True):
        (directory / name).rename(directory / wanted.lower())
    write_json(tmp_path / "hicodet/test_hico.json", hico_list(listed))
    found = problem(look(tmp_path, tiny_weights))
    assert found.data["count"] == 6
    mend(found)
    assert problem(look(tmp_path, tiny_weights)).data["count"] == 5


def test_a_directory_that_cannot_be_listed(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hico_root(tmp_path, 2)
    scan, closed = os.scandir, tmp_path / HICO / "test2015"

    def scandir(path: Path) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = problem(look(tmp_path, tiny_weights))
    assert "cannot be listed or entered: Permission denied" in found.text
    assert found.mend == f"$ chmod u+rx {closed}"


@pytest.mark.parametrize(
    ("place", "section"),
    [
        (HICO, "Data"),
        (f"{HICO}/test2015", "Data"),
        ("checkpoints", "Checkpoints"),
        ("hicodet_pkl_files/clipbase_img_hicodet_train", "Banks and disk"),
    ],
)
def test_directories_that_may_not_be_entered(tmp_path: Path, place: str, section: str) -> None:
    """In a process without the right to pass over permissions, which a superuser has."""
    hico_root(tmp_path, 2)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    program = (
        "import json, sys; from pathlib import Path; from patchbank.doctor import examine\n"
        "print(json.dumps(examine(Path(sys.argv[1]), timing=False).to_dict()))"
    )
    unprivileged = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if unprivileged and not shutil.which("setpriv"):
        pytest.skip("a superuser may enter everything, and there is no setpriv here")
    (tmp_path / place).chmod(0)
    try:
        done = subprocess.run(
            [*unprivileged, sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
        )
    finally:
        (tmp_path / place).chmod(0o755)
    assert done.returncode == 0, done.stderr
    mends = [
        each["mend"]
        for each in json.loads(done.stdout)["findings"]
        if each["level"] == "problem"
        if each["section"] == section
    ]
    assert mends
    assert all(each.startswith("$ chmod") and each.endswith(f" {tmp_path / place}") for each in mends)


def test_names_that_a_terminal_or_a_file_system_cannot_take(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 1, splits=["train"])
    write_json(
        tmp_path / "hicodet/test_hico.json", hico_list(["[red]a.jpg", "\ud800.jpg", "x" * 300 + ".jpg", "a b.jpg"])
    )
    photographs(tmp_path / HICO / "test2015", 1)
    report = look(tmp_path, tiny_weights)
    assert problem(report).data["found"] == 0
    json.dumps(report.to_dict())


def test_a_file_where_a_directory_should_be(tmp_path: Path, tiny_weights: Path) -> None:
    (tmp_path / "hicodet").write_text("")
    report = look(tmp_path, tiny_weights)
    assert {each.what for each in report.problems} == {"hicodet train", "hicodet test"}


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = hico_root(tmp_path / "root", 1)

    def state() -> Finding:
        report = examine(root, ["ViT-B/16"], timing=False)
        return finding(report, "Checkpoints", "ViT-B/16")

    assert state().level == "note"
    assert "the next extraction downloads it" in state().text.lower()
    official = MODELS["ViT-B/16"]
    assert official.url in (state().mend or "")
    place = root / "checkpoints/pretrained_CLIP/ViT-B-16.pt"
    assert state().data["looked_in"][0] == str(place)

    place.parent.mkdir(parents=True)
    place.write_bytes(b"half of a download")
    cut_short = state()
    assert cut_short.level == "problem"
    assert "18 bytes" in cut_short.text
    mend(cut_short)
    assert state().level == "note"

    content = b"the official file"
    monkeypatch.setitem(
        MODELS,
        "ViT-B/16",
        type(official)(**{**official.__dict__, "sha256": hashlib.sha256(content).hexdigest()}),
    )
    cache = tmp_path / "home/.cache/clip/ViT-B-16.pt"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert state().level == "ok"
    assert state().data["path"] == str(cache)


def test_a_checkpoint_of_ones_own_that_is_another_models(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 1)
    config = ExtractConfig(weights=tiny_weights)
    found = problem(examine(tmp_path, ["ViT-B/16"], config, timing=False), "Checkpoints")
    assert "By its shapes it is a tiny" in found.text


def clip_package(directory: Path, *, stock: bool) -> Path:
    package = directory / "clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the doctor must not import it')")
    line = "x = self.ln_post(x[:, 0, :])"
    forward = f"        {line}\n" if stock else f"        # {line}\n        x = self.ln_post(x)\n"
    (package / "model.py").write_text(f"class VisionTransformer:\n    def forward(self, x):\n{forward}")
    return package


def test_a_stock_clip_package(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hico_root(tmp_path / "root", 1)
    package = clip_package(tmp_path / "site", stock=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(sys.modules, "clip", type(sys)("clip"))  # what this process has loaded does not count
    found = finding(look(tmp_path / "root", tiny_weights), "Environment", "clip")
    assert found.level == "note"
    assert found.data["location"] == str(package)
    assert "(511,)" in found.text
    assert "patchbank uses no clip package" in found.text
    clip_package(tmp_path / "root/CLIP", stock=False)  # EZ-HOI's own, but not on the path
    found = finding(look(tmp_path / "root", tiny_weights), "Environment", "clip")
    assert found.level == "note"
    assert f"export PYTHONPATH={tmp_path / 'root/CLIP'}" in (found.mend or "")


def test_another_fork(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hico_root(tmp_path, 1)
    clip_package(tmp_path / "site", stock=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = finding(look(tmp_path, tiny_weights), "Environment", "clip")
    assert "neither OpenAI's package nor this root's fork" in found.text
    assert "(511,)" not in found.text


def test_ezhois_own_clip_package(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hico_root(tmp_path, 1)
    clip_package(tmp_path / "CLIP", stock=False)
    monkeypatch.syspath_prepend(tmp_path / "CLIP")
    assert finding(look(tmp_path, tiny_weights), "Environment", "clip").level == "ok"


def test_a_clip_package_in_the_root_comes_first(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hico_root(tmp_path, 1)
    clip_package(tmp_path / "CLIP", stock=False)
    monkeypatch.syspath_prepend(tmp_path / "CLIP")
    package = clip_package(tmp_path, stock=True)
    assert finding(look(tmp_path, tiny_weights), "Environment", "clip").data["location"] == str(package)


BANK = "cliptiny_img_hicodet_train"


def test_a_bank_that_is_partly_there_and_one_that_is_complete(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 5)
    dataset = load_dataset("hicodet", tmp_path, "train")
    out = tmp_path / "hicodet_pkl_files" / BANK
    extract(dataset, out, ExtractConfig(**{**tiny_config.__dict__, "limit": 2}))
    assert tiny_config.weights is not None
    report = look(tmp_path, tiny_config.weights)
    bank = finding(report, "Banks and disk", BANK)
    assert (bank.level, bank.data["done"], bank.data["todo"], bank.data["made_by"]) == ("note", 2, 3, "patchbank")
    assert "--split train --model tiny" in (bank.mend or "")
    assert bank.data["bytes_needed"] > 3 * pickle_bytes((16, 32), torch.float32)
    extract(dataset, out, tiny_config)
    report = look(tmp_path, tiny_config.weights)
    assert finding(report, "Banks and disk", BANK).text == "complete, 5 features."
    assert len(report.commands) == 1
    extract(load_dataset("hicodet", tmp_path, "test"), out.with_name("cliptiny_img_hicodet_test"), tiny_config)
    assert look(tmp_path, tiny_config.weights).commands == ()


def test_a_bank_with_failures(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 3)
    (tmp_path / HICO / "train2015/HICO_train2015_0001.jpg").write_bytes(b"")
    out = tmp_path / "hicodet_pkl_files" / BANK
    extract(load_dataset("hicodet", tmp_path, "train"), out, tiny_config)
    bank = finding(look(tmp_path, tiny_config.weights), "Banks and disk", BANK)
    assert "2 of 3 there, 1 failed" in bank.text
    assert f"$ patchbank info {out} --failures" in (bank.mend or "")


def test_a_bank_of_other_features(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 2)
    config = ExtractConfig(**{**tiny_config.__dict__, "resize": "squash"})
    extract(load_dataset("hicodet", tmp_path, "train"), tmp_path / "hicodet_pkl_files" / BANK, config)
    found = problem(look(tmp_path, tiny_config.weights), "Banks and disk")
    assert "resize squash, not center-crop" in found.text
    assert "--resize squash" in (found.mend or "")
    report = look(tmp_path, tiny_config.weights, resize="squash")
    assert not report.problems
    assert "--resize squash" in report.commands[0]


def test_a_damaged_manifest(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 2)
    out = tmp_path / "hicodet_pkl_files" / BANK
    extract(load_dataset("hicodet", tmp_path, "train"), out, tiny_config)
    (out / "bank.json").write_text("{")
    found = problem(look(tmp_path, tiny_config.weights), "Banks and disk")
    assert "not JSON" in found.text
    assert "--overwrite" in (found.mend or "")


def strangers(root: Path, count: int, size: int) -> Path:
    """A directory that the scripts filled with so many pickles of this size."""
    out = root / "hicodet_pkl_files" / BANK
    out.mkdir(parents=True)
    for number in range(count):
        (out / pickle_name(f"HICO_train2015_{number:04}.jpg")).write_bytes(bytes(size))
    return out


def test_other_codes_pickles(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 4)
    out = strangers(tmp_path, 4, 2500)
    report = look(tmp_path, tiny_weights)
    bank = finding(report, "Banks and disk", BANK)
    assert (bank.level, bank.data["done"], bank.data["made_by"]) == ("note", 4, "other code")
    assert bank.mend == f"$ patchbank verify {out}"
    assert ["--split test" in command for command in report.commands] == [True]  # the other is left alone
    (out / pickle_name("HICO_train2015_0003.jpg")).unlink()
    report = look(tmp_path, tiny_weights)
    found = problem(report, "Banks and disk")
    assert ["--split test" in command for command in report.commands] == [True]
    assert "3 of 4 there, made by other code" in found.text
    assert "--overwrite" in (found.mend or "")


@pytest.mark.parametrize(("size", "words"), [(100, "stock clip package"), (20_000, "whole batch")])
def test_other_codes_pickles_of_the_wrong_size(tmp_path: Path, tiny_weights: Path, size: int, words: str) -> None:
    hico_root(tmp_path, 4)
    strangers(tmp_path, 4, size)
    assert words in finding(look(tmp_path, tiny_weights), "Banks and disk", BANK).text


def test_a_disk_that_is_too_small(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vcoco_root(hico_root(tmp_path, 4), 4)
    [disk] = [each for each in look(tmp_path, tiny_weights).sections["Banks and disk"] if each.what == "disk"]
    needed = disk.data["bytes_needed"]
    assert needed > 16 * pickle_bytes((16, 32), torch.float32)
    monkeypatch.setattr(disks, "free_bytes", lambda _: needed)
    assert not look(tmp_path, tiny_weights).problems
    monkeypatch.setattr(disks, "free_bytes", lambda _: needed - 1)
    found = problem(look(tmp_path, tiny_weights), "Banks and disk")
    assert found.data["bytes_free"] == needed - 1
    assert "too little" in found.text


def test_a_directory_that_may_not_be_written(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hico_root(tmp_path, 1)
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert "may not be written" in problem(look(tmp_path, tiny_weights), "Banks and disk").text


def test_times(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 4)
    config = ExtractConfig(weights=tiny_weights, workers=3)
    report = examine(tmp_path, ["tiny"], config)
    speed = finding(report, "This machine", "tiny").data
    slowest = max(speed["encode_seconds"], speed["decode_seconds"] / 3)
    assert speed["images_per_second"] == pytest.approx(1 / slowest)
    assert finding(report, "Banks and disk", BANK).data["seconds"] == pytest.approx(4 * slowest)
    assert finding(report, "This machine", "device").data["workers"] == 3


def test_images_that_cannot_be_decoded_are_found_out(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 2)
    for path in (tmp_path / HICO / "test2015").iterdir():
        path.write_bytes(b"no image")
    found = problem(examine(tmp_path, ["tiny"], ExtractConfig(weights=tiny_weights)), "This machine")
    assert len(found.data["failures"]) == 2


def test_without_any_image_a_synthetic_one_is_decoded(tmp_path: Path, tiny_weights: Path) -> None:
    report = examine(tmp_path, ["tiny"], ExtractConfig(weights=tiny_weights))
    assert finding(report, "This machine", "tiny").data["decode_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_memory(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_encode(*_: object) -> float:
        raise RuntimeError("CUDA out of memory. Tried to allocate\nmore than there is")

    monkeypatch.setattr(machine, "measure_encode", measure_encode)
    hico_root(tmp_path, 1)
    report = examine(tmp_path, ["tiny"], ExtractConfig(weights=tiny_weights))
    assert finding(report, "This machine", "tiny").level == "note"
    assert finding(report, "Banks and disk", BANK).data["seconds"] is None


def test_a_device_that_is_not_there(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 1)
    assert "cuda:99" in problem(look(tmp_path, tiny_weights, device="cuda:99"), "This machine").text


def test_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Choose from"):
        examine(tmp_path, ["ViT-B/17"], timing=False)
