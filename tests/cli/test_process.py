"""`extract` and `info`: what they do, and what bad input gets; what only a process shows. Faults: tests/faults."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from patchbank import ExtractConfig, __version__, extract, load_dataset, open_bank
from patchbank.encoders.openai.registry import MODELS
from patchbank.extraction.devices import Devices
from tests.faults.processes import run
from tests.support import (
    REPOSITORY,
    TINY,
    command,
    contents,
    hico_list,
    hico_root,
    patchbank,
    patchbank_process,
    photographs,
    unprivileged,
    vcoco_root,
    write_json,
)
from tests.test_preprocess import broken_files


def tiny(weights: Path) -> tuple[str, ...]:
    return "--model", "tiny", "--weights", str(weights), "--batch-size", "4"


def test_help_and_version_do_not_import_torch() -> None:
    assert patchbank_process("--version", tiny=False, check=0).stdout == f"patchbank {__version__}\n"
    for arguments in (["--help"], ["extract", "hicodet", "--help"], ["info", "--help"], ["doctor", "--help"]):
        program = (
            "import sys; from patchbank.cli import main; sys.argv = ['patchbank', *sys.argv[1:]]\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_extraction_does_not_import_the_compiler(many: Path, tiny_weights: Path, tmp_path: Path) -> None:
    """It would take as long as all else that a run imports."""
    program = (
        "import sys; from patchbank import ExtractConfig, extract, load_dataset\n"
        "from patchbank.encoders.openai.registry import MODELS; from tests.support import TINY\n"
        "MODELS[TINY.name] = TINY; images, weights, out = sys.argv[1:]\n"
        "config = ExtractConfig(model='tiny', weights=weights, device='cpu')\n"
        "assert extract(load_dataset('folder', images), out, config).images == 5\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, many, tiny_weights, tmp_path / "bank"], cwd=REPOSITORY, check=True)


def test_what_ray_prints_is_not_among_the_results(
    many: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(config: ExtractConfig) -> Devices:
        print("a word of a library")
        return Devices(("cpu",), 1)

    monkeypatch.setattr("patchbank.extraction.devices.decide", talkative)
    run = "extract", "folder", many, "--out", tmp_path / "bank", *tiny(tiny_weights), "--dry-run", "--json"
    done = patchbank(*run, "--engine", "ray", check=0)
    assert [plan["todo"] for plan in json.loads(done.stdout)] == [5]
    assert "a word of a library" in done.stderr


def test_hicodet_makes_every_split_under_the_original_names(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 5)
    done = patchbank("extract", "hicodet", "--root", tmp_path, *tiny(tiny_weights), check=0)
    banks = tmp_path / "hicodet_pkl_files"
    assert sorted(path.name for path in banks.iterdir()) == [
        "cliptiny_img_hicodet_test",
        "cliptiny_img_hicodet_train",
    ]
    assert "5 features written" in done.stdout
    assert "hicodet train, tiny: 5 images to do" in done.stderr
    assert "hicodet train, tiny: 5/5 images" in done.stderr
    assert len(list((banks / "cliptiny_img_hicodet_train").glob("HICO_train2015_*_clip.pkl"))) == 5


def test_what_ez_hoi_does_not_read_has_a_name_of_its_own(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 2)
    run = "extract", "hicodet", "--root", tmp_path, *tiny(tiny_weights)
    for options in ((), ("--resize", "squash"), ("--dtype", "fp16"), ("--resize", "squash", "--dtype", "float16")):
        for layout in ("ezhoi", "shards"):
            assert "2 features written" in patchbank(*run, *options, "--layout", layout, check=0).stdout
    ends = ("", "_float16", "_squash", "_squash_float16")
    names = sorted(f"cliptiny_img_hicodet_{split}{end}" for split in ("train", "test") for end in ends)
    for banks in ("hicodet_pkl_files", "hicodet_shards"):
        assert sorted(path.name for path in (tmp_path / banks).iterdir()) == names
    usual = patchbank(*run, "--resize", "center-crop", "--precision", "bf16", "--dry-run", check=2)
    assert "cliptiny_img_hicodet_train was created with a different configuration" in usual.stderr


def test_vcoco_likewise(tmp_path: Path, tiny_weights: Path) -> None:
    vcoco_root(tmp_path, 3)
    patchbank("extract", "vcoco", "--root", tmp_path, *tiny(tiny_weights), check=0)
    for split in ("train", "val"):
        bank = open_bank(tmp_path / f"vcoco_pkl_files/cliptiny_img_vcoco_{split}")
        assert sorted(bank) == [f"COCO_{split}2014_{number:04}.jpg" for number in range(3)]
        assert (bank.manifest.dataset, bank.manifest.split) == ("vcoco", split)


def test_other_places_for_one_split(tmp_path: Path, tiny_weights: Path) -> None:
    names = photographs(tmp_path / "pictures", 3)
    annotations = write_json(tmp_path / "list.json", hico_list(names))
    places = ("--images", tmp_path / "pictures", "--annotations", annotations, "--out", tmp_path / "banks")
    patchbank("extract", "hicodet", "--split", "train", *places, *tiny(tiny_weights), check=0)
    assert len(open_bank(tmp_path / "banks/cliptiny_img_hicodet_train")) == 3
    done = patchbank("extract", "hicodet", *places, *tiny(tiny_weights), check=2)
    assert "name it with --split" in done.stderr


def test_a_folder_and_its_json(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 3)
    done = patchbank(
        "extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *tiny(tiny_weights), "--json", check=0
    )
    [summary] = json.loads(done.stdout)
    assert summary["images"] == 3
    assert summary["failures"] == {}
    info = json.loads(patchbank("info", tmp_path / "bank", "--json", check=0).stdout)
    assert info["features"] == 3
    assert info["shape"] == [16, 32]
    assert info["identity"]["model"] == "tiny"
    assert info["layout"] == "shards"
    assert info["bytes"] == sum(path.stat().st_size for path in (tmp_path / "bank").iterdir() if path.is_file())
    text = patchbank("info", tmp_path / "bank", check=0).stdout
    for word in (
        "tiny",
        "layout shards",
        "(32,)",
        "(16, 32) float32",
        "grid 4 x 4",
        "center-crop",
        "batch size 4",
        "UNTRAINED random weights",
    ):
        assert word in text


def test_a_dry_run_writes_nothing(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 4)
    arguments = ("extract", "hicodet", "--root", tmp_path, *tiny(tiny_weights))
    before = contents(tmp_path)
    done = patchbank(*arguments, "--dry-run", check=0)
    assert "4 images, 0 done, 4 to do" in done.stdout
    assert "free. Nothing was written." in done.stdout
    plans = json.loads(patchbank(*arguments, "--dry-run", "--json", check=0).stdout)
    assert [plan["todo"] for plan in plans] == [4, 4]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
@pytest.mark.parametrize(
    ("before", "option", "said"),
    [
        (("--limit", 1), ("--dry-run",), "3 images, 1 done, 2 to do"),
        ((), (), "0 features written (0 B), 3 already there"),
    ],
)
def test_what_computes_nothing_needs_no_torch(
    tmp_path: Path, tiny_weights: Path, layout: str, before: tuple[object, ...], option: tuple[str, ...], said: str
) -> None:
    """For the official weights; here the tiny model's are."""
    hico_root(tmp_path, 3, splits=["test"])
    weights = tmp_path / "checkpoints/pretrained_CLIP/tiny.pt"
    weights.parent.mkdir(parents=True)
    weights.symlink_to(tiny_weights)
    given = ("hicodet", "--root", tmp_path, "--split", "test", "--layout", layout)
    patchbank("extract", *given, *tiny(tiny_weights), *before, check=0)
    official = replace(TINY, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # to import it is an ImportError
        "from patchbank.cli import main\n"
        "from patchbank.encoders.openai.registry import MODELS, Model\n"
        f"MODELS['tiny'] = {official!r}\n"
        "main()"
    )
    line = [sys.executable, "-c", program, "extract", *map(str, given), "--model", "tiny", *option]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_a_dry_run_finds_that_nothing_can_be_written(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 1)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    arguments = ("extract", "folder", tmp_path / "images", "--out", tmp_path / "closed/bank", *tiny(tiny_weights))
    line = [*unprivileged(), *command(*arguments, "--dry-run")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    assert f"error: {tmp_path}/closed/bank cannot be written: Permission denied." in done.stderr


def test_a_dry_run_says_what_is_passed_over(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 1)
    (tmp_path / "images/notes.txt").write_text("no picture")
    arguments = ("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *tiny(tiny_weights))
    done = patchbank(*arguments, "--dry-run", check=0)
    assert "note: 1 file is not read as an image: .txt 1." in done.stderr
    [plan] = json.loads(patchbank(*arguments, "--dry-run", "--json", check=0).stdout)
    assert plan["notes"] == ["1 file is not read as an image: .txt 1."]


def test_a_dry_run_prints_failures_and_deletions(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 3)
    (tmp_path / "images/broken.jpg").write_bytes(b"")
    arguments = ("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", *tiny(tiny_weights))
    arguments += ("--layout", "ezhoi")
    patchbank(*arguments, check=1)
    done = patchbank(*arguments, "--dry-run", check=0)
    assert "4 images, 3 done, 1 to do" in done.stdout
    assert "1 of those failed before" in done.stdout
    done = patchbank(*arguments, "--dry-run", "--overwrite", check=0)
    assert "4 images, 0 done, 4 to do" in done.stdout
    assert "the existing features (" in done.stdout
    assert len(open_bank(tmp_path / "bank")) == 3


def test_file_names_must_be_utf8_here(tmp_path: Path) -> None:
    """In another locale names would not be those of the bank, and finished work would seem lost."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "PYTHONUTF8=1" in patchbank("info", tmp_path, tiny=False, check=2, env=environment).stderr


def test_the_exit_codes_of_a_process(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    """The others, 130 and 143, are those of runs that are stopped: tests/faults."""
    photographs(tmp_path / "images", 2)
    (tmp_path / "images/broken.jpg").write_bytes(b"")
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    done = patchbank_process("info", tmp_path / "bank", tiny=False, check=0)
    assert "(16, 32) float32" in done.stdout and done.stderr == ""
    done = patchbank_process("verify", tmp_path / "bank", tiny=False, check=1)
    assert "broken.jpg" in done.stdout and "2/2 images" in done.stderr
    done = patchbank_process("info", tmp_path / "nowhere", tiny=False, check=2)
    assert done.stdout == "" and done.stderr.startswith("error: ")


def test_images_that_fail_are_listed_and_the_rest_is_extracted(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 3, splits=["test"])
    images = tmp_path / "hicodet/hico_20160224_det/images/test2015"
    words = broken_files(images) | {"[red]missing[/red].jpg": "missing"}
    names = [f"HICO_test2015_{number:04}.jpg" for number in range(3)]
    write_json(tmp_path / "hicodet/test_hico.json", hico_list([*words, *names]))
    done = patchbank("extract", "hicodet", "--root", tmp_path, "--split", "test", *tiny(tiny_weights), check=1)
    assert f"3 features written (7.3 kB), {len(words)} failed" in done.stdout
    for name, word in words.items():
        [line] = [line for line in done.stdout.splitlines() if f"failed: {name}:" in line]
        assert word in line.lower()
    bank = tmp_path / "hicodet_pkl_files/cliptiny_img_hicodet_test"
    assert open_bank(bank).failures.keys() == words.keys()
    assert "[red]missing[/red].jpg" in patchbank("info", bank, "--failures", check=0).stdout


def _without(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).rename(root / "moved_away")


def _replaced(path: str, content: object) -> Callable[[Path], None]:
    return lambda root: write_json(root / path, content) and None


LIST, IMAGES = "hicodet/test_hico.json", "hicodet/hico_20160224_det/images/test2015"


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (_without(LIST), [], "no annotation file"),
        (_without(IMAGES), [], "does not exist"),
        (_without("hicodet"), [], "--root"),
        (_replaced(LIST, {"rows": []}), [], "another structure"),
        (_replaced(LIST, hico_list(["../a.jpg"])), [], "'../a.jpg'"),
        (_replaced(LIST, hico_list(["a.b.jpg", "a.c.jpg"])), [], "'a.b.jpg' and 'a.c.jpg'"),
        (_replaced(LIST, hico_list(["other_split.jpg"])), [], "another split"),
        (None, ["--model", "ViT-B/17"], "Choose from: ViT-B/32"),
        (None, ["--split", "val"], "no split 'val' of hicodet"),
        (None, ["--model", "ViT-B/16", "--model", "tiny"], "one --model"),
        (None, ["--partition", "2/2"], "must be less than N"),
        (None, ["--partition", "0/2", "--overwrite"], "would delete"),
        (None, ["--workers", "1000000"], "at most 1024"),
        (None, ["--batch-size", "100000000", "--device", "cpu"], "--batch-size 100,000,000 needs about"),
        (None, ["--out", "README.md/banks"], "README.md is a file; a bank is a directory"),
        (None, ["--weights", "nowhere.pt"], "no checkpoint nowhere.pt"),
        (None, ["--precision", "tf32"], "needs CUDA"),
        (None, ["--device", "gpu"], "no device 'gpu'"),
        (None, ["--resize", "stretch"], "squash"),
        (None, ["--dtype", "int8"], "int8 is for --layout shards"),
    ],
)
def test_a_wrong_setup_is_one_message_and_nothing_is_written(
    tmp_path: Path, tiny_weights: Path, spoil: Callable[[Path], None] | None, options: list[str], words: str
) -> None:
    hico_root(tmp_path, 2, splits=["test"])
    if spoil:
        spoil(tmp_path)
    model = [] if "--model" in options else ["--model", "tiny"]
    before = contents(tmp_path)
    done = patchbank(
        *("extract", "hicodet", "--root", tmp_path, "--split", "test", "--weights", tiny_weights, *model, *options),
        check=2,
    )
    assert words in done.stderr
    assert contents(tmp_path) == before


def test_weights_of_another_model_are_refused(tmp_path: Path, tiny_weights: Path) -> None:
    hico_root(tmp_path, 2, splits=["test"])
    before = contents(tmp_path)
    done = patchbank(
        *("extract", "hicodet", "--root", tmp_path, "--split", "test", "--model", "ViT-B/16"),
        *("--weights", tiny_weights),
        check=2,
    )
    assert "By its shapes it is a tiny" in done.stderr
    dry = patchbank(*done.args[3:], "--dry-run", check=2)  # it finds the same
    assert dry.stderr == done.stderr
    assert contents(tmp_path) == before


def test_offline_and_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hico_root(tmp_path, 2, splits=["test"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(MODELS, "tiny", replace(TINY, url="http://127.0.0.1:9/tiny.pt", sha256="1" * 64))
    arguments = ("extract", "hicodet", "--root", tmp_path, "--split", "test", "--model", "tiny")
    assert "to be downloaded" in patchbank(*arguments, "--dry-run", check=0).stdout
    done = patchbank(*arguments, check=2)
    place = tmp_path / "checkpoints/pretrained_CLIP/tiny.pt"
    assert f"put it at {place}" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "hicodet_pkl_files").exists()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs."""
    directory = tmp_path_factory.mktemp("many")
    photographs(directory, 5, size=(80, 60))
    return directory


def test_a_process_without_memory_says_so(many: Path, tiny_weights: Path, tmp_path: Path) -> None:
    arguments = ("extract", "folder", many, "--out", tmp_path / "bank", *tiny(tiny_weights))
    options = ("--batch-size", 180_000, "--device", "cpu", "--limit", 2)
    printed = run(tmp_path / "printed", *arguments, *options, check=2, limits={resource.RLIMIT_DATA: 9 << 27})
    assert "memory. Try a smaller --batch-size" in printed


def test_a_part_without_a_shard_says_so(many: Path, tiny_weights: Path, tmp_path: Path) -> None:
    arguments = ("extract", "folder", many, "--out", tmp_path / "bank", *tiny(tiny_weights), "--layout", "shards")
    assert "Part 0/2 is empty" in patchbank(*arguments, "--limit", 3, "--partition", "0/2", check=0).stderr
    assert "is empty" not in patchbank(*arguments, "--limit", 3, "--partition", "1/2", check=0).stderr


def test_a_pipe_that_closes(many: Path, tiny_weights: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    patchbank("extract", "folder", many, "--out", bank, *tiny(tiny_weights), "--limit", "2", check=0)
    read, write = os.pipe()
    os.close(read)
    process = command("info", bank, "--json", tiny=False)
    done = subprocess.run(process, stdout=write, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    read, write = os.pipe()
    os.close(read)
    process = command("extract", "folder", many, "--out", tmp_path / "other", *tiny(tiny_weights))
    done = subprocess.run(process, stdout=write, stderr=write, cwd=REPOSITORY)
    os.close(write)
    assert done.returncode == 141 and not (tmp_path / "other").exists()  # not as if it were complete


def test_ctrl_c_while_modules_are_imported() -> None:
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from patchbank.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("patchbank.bank.reader", ["info", "bank"]),
        ("patchbank.datasets", ["extract", "folder", ".", "--out", "bank"]),
        ("patchbank.bank.check", ["verify", "bank"]),
        ("patchbank.show.showing", ["show", "bank", "key"]),
        ("patchbank.doctor", ["doctor"]),
    ],
)
def test_ctrl_c_twice_is_one_line(module: str, arguments: list[str], tmp_path: Path) -> None:
    """The second comes while the first is being dealt with."""
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            try: os.kill(os.getpid(), signal.SIGINT)\n"
        "            finally: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from patchbank.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    stages = {"Listing images"} & set(done.stderr.splitlines())
    [line] = set(done.stderr.splitlines()) - stages
    assert line.startswith("note: stopped")
