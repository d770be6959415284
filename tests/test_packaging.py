"""The wheel and the source distribution: what is in them, and that they install and run. And the citation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import patchbank
from tests.support import REPOSITORY


def run(*command: object, **options: object) -> str:
    """What a program prints, without this process's PYTHONPATH. Asserts that it succeeds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def tracked() -> set[str]:
    """The files that git knows, but CI's own."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a checkout")
    files = run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    return {name for name in files if (REPOSITORY / name).is_file() and not name.startswith(".ci/")}


def built(place: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it, of a copy of the repository's files."""
    for name in tracked():
        (place / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, place / "copy" / name)
    # Without isolation, which would need an index.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", place / "copy")
    [source], [wheel] = (place / "dist").glob("*.tar.gz"), (place / "dist").glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return built(tmp_path_factory.mktemp("first"))


@pytest.mark.full
def test_they_hold_the_repositorys_files_and_render_on_an_index(distributions: tuple[Path, Path]) -> None:
    source, wheel = distributions
    top = f"patchbank-{patchbank.__version__}"
    with tarfile.open(source) as archive:
        assert set(archive.getnames()) == {f"{top}/{name}" for name in (*tracked(), "PKG-INFO")}
    package = {name.removeprefix("src/") for name in tracked() if name.startswith("src/")}
    about = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == package | {f"{top}.dist-info/{name}" for name in about}
    run(sys.executable, "-m", "twine", "check", "--strict", source, wheel)


@pytest.mark.full
def test_they_are_the_same_bytes_wherever_they_are_built(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    for first, second in zip(distributions, built(tmp_path), strict=True):
        assert first.name == second.name and first.read_bytes() == second.read_bytes()


@pytest.mark.full
def test_the_wheel_installs_and_runs(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """In a new environment that finds this one's other packages."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    python = venv / "bin/python"
    run(*(sys.executable, "-m", "pip", "--python", python, "install"), "--no-deps", "--no-index", distributions[1])
    door = "import patchbank; print(patchbank.__file__); [getattr(patchbank, name) for name in patchbank.__all__]"
    assert Path(run(python, "-c", door, cwd=tmp_path).strip()).is_relative_to(packages)
    program = venv / "bin/patchbank"
    assert run(program, "--version") == f"patchbank {patchbank.__version__}\n"
    assert "patchbank extract folder IMAGES" in run(program, "--help")


def test_the_citation_is_of_this_version() -> None:
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [patchbank.__version__]
    heading = re.search(r"^## (\S+) \((.*)\)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading and heading[1] == patchbank.__version__
    released = [heading[2]] if heading[2] != "unreleased" else []
    assert re.findall(r"^date-released: (.*)$", citation, re.MULTILINE) == released
