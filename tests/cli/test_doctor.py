"""`patchbank doctor` as a process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import contents, hico_list, hico_root, patchbank, vcoco_root, write_json


def test_ready(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(hico_root(tmp_path, 3), 2)
    before = contents(tmp_path)
    options = ("--root", tmp_path, "--model", "tiny", "--weights", tiny_weights)
    done = patchbank("doctor", *options, check=0)
    for title in ("Data", "Checkpoints", "Environment", "Banks and disk", "This machine"):
        assert f"\n{title}\n" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert re.match(r"Ready( \(\d+ notes? above\))?: patchbank extract hicodet", last)  # of an installed `clip`
    assert f"patchbank extract hicodet --root {tmp_path} --model tiny" in last
    assert "images/s" in done.stdout
    assert "PROBLEM" not in done.stdout
    assert contents(tmp_path) == before
    command = last.split(": ", 1)[1].split(" && ")[0].split()  # what it says can be run
    patchbank(*command[1:], "--dry-run", check=0)


def test_problems_and_their_fixes(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 3)
    write_json(tmp_path / "hicodet/test_hico.json", hico_list(["[red]a.jpg", "[/]b.jpg", "\ud800.jpg"]))
    (tmp_path / "hicodet/trainval_hico.json").write_text('[{"file_name"')
    (tmp_path / "checkpoints/pretrained_CLIP").mkdir(parents=True)
    (tmp_path / "checkpoints/pretrained_CLIP/tiny.pt").write_bytes(b"half")
    before = contents(tmp_path)
    arguments = ("doctor", "--root", tmp_path, "--model", "tiny", "--no-timing")
    report = json.loads(patchbank(*arguments, "--json", check=1).stdout)
    problems = [finding for finding in report["findings"] if finding["level"] == "problem"]
    assert len(problems) == report["problems"] == 3
    assert {finding["section"] for finding in problems} == {"Data", "Checkpoints"}
    text = patchbank(*arguments, check=1).stdout
    assert "[red]a.jpg" in text
    assert text.count("PROBLEM") == 4  # the last line names the mark
    assert "3 problems. Fix what is marked PROBLEM" in text
    words = " ".join(text.split())
    for finding in report["findings"]:
        for line in (finding["fix"] or "").splitlines():
            if line.startswith("$ "):
                assert line.removeprefix("$ ") in text  # unbroken, to be copied
            else:
                assert " ".join(line.split()) in words
    assert contents(tmp_path) == before


@pytest.mark.parametrize("between", ["_", " "])
def test_a_bank_of_other_options_and_long_paths(tmp_path: Path, tiny_weights: Path, between: str) -> None:
    """The problem has a fix of its own, and lines of 80 columns break no path: each can be copied."""
    name = "a_root_with_a_name_so_long_that_no_path_in_it_fits_into_a_line_of_eighty_columns".replace("_", between)
    root = hico_root(tmp_path / name, 2)
    options = "--root", root, "--model", "tiny", "--weights", tiny_weights
    patchbank("extract", "hicodet", *options, check=0)
    arguments = "doctor", *options, "--no-timing", "--precision", "bf16"
    report = json.loads(patchbank(*arguments, "--json", check=1).stdout)
    problems = [finding for finding in report["findings"] if finding["level"] == "problem"]
    assert [each["fix"] for each in problems] == [
        "Give the options it was made with (--precision fp32). Or choose another directory, or start from scratch with "
        "--overwrite, which replaces it when it is complete."
    ] * 2
    text = patchbank(*arguments, check=1).stdout
    assert text.count("fix: Give the options it was made with (--precision fp32).") == 2
    for finding in report["findings"]:
        for word in f"{finding['text']} {finding['fix'] or ''}".replace(str(root), "ROOT").split():
            assert word.replace("ROOT", str(root)) in text
    lines = text.replace(name, name.replace(" ", "_")).splitlines()
    assert not [line for line in lines if len(line) > 80 and not any(len(each) > 40 for each in line.split())]


def test_wrong_usage(tmp_path: Path) -> None:
    assert "There is no directory" in patchbank("doctor", "--root", tmp_path / "nowhere", check=2).stderr
    assert "Choose from" in patchbank("doctor", "--root", tmp_path, "--model", "ViT-B/17", check=2).stderr
    assert "one --model" in patchbank("doctor", "--root", tmp_path, "--weights", "a.pt", check=2).stderr


def test_an_empty_root_is_a_problem(tmp_path: Path) -> None:
    done = patchbank("doctor", "--root", tmp_path, "--no-timing", "--model", "tiny", check=1)
    assert "Is --root an EZ-HOI checkout?" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []

    assert "--no-timing" in patchbank("doctor", "--help", tiny=False, check=0).stdout
