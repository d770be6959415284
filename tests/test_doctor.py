"""The doctor's findings on generated roots, each fault once."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patchbank.bank.pickles import pickle_name
from patchbank.bank.pickling import pickle_bytes
from patchbank.config import ExtractConfig
from patchbank.datasets import load_dataset
from patchbank.doctor import Finding, Report, checks, examine
from patchbank.encoders.openai.registry import MODELS
from patchbank.errors import ConfigError
from patchbank.extraction.plan import describe_run
from patchbank.extraction.run import extract
from patchbank.files import scratch_directory
from tests.support import contents, hico_list, hico_root, photographs, unprivileged, vcoco_dict, vcoco_root, write_json

HICO = "hicodet/hico_20160224_det/images"
COCO = "vcoco/mscoco2014"
BANK = "cliptiny_img_hicodet_train"


def look(root: Path, weights: Path, **config: Any) -> Report:
    """The tiny model's report, without measurements."""
    return examine(root, ["tiny"], ExtractConfig(model="tiny", weights=weights, **config), timing=False)


def problem(report: Report, section: str = "Data") -> Finding:
    """The only problem; it must be in this section."""
    [finding] = report.problems
    assert finding in report.sections[section]
    return finding


def apply(finding: Finding) -> None:
    """Run a fix's commands in a shell."""
    commands = [line.removeprefix("$ ") for line in (finding.fix or "").splitlines() if line.startswith("$ ")]
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
    assert "Is --root an EZ-HOI checkout?" in report.problems[0].text and "--root" in str(report.problems[0].fix)
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
        (None, "no annotation file"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, tiny_weights: Path, content: bytes | None, words: str) -> None:
    hico_root(tmp_path, 2)
    path = tmp_path / "hicodet/test_hico.json"
    path.unlink() if content is None else path.write_bytes(content)
    found = problem(look(tmp_path, tiny_weights))
    assert found.what == "hicodet test"
    assert words in found.text and str(path) in found.text
    assert found.fix == "Put the original list there again (see EZ-HOI's README)."


def test_names_that_would_share_a_pickle(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    """Each model's plan refuses them; the second one refers to the first."""
    hico_root(tmp_path, 2, splits=["train"])
    names = photographs(tmp_path / HICO / "test2015", 2)
    for name, wanted in zip(names, ("a.b.jpg", "a.c.jpg"), strict=True):
        (tmp_path / HICO / "test2015" / name).rename(tmp_path / HICO / "test2015" / wanted)
    write_json(tmp_path / "hicodet/test_hico.json", hico_list(["a.b.jpg", "a.c.jpg"]))
    report = examine(tmp_path, ["ViT-B/16", "ViT-B/32"], timing=False)
    found = problem(report, "Banks and disk")
    assert found.what == "clipbase_img_hicodet_test"
    assert "would share one pickle" in found.text and "Rename one of them" in found.text
    other = finding(report, "Banks and disk", "clipb32_img_hicodet_test")
    assert (other.level, other.text) == ("note", "no plan: see clipbase_img_hicodet_test above.")


def test_missing_images_are_counted_and_named(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 6)
    for number in (1, 3, 4, 5):
        (tmp_path / HICO / f"train2015/HICO_train2015_000{number}.jpg").unlink()
    report = look(tmp_path, tiny_weights)
    found = problem(report)
    assert found.data["missing"] == [f"HICO_train2015_000{number}.jpg" for number in (1, 3, 4)]
    assert "2 of the 6 images" in found.text
    assert "Missing: 4 (HICO_train2015_0001.jpg, " in found.text and ", ...)" in found.text
    assert "hico_20160224_det.tar.gz" in (found.fix or "")
    assert counts(report)["hicodet train"] == (2, 6)
    assert finding(report, "Banks and disk", BANK).data["todo"] == 6  # extract would list four as failed


def test_no_image_directory(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 2)
    shutil.rmtree(tmp_path / COCO / "val2014")
    report = look(tmp_path, tiny_weights)
    found = problem(report)
    assert "val2014, which does not exist" in found.text
    assert "http://images.cocodataset.org/zips/val2014.zip" in (found.fix or "")
    assert [command.split()[-3] for command in report.commands] == ["tiny"]  # of train alone


def test_a_link_that_leads_nowhere(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 2)
    shutil.rmtree(tmp_path / COCO / "val2014")
    (tmp_path / COCO / "val2014").symlink_to("/no/such/disk")
    assert "val2014, a link to nothing" in problem(look(tmp_path, tiny_weights)).text


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
    first, second = look(tmp_path, tiny_weights).problems
    assert (first.what, second.what) == ("vcoco train", "vcoco val")
    assert f"0 of the 4 images in {tmp_path}" in first.text
    assert f"4 are in {val}, such as COCO_train2014_0000.jpg" in first.text
    assert "swapped, exchange them" in (first.fix or "")


def test_a_list_of_the_other_split(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 4)
    write_json(tmp_path / "vcoco/instances_vcoco_test.json", vcoco_dict(names_in(tmp_path / COCO / "train2014")))
    found = problem(look(tmp_path, tiny_weights))
    assert "instances_vcoco_test.json" in found.text
    assert f"4 are in {tmp_path / COCO / 'train2014'}, such as COCO_train2014_0000.jpg" in found.text


@pytest.mark.parametrize("place", [f"{COCO}/val2014/val2014", "vcoco/val2014", "coco/images/val2014"])
def test_images_in_another_place(tmp_path: Path, tiny_weights: Path, place: str) -> None:
    """An archive that was unpacked a directory too deep, or elsewhere."""
    vcoco_root(tmp_path, 4)
    (tmp_path / COCO / "val2014").rename(tmp_path / "aside")
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "aside").rename(tmp_path / place)
    found = problem(look(tmp_path, tiny_weights))
    assert found.what == "vcoco val"
    assert f"4 are in {tmp_path / place}, such as COCO_val2014_0000.jpg" in found.text
    command = (found.fix or "").splitlines()[-1]
    assert command == f"$ patchbank extract vcoco --root {tmp_path} --split val --images {tmp_path / place}"


