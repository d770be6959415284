"""The README and docs/reference/commands.md say what the program does: its options, its commands."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import typer

from patchbank.cli.application import app
from patchbank.config import ExtractConfig
from tests.support import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
OPTIONS = (REPOSITORY / "docs/reference/commands.md").read_text()


def options(command: str) -> dict[str, object]:
    """The long options of an extract subcommand, with their defaults."""
    extract = typer.main.get_command(app).commands["extract"]  # type: ignore[attr-defined]
    return {
        name: parameter.default
        for parameter in extract.commands[command].params
        for name in parameter.opts
        if name.startswith("--") and name != "--help"
    }


def test_the_page_of_options_is_the_programs() -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "scripts/options.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == OPTIONS, "python scripts/options.py > docs/reference/commands.md"
    assert "(docs/reference/commands.md)" in README


@pytest.mark.parametrize("command", ["hicodet", "vcoco", "folder", "tar", "parquet"])
def test_every_option_is_documented_and_every_documented_option_is_there(command: str) -> None:
    section = OPTIONS.split("## `patchbank extract")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(--[a-z-]+).*?` \| .*? ?\| (.*) \|$", section, flags=re.MULTILINE)
    few = re.compile(r"\((`.*`) only\)$")
    documented = {name for name, says in rows if not (only := few.search(says)) or f"`{command}`" in only[1]}
    assert documented == options(command).keys()


def test_a_folder_takes_the_same_less_what_it_has_not() -> None:
    assert options("hicodet").keys() - options("folder").keys() == {"--root", "--split", "--images", "--annotations"}
    assert options("folder").keys() - options("hicodet").keys() == {"--round-weights"}


def test_the_defaults_are_extract_configs() -> None:
    config = ExtractConfig()
    for name in ("precision", "dtype", "decode", "device", "compile"):
        default = getattr(config, name)
        assert options("hicodet")[f"--{name}"] == default
        assert re.search(rf"^\| `--{name} .*` \| {default} \|", OPTIONS, flags=re.MULTILINE)
    assert config.resize is None and "| `--resize RESIZE` | the model's own: " in OPTIONS


def test_the_commands_that_are_promised() -> None:
    assert 'pip install -e ".[demo]" && patchbank demo' in README
    assert 'pip install -e ".[test]" && pytest' in README
    for example in re.findall(r"^patchbank extract (\w+)", README, flags=re.MULTILINE):
        assert options(example)


def test_every_extra_that_is_named_is_there_and_every_extra_is_named() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named: set[str] = set()
    for place in ("src", "docs", "examples", "scripts", "benchmarks", "README.md", "CONTRIBUTING.md", "pyproject.toml"):
        for path in [REPOSITORY / place, *(REPOSITORY / place).rglob("*")]:
            if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml"):
                for names in re.findall(r'(?:patchbank|"\.|`)\[([a-z0-9,-]+)\]', path.read_text()):
                    named |= {*names.split(",")}
    assert named == extras.keys()
