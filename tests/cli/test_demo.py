"""`patchbank demo`: the whole job on the embedded sample, as the README promises it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from patchbank import open_bank
from tests.support import patchbank


def test_the_demo(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    done = patchbank("demo", root, tiny=False, check=0, env=os.environ | {"HOME": str(tmp_path)})
    assert "UNTRAINED" in done.stderr
    assert "mean nothing" in done.stdout
    for dataset, splits in (("hicodet", ("train", "test")), ("vcoco", ("train", "val"))):
        for split in splits:
            bank = open_bank(root / f"{dataset}_pkl_files/clipbase_img_{dataset}_{split}")
            assert bank.manifest.shape == (196, 512)
            assert len(bank) == {"train": 7}.get(split, 4)
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

    # Once more is harmless; a directory of somebody's own is not touched.
    patchbank("demo", root, tiny=False, check=0, env=os.environ | {"HOME": str(tmp_path)})
    (tmp_path / "own").mkdir()
    (tmp_path / "own/file").write_text("mine")
    assert "is not empty" in patchbank("demo", tmp_path / "own", tiny=False, check=2).stderr