def test_both_splits_images_in_one_directory(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 4)
    for path in (tmp_path / COCO / "val2014").iterdir():
        path.rename(tmp_path / COCO / "train2014" / path.name)
    found = problem(look(tmp_path, tiny_weights))
    assert f"4 are in {tmp_path / COCO}/train2014" in found.text
    assert f"Move them to {tmp_path / COCO}/val2014" in (found.fix or "")


def test_coco_2017s_names(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 3)
    (tmp_path / COCO / "train2014").rename(tmp_path / COCO / "train2017")
    for path in (tmp_path / COCO / "train2017").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_train2014_")))
    found = problem(look(tmp_path, tiny_weights))
    place = tmp_path / COCO / "train2017"
    assert f"3 are in {place}, such as 0000.jpg, COCO 2017's name of COCO_train2014_0000.jpg" in found.text
    assert "train2014.zip" in (found.fix or "")


@pytest.mark.parametrize(("before", "after"), [("hicodet", "Hicodet"), ("hicodet/test_hico.json",) * 2])
def test_a_data_set_or_a_list_whose_name_differs_by_case(
    tmp_path: Path, tiny_weights: Path, before: str, after: str
) -> None:
    hico_root(tmp_path, 3)
    after = after.replace("test_hico", "Test_HICO")
    (tmp_path / before).rename(tmp_path / after)
    report = look(tmp_path, tiny_weights)
    found = finding(report, "Data", report.problems[0].what)
    assert found.fix == f"$ mv {tmp_path / after} {tmp_path / before}"
    apply(found)
    assert not look(tmp_path, tiny_weights).problems


@pytest.mark.parametrize("wrong", [HICO.replace("images", "Images"), f"{HICO}/Test2015", "Hicodet/images"])
def test_image_directories_whose_names_differ_by_case(tmp_path: Path, tiny_weights: Path, wrong: str) -> None:
    hico_root(tmp_path, 3, splits=["train"])
    write_json(tmp_path / "hicodet/test_hico.json", hico_list(photographs(tmp_path / wrong, 3)))
    found = problem(look(tmp_path, tiny_weights))
    assert f"3 are in {tmp_path / wrong}, such as photo_0000.jpg" in found.text
    assert f"Move them to {tmp_path / HICO / 'test2015'}" in (found.fix or "")


@pytest.mark.parametrize(("listed", "on_disk"), [(".jpg", ".JPG"), ("HICO_train", "HICO_Train")])
def test_images_whose_names_differ_by_case(tmp_path: Path, tiny_weights: Path, listed: str, on_disk: str) -> None:
    root = hico_root(tmp_path / "a root's directory", 5)
    images = sorted((root / HICO / "train2015").iterdir())
    for path in images[:4]:
        path.rename(path.with_name(path.name.replace(listed, on_disk)))
    report = look(root, tiny_weights)
    found = problem(report)
    example = f"{images[0].name.replace(listed, on_disk)}, listed as {images[0].name}."
    assert f"4 are in {images[0].parent}, such as {example}" in found.text
    assert found.fix == f"Rename them as they are listed, in {images[0].parent}."
    assert counts(report)["hicodet train"] == (1, 5)


