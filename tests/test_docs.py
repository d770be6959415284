"""The pages: their snippets run in their order, their links lead somewhere, and the site needs no other host."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import patchbank as public
from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.cli.application import app
from patchbank.datasets.example import write_sample
from patchbank.encoders.openai.registry import MODELS
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.files import sha256_of
from tests.support import REPOSITORY, TINY, TINY_VOCABULARY, parse_line, patchbank

DOCS = REPOSITORY / "docs"
FILES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = {page.relative_to(REPOSITORY).as_posix(): page for page in FILES}

# What is in a line of shell, or a block of Python, that does not run here; and why. `patchbank` is parsed all the same.
NOT_RUN = {
    "pip install": "installs packages",
    "--install-completion": "changes the shell's own files",
    "uvx ": "installs packages",
    "pipx ": "installs packages",
    "patchbank demo": "tests/cli/test_demo.py runs it",
    "patchbank bench": "takes minutes",
    "patchbank doctor": "measures the machine: tests/test_doctor.py runs it",
    "python -m benchmarks": "takes minutes",
    "python examples/prompt_adapter": "tests/cli/test_demo.py runs it",
    "python examples/union_probe": "tests/cli/test_demo.py runs it",
    "timm/": "needs trained weights",
    "open_clip/": "needs trained weights",
    "transformers/": "needs trained weights",
    "laion.pt": "needs trained weights",
    "--text": "needs a text tower of full size",
    "extract tar": "needs a set of tars",
    "extract parquet": "needs a set of tables",
    "--device cuda": "needs GPUs",
    "sbatch": "needs a cluster",
    "torchrun": "starts processes, which know no stand-ins of the weights",
    "ray ": "needs a cluster",
    "s3://": "needs a bucket",
    "hf://": "needs a repository: tests/remote/test_hub.py has one",
    "hf ": "needs a repository",
    "aws ": "needs a bucket",
    "bank = open_bank(directory)": "lines of EZ-HOI's own module: tests/test_ezhoi.py runs them in one like it",
    "class Toy": "an excerpt of tests/toy_family.py",
}
EXAMPLES_ONLY = {"docs/reference/commands.md"}  # commands with names to be replaced, as --help prints them


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each."""
    for found in re.finditer(r"^```(\S*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        yield found[1], found[2]


def lines_of(shell: str) -> list[str]:
    return [line for line in shell.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def not_run(text: str) -> str:
    return next((why for part, why in NOT_RUN.items() if part in text), "")


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with what the pages name; beside it, as `home`, OpenAI's models, a head wide and of six layers."""
    place = tmp_path_factory.mktemp("docs") / "place"
    home = place.parent / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name, width in (("ViT-B/16", 512), ("ViT-L/14@336px", 64)):
            official = MODELS[name]
            model = replace(official, width=TINY.width, layers=6, output_dim=width)
            weights = home / ".cache/clip" / official.file_name
            write_untrained(model, weights, vocabulary=TINY_VOCABULARY)
            patch.setitem(MODELS, name, replace(model, sha256=sha256_of(weights)))
        demo = place / "patchbank-demo"
        write_sample(demo)
        for dataset, split in (("hicodet", "train"), ("hicodet", "test"), ("vcoco", "train"), ("vcoco", "val")):
            bank = demo / f"{dataset}_pkl_files/demo_img_{dataset}_{split}"
            extract(load_dataset(dataset, demo, split), bank, ExtractConfig(layout="ezhoi"))
            shutil.copytree(bank, place / bank.parent.name / bank.name.replace("demo", "clipbase"))
        images = shutil.copytree(demo / "hicodet/hico_20160224_det/images/train2015", place / "IMAGES")
        shutil.copy(images / "HICO_train2015_00000001.jpg", images / "photo.jpg")
        extract(load_dataset("folder", images), place / "BANK", ExtractConfig())
        made = open_bank(demo / "hicodet_pkl_files/demo_img_hicodet_train")
        (place / "PICKLES").mkdir()
        for key in made:
            (place / "PICKLES" / f"{Path(key).stem}_clip.pkl").write_bytes(pickle.dumps(made[key]))
        boxes = {"file_name": "photo.jpg", "boxes": [[10, 20, 110, 220]], "labels": [0], "scores": [0.9]}
        (place / "DETECTIONS").write_text(json.dumps(boxes) + "\n")
        for name, target in (("EZ-HOI", demo), ("hicodet", demo / "hicodet"), ("vcoco", demo / "vcoco")):
            (place / name).symlink_to(os.path.relpath(target, place))
        (place / "examples").symlink_to(REPOSITORY / "examples")
        yield place


@pytest.fixture
def place(_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, an EZ-HOI checkout with the demo in it."""
    made: Path = shutil.copytree(_template, tmp_path / "place", symlinks=True)
    monkeypatch.setenv("HOME", str(_template.parent / "home"))
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    return made


def run(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of shell. A bank that a command makes replaces what an earlier one made under its name."""
    words = shlex.split(os.path.expandvars(line), comments=True)
    if assigned := re.fullmatch(r"([A-Z]+)=(.*)", words[0]):
        return monkeypatch.setenv(assigned[1], assigned[2])
    if words[0] != "patchbank":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash", "-euc", line], cwd=place, env=os.environ | {"PATH": path})
        return done.check_returncode()
    words, out = (words[:-2], words[-1]) if ">" in words else (words, os.devnull)
    made = words[3:4] if words[1] in ("convert", "import") else []
    if words[1] == "extract" and "--out" in words and "--partition" not in words:
        made = [words[words.index("--out") + 1]]
    if made and (place / made[0]).is_dir():
        shutil.rmtree(place / made[0])
    printed = patchbank(*words[1:], check=0, directory=place).stdout
    Path(place, out).write_text(printed)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_its_snippets_run_in_their_order(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    for language, text in fences(PAGES[page]):
        if language == "python" and not not_run(text):
            exec(compile(re.sub(r"num_workers=\d+", "num_workers=0", text), page, "exec"), names)
        elif language == "python":
            assert "excerpt" in not_run(text) or compile(text, page, "exec")
        elif language == "sh":
            for line in lines_of(text):
                if page not in EXAMPLES_ONLY and not not_run(line):
                    run(line, place, monkeypatch)
                elif re.search(r"(^|[ '])patchbank [a-z]", line):
                    parse_line(line)
        elif language == "json":
            json.loads(text)
        else:
            assert language in ("python", "text"), f"{page}: a fence without a language that is known: {text[:60]}"


def test_all_that_does_not_run_is_there() -> None:
    snippets = [text for page in PAGES.values() for _, text in fences(page)]
    assert not [part for part in NOT_RUN if not any(part in text for text in snippets)]


def test_options_in_sentences_are_options() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, page in PAGES.items():
        for text in re.findall(r"`patchbank ([a-z][^`]*)`", page.read_text()):
            words = text.split()
            assert words[0] in commands, f"{name}: patchbank {text}"
            command = commands[words[0]]
            known = [command, *getattr(command, "commands", {}).values()]
            options = {option for each in known for parameter in each.params for option in parameter.opts}
            found = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
            assert found <= options, f"{name}: patchbank {text}"


def anchors(page: Path) -> set[str]:
    """GitHub's, of the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match("https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert found.is_file(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: {target}"


def test_fifteen_questions_have_their_answers() -> None:
    rows = re.findall(r"^\| .*\? \| \[.*?\]\((.*?)\) \|$", (DOCS / "questions.md").read_text(), re.MULTILINE)
    assert len({*rows}) == 15  # and `test_its_links_lead_somewhere` follows them


def test_the_page_of_the_api_has_every_name() -> None:
    found = re.findall(r"^::: patchbank\.(\w+)$", (DOCS / "reference/python.md").read_text(), re.MULTILINE)
    assert sorted(found) == sorted({*public.__all__} - {"__version__"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly; with --quiet, mkdocs would count no warnings."""
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.full
def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert {"index.html", "reference/python/index.html", "examples/slurm.sh/index.html"} <= pages.keys()
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^\">]*", text)
        assert not loaded, f"{name}: {loaded}"
        assert str(REPOSITORY) not in text, name
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text()), path
    api = pages["reference/python/index.html"]
    assert all(f'id="patchbank.{name}"' in api for name in {*public.__all__} - {"__version__"})


@pytest.mark.parametrize("page", [*PAGES, "examples/quickstart.ipynb"])
def test_a_page_installs_a_checkout_and_not_a_name_that_anybody_may_register(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    assert not re.search(r"""pip install [\\"']*patchbank|pypi\.org/project/patchbank""", text)
