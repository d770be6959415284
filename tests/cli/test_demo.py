"""`patchbank demo`: the whole job on the embedded sample, as the README promises it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchbank import open_bank
from tests.support import REPOSITORY, patchbank


def example(name: str, *arguments: object, code: int = 0) -> str:
    """What an example prints."""
    command = [sys.executable, "-W", "error", REPOSITORY / f"examples/{name}.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "patchbank-demo"
    done = patchbank("demo", root, tiny=False, check=0, env=os.environ | {"HOME": str(tmp_path)})
    assert "UNTRAINED" in done.stderr
    assert "mean nothing" in done.stdout
    for dataset, splits in (("hicodet", ("train", "test")), ("vcoco", ("train", "val"))):
        for split in splits:
            bank = open_bank(root / f"{dataset}_pkl_files/clipbase_img_{dataset}_{split}")
            assert bank.manifest.shape == (196, 512)
            assert len(bank) == {"train": 7}.get(split, 5)
            assert bank.path.name in done.stdout

    # The lines it prints for reading a feature run as they are.
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line == "import pickle")
    exec("\n".join(lines[start : start + 3]))

    # The annotation files have the real structures, and boxes inside their images.
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

    # The examples run on what it left.
    for name, arguments, words in (
        (
            "global_search",
            [root / "hicodet_pkl_files/clipbase_img_hicodet_train", "--count", 3],
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

    # So does the README's Python on training.
    monkeypatch.chdir(tmp_path)
    section = (REPOSITORY / "README.md").read_text().split("## Train on it")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(snippet, names)
    assert names["patch_tokens"].shape == (2, 196, 512)
    assert names["similarity"].argmax() == 0

    # And its commands that show the features; those that the demo proposes itself, too.
    section = (REPOSITORY / "README.md").read_text().split("## See the features")[1].split("\n## ")[0]
    shell = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0].replace('pip install -e ".[show]"', "")
    proposed = re.findall(r"^(?:Next:| {5}) (patchbank .*)$", done.stdout, re.MULTILINE)
    assert len(proposed) == 2
    module = f"patchbank() {{ '{sys.executable}' -W error -m patchbank \"$@\"; }}\n"
    ran = subprocess.run(
        ["bash", "-euc", module + "\n".join([shell, *proposed])], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out.png").exists() and (tmp_path / "HICO_train2015_00000002-features.png").exists()

    # Once more is harmless; a directory of somebody's own is not touched.
    patchbank("demo", root, tiny=False, check=0, env=os.environ | {"HOME": str(tmp_path)})
    (tmp_path / "own").mkdir()
    (tmp_path / "own/file").write_text("mine")
    assert "is not empty" in patchbank("demo", tmp_path / "own", tiny=False, check=2).stderr
