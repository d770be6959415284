"""The README says what the program does: its options, its commands, its Python."""

from __future__ import annotations

import re

import pytest
import typer

from patchbank.cli.main import app
from patchbank.config import ExtractConfig
from tests.support import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def options(command: str) -> dict[str, object]:
    """The long options of an extract subcommand, with their defaults."""
    extract = typer.main.get_command(app).commands["extract"]  # type: ignore[attr-defined]
    return {
        name: parameter.default
        for parameter in extract.commands[command].params
        for name in parameter.opts
        if name.startswith("--") and name != "--help"
    }


def documented() -> dict[str, str]:
    """The rows of the README's table of options: name -> default."""
    table = README.split("## Options of `extract`")[1].split("##")[0]
    found = {}
    for row in re.findall(r"^\| (`--.*?) \| (.*?) \|", table, flags=re.MULTILINE):
        for name in re.findall(r"--[a-z-]+", row[0]):
            found[name] = row[1].strip("`")
    return found


@pytest.mark.parametrize("command", ["hicodet", "vcoco"])
def test_every_option_is_documented_and_every_documented_option_is_there(command: str) -> None:
    assert documented().keys() == options(command).keys()


def test_a_folder_takes_the_same_less_what_it_has_not() -> None:
    assert options("hicodet").keys() - options("folder").keys() == {"--root", "--split", "--images", "--annotations"}
    assert options("folder").keys() <= options("hicodet").keys()


def test_the_defaults_are_extract_configs() -> None:
    config = ExtractConfig()
    for name in ("precision", "dtype", "resize", "decode", "device", "compile"):
        assert options("hicodet")[f"--{name}"] == getattr(config, name) == documented()[f"--{name}"]


def test_the_commands_that_are_promised() -> None:
    assert 'pip install -e ".[demo]" && patchbank demo' in README
    assert 'pip install -e ".[test]" && pytest' in README
    for example in re.findall(r"^patchbank extract (\w+)", README, flags=re.MULTILINE):
        assert options(example)


def test_its_python_compiles() -> None:
    for snippet in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        compile(snippet, "README.md", "exec")