@pytest.mark.parametrize(
    ("place", "section"),
    [
        ("hicodet", "Data"),
        ("hicodet/test_hico.json", "Data"),
        (HICO, "Data"),
        (f"{HICO}/test2015", "Data"),
        ("checkpoints", "Checkpoints"),
        ("hicodet_pkl_files/clipbase_img_hicodet_train", "Banks and disk"),
    ],
)
def test_places_that_may_not_be_read(tmp_path: Path, place: str, section: str) -> None:
    """In a process that cannot override permissions, as a superuser can."""
    hico_root(tmp_path, 2)
    if not (tmp_path / place).exists():
        (tmp_path / place).mkdir(parents=True)
    program = (
        "import json, sys; from pathlib import Path; from patchbank.doctor import examine\n"
        "print(json.dumps(examine(Path(sys.argv[1]), timing=False).to_dict()))"
    )
    mode = (tmp_path / place).stat().st_mode
    (tmp_path / place).chmod(0)
    try:
        done = subprocess.run(
            [*unprivileged(), sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
        )
    finally:
        (tmp_path / place).chmod(mode)
    assert done.returncode == 0, done.stderr
    problems = [each for each in json.loads(done.stdout)["findings"] if each["level"] == "problem"]
    assert {each["section"] for each in problems} == {section}
    assert {each["fix"] for each in problems} == {f"$ chmod u+rX {tmp_path / place}"}


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
        return finding(examine(root, ["ViT-B/16"], timing=False), "Checkpoints", "ViT-B/16")

    official, place = MODELS["ViT-B/16"], root / "checkpoints/pretrained_CLIP/ViT-B-16.pt"
    assert state().level == "note"
    assert str(place) in state().text and "`extract` downloads it" in state().text
    assert state().fix == f"Without a network, put {official.url} at {place}."

    place.parent.mkdir(parents=True)
    place.write_bytes(b"half of a download")
    report = examine(root, ["ViT-B/16"], timing=False)
    cut_short = problem(report, "Checkpoints")  # the banks refer to it
    assert "18 bytes" in cut_short.text and "delete it" in cut_short.text
    banks = [each for each in report.sections["Banks and disk"] if each.what.startswith("clipbase")]
    assert [each.text for each in banks] == ["no plan: see ViT-B/16 above."] * 2
    place.unlink()

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


def test_no_checkpoint_that_can_be_downloaded(tmp_path: Path) -> None:
    hico_root(tmp_path, 1)
    found = problem(examine(tmp_path, ["tiny"], timing=False), "Checkpoints")
    assert found.fix == "Give one with --weights."


def test_a_users_checkpoint_of_another_model(tmp_path: Path, tiny_weights: Path) -> None:
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
    monkeypatch.setitem(sys.modules, "clip", type(sys)("clip"))  # modules that this process has loaded do not count
    found = finding(look(tmp_path / "root", tiny_weights), "Environment", "clip")
    assert found.level == "note"
    assert found.data["location"] == str(package)
    assert "(511,)" in found.text
    assert "patchbank uses none" in found.text
    clip_package(tmp_path / "root/CLIP", stock=False)  # EZ-HOI's own, but not on the path
    found = finding(look(tmp_path / "root", tiny_weights), "Environment", "clip")
    assert found.level == "note"
    assert f"export PYTHONPATH={tmp_path / 'root/CLIP'}" in (found.fix or "")


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


def test_a_partial_bank_and_a_complete_one(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 5)
    dataset = load_dataset("hicodet", tmp_path, "train")
    out = tmp_path / "hicodet_pkl_files" / BANK
    extract(dataset, out, replace(tiny_config, limit=2))
    assert tiny_config.weights is not None
    report = look(tmp_path, tiny_config.weights)
    bank = finding(report, "Banks and disk", BANK)
    assert (bank.level, bank.data["done"], bank.data["todo"]) == ("note", 2, 3)
    assert bank.text.startswith("2 of 5 done; 3 to do, ")
    assert bank.fix == (
        f"$ patchbank extract hicodet --root {tmp_path} --split train --model tiny --weights {tiny_config.weights}"
    )
    assert bank.data["bytes_needed"] > 3 * pickle_bytes((16, 32), torch.float32)
    assert bank.data["weights"] == str(tiny_config.weights)
    other = finding(report, "Banks and disk", "cliptiny_img_hicodet_test")
    assert (other.level, other.text[:20]) == ("ok", "not begun; 5 to do, ")
    extract(dataset, out, tiny_config)
    report = look(tmp_path, tiny_config.weights)
    assert finding(report, "Banks and disk", BANK).text == "complete, 5 features."
    assert len(report.commands) == 1
    extract(load_dataset("hicodet", tmp_path, "test"), out.with_name("cliptiny_img_hicodet_test"), tiny_config)
    assert look(tmp_path, tiny_config.weights).commands == ()
    again = finding(look(tmp_path, tiny_config.weights, overwrite=True), "Banks and disk", BANK)
    assert "not begun; 5 to do" in again.text and "Replaces 5 features" in again.text


def test_a_bank_that_another_run_extracts_at_this_moment(tmp_path: Path, tiny_weights: Path) -> None:
    """The plan's note."""
    out = hico_root(tmp_path, 1) / "hicodet_pkl_files" / BANK
    out.mkdir(parents=True)
    with scratch_directory(out, describe_run(ExtractConfig())):
        bank = finding(look(tmp_path, tiny_weights), "Banks and disk", BANK)
    assert bank.level == "note"
    assert "Another run is extracting some of the same images" in bank.text


def test_a_bank_with_failures(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 3)
    (tmp_path / HICO / "train2015/HICO_train2015_0001.jpg").write_bytes(b"")
    out = tmp_path / "hicodet_pkl_files" / BANK
    extract(load_dataset("hicodet", tmp_path, "train"), out, tiny_config)
    bank = finding(look(tmp_path, tiny_config.weights), "Banks and disk", BANK)
    assert "2 of 3 done; 1 to do" in bank.text and "1 of these failed before" in bank.text
    assert f"$ patchbank info {out} --failures" in (bank.fix or "")


def test_a_bank_of_other_features(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 2)
    config = replace(tiny_config, resize="squash")
    extract(load_dataset("hicodet", tmp_path, "train"), tmp_path / "hicodet_pkl_files" / BANK, config)
    found = problem(look(tmp_path, tiny_config.weights), "Banks and disk")
    assert "squash" in found.text and "center-crop" in found.text
    assert found.fix and "resize squash" in found.fix and "overwrite" in found.fix
    report = look(tmp_path, tiny_config.weights, resize="squash")
    assert not report.problems
    assert "--resize squash" in report.commands[0]
    assert finding(report, "Banks and disk", f"{BANK}_squash").data["todo"] == 2  # as `extract` calls it


def test_a_bank_whose_index_is_damaged_is_made_again(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    hico_root(tmp_path, 2)
    out = tmp_path / "hicodet_pkl_files" / BANK
    extract(load_dataset("hicodet", tmp_path, "train"), out, tiny_config)
    [part] = (out / "index").iterdir()
    part.write_bytes(part.read_bytes()[:-1])
    report = look(tmp_path, tiny_config.weights)
    assert not report.problems
    assert finding(report, "Banks and disk", BANK).data["todo"] == 2
    assert part.exists()  # the doctor changes nothing
    assert extract(load_dataset("hicodet", tmp_path, "train"), out, tiny_config).images == 2


def test_a_file_where_a_bank_should_be(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 1)
    (tmp_path / "hicodet_pkl_files").mkdir()
    (tmp_path / "hicodet_pkl_files" / BANK).write_text("")
    found = problem(look(tmp_path, tiny_weights), "Banks and disk")
    assert "is a file; a bank is a directory" in found.text


def third_party(root: Path, count: int, size: int) -> Path:
    """A directory with this many pickles of this size."""
    out = root / "hicodet_pkl_files" / BANK
    out.mkdir(parents=True)
    for number in range(count):
        (out / pickle_name(f"HICO_train2015_{number:04}.jpg")).write_bytes(bytes(size))
    return out


def test_third_party_pickles(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 4)
    out = third_party(tmp_path, 4, 2500)
    report = look(tmp_path, tiny_weights)
    bank = finding(report, "Banks and disk", BANK)
    assert (bank.level, bank.data["done"], bank.data["third_party"]) == ("note", 4, True)
    listed = f"--dataset hicodet --split train --root {tmp_path}"
    assert (bank.fix or "").splitlines()[1:] == [
        f"$ patchbank verify {out} {listed}",
        f"$ patchbank import {out} {out}_imported --model tiny {listed} --weights {tiny_weights} --sample 20",
        f"$ mv {out} {out}_third_party && mv {out}_imported {out}",
    ]
    assert ["--split test" in command for command in report.commands] == [True]  # the other is left alone
    (out / pickle_name("HICO_train2015_0003.jpg")).unlink()
    report = look(tmp_path, tiny_weights)
    assert "3 of 4 features, third-party" in problem(report, "Banks and disk").text
    assert ["--split test" in command for command in report.commands] == [True]


@pytest.mark.parametrize("size", [100, 20_000])
def test_third_party_pickles_of_the_wrong_size(tmp_path: Path, tiny_weights: Path, size: int) -> None:
    hico_root(tmp_path, 4)
    out = third_party(tmp_path, 3, 2500)
    (out / pickle_name("HICO_train2015_0003.jpg")).write_bytes(bytes(size))
    found = problem(look(tmp_path, tiny_weights), "Banks and disk")
    assert f"1 have an unusual size, such as HICO_train2015_0003_clip.pkl: {size:,} bytes" in found.text
    assert "stock clip package" in found.text and "slices that hold their batch" in found.text


def test_a_disk_that_is_too_small(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all banks together; each of them alone would fit."""
    vcoco_root(hico_root(tmp_path, 4), 4)
    [disk] = [each for each in look(tmp_path, tiny_weights).sections["Banks and disk"] if each.what == "disk"]
    needed = disk.data["bytes_needed"]
    assert needed > 16 * pickle_bytes((16, 32), torch.float32)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert not look(tmp_path, tiny_weights).problems
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    found = problem(look(tmp_path, tiny_weights), "Banks and disk")
    assert "Not enough disk" in found.text and "Free some space" in found.text


def test_a_directory_that_may_not_be_written(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hico_root(tmp_path, 1)
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    found = problem(look(tmp_path, tiny_weights), "Banks and disk")
    assert found.text == f"{tmp_path} may not be written."
    assert found.fix == f"$ chmod u+rwx {tmp_path}"


def test_times(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a busy machine's clock would choose a smaller pass
    monkeypatch.setattr(checks, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    hico_root(tmp_path, 4)
    report = examine(tmp_path, ["tiny"], ExtractConfig(weights=tiny_weights, workers=3, batch_size=5))
    speed = finding(report, "This machine", "tiny").data
    assert speed["images_a_pass"] == 5  # the extraction's batch
    assert len(speed["encode_seconds"]) >= 2
    passes, decode = speed["encode_seconds"], speed["decode_seconds"] / 3
    expected = [4 * max(min(passes), decode), 4 * (max(passes) + decode)]
    assert finding(report, "Banks and disk", BANK).data["seconds"] == pytest.approx(expected)
    assert finding(report, "This machine", "device").data["workers"] == 3


def test_a_time_is_a_span(tmp_path: Path) -> None:
    assert checks.duration([100.0, 100.0]) == "about 1.7 minutes"
    assert checks.duration([3600 * 2.04, 3600 * 2.6]) == "about 2 to 2.6 hours"
    assert checks.duration([3.0, 80.0]) == "under two minutes"


def test_images_that_cannot_be_decoded_are_found(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 2)
    for path in (tmp_path / HICO / "test2015").iterdir():
        path.write_bytes(b"no image")
    found = problem(examine(tmp_path, ["tiny"], ExtractConfig(weights=tiny_weights)), "This machine")
    assert len(found.data["failures"]) == 2
    assert "HICO_test2015_0000.jpg: not an image" in found.text


def test_a_device_without_memory(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: object) -> object:
        raise RuntimeError("CUDA out of memory. Tried to allocate\nmore than there is")

    monkeypatch.setattr(checks, "_encode", encode)
    hico_root(tmp_path, 1)
    report = examine(tmp_path, ["tiny"], ExtractConfig(weights=tiny_weights))
    speed = finding(report, "This machine", "tiny")
    assert (speed.level, speed.text) == ("note", "its speed is unknown: CUDA out of memory. Tried to allocate")
    assert finding(report, "Banks and disk", BANK).data["seconds"] == []


def test_a_missing_device(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 1)
    report = look(tmp_path, tiny_weights, device="cuda:99")
    assert "cuda:99" in problem(report, "This machine").text
    assert finding(report, "Banks and disk", BANK).text == "no plan: see device above."


def test_a_driver_without_a_torch_for_it(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    device = finding(look(tmp_path, tiny_weights), "This machine", "device")
    assert device.level == "note"
    assert "There is an NVIDIA driver" in device.text and "CUDA build" in (device.fix or "")


def test_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Choose from"):
        examine(tmp_path, ["ViT-B/17"], timing=False)
