"""What `--help` shows, at the widths that people read it at; and that what it says is so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from patchbank.cli import extract
from patchbank.cli.application import app
from patchbank.config import ExtractConfig, Partition
from patchbank.errors import ConfigError


def tree(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command by its words; the first is the program itself, without any."""
    command = command or typer.main.get_command(app)
    yield path, command
    for name, each in getattr(command, "commands", {}).items():
        yield from tree(each, (*path, name))


COMMANDS = dict(tree())


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_is_fit_to_read(path: tuple[str, ...], columns: int) -> None:
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [*path, "--help"])
    assert done.exit_code == 0
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    assert max(map(len, done.output.splitlines())) <= columns
    assert not re.search(r"<[a-zA-Z]|\[\[|\{\w*[A-Z]|x>=|default: \(|\[/?dim\]|\\\[", done.output)
    assert lines[-1].startswith(f"Example: {' '.join(['patchbank', *path])}")


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_one_bank_has_no_word_of_several(kind: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["extract", kind, "--help"])
    assert not re.search("hicodet|vcoco|ROOT|each bank", done.output)


def test_extract_is_listed_first() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert re.search(r"Commands ─+╮\n│ (\w+)", done.output)[1] == "extract"  # type: ignore[index]


@pytest.mark.parametrize("path", [path for path in COMMANDS if not hasattr(COMMANDS[path], "commands")], ids=" ".join)
def test_the_example_is_a_command_of_the_program(path: tuple[str, ...]) -> None:
    words = shlex.split(COMMANDS[path].epilog.removeprefix("Example: patchbank ").partition(" > ")[0])
    assert tuple(words[: len(path)]) == path
    COMMANDS[path].make_context("patchbank", words[len(path) :])


# Each field of ExtractConfig with another value than its default, less the model and what excludes another.
OTHERS: dict[str, Any] = {
    "weights": Path("own.pt"),
    "checkpoints": Path("elsewhere"),
    "activation": "gelu",
    "round_weights": True,
    "precision": "bf16",
    "output": ("cls", "block:6"),
    "input_size": (448, 672),
    "pool_grid": 2,
    "layout": "ezhoi",
    "dtype": "float16",
    "shard_size": 1000,
    "resize": "pad",
    "decode": "fast",
    "device": "cpu",
    "batch_size": 3,
    "compile": "off",
    "workers": 2,
    "engine": "ray",
    "ray_address": "local",
    "num_workers": 4,
    "num_gpus_per_worker": 0.5,
    "partition": Partition(1, 3),
    "limit": 9,
}


def test_what_the_command_line_says_is_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ExtractConfig] = []
    monkeypatch.setattr(extract, "run_jobs", lambda load, run: made.extend(config for _, _, config in load()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").touch()
    assert ExtractConfig().__dict__.keys() - OTHERS.keys() == {"model", "overwrite", "crop"}  # crop: of boxes alone
    for config in (ExtractConfig(), ExtractConfig(overwrite=True), ExtractConfig(**OTHERS)):
        assert all(getattr(config, name) != getattr(ExtractConfig(), name) for name in OTHERS) or config.limit is None
        arguments = ["extract", "folder", "images", "--out", "bank", *config.arguments()]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert made.pop() == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0."),
        (["--num-gpus-per-worker", "-1"], "--num-gpus-per-worker must be at least 0, not -1.0."),
        (["--workers", "5000"], "--workers must be at most 1024, not 5000."),
        (["--resize", "stretch"], "--resize must be one of center-crop, squash, pad, not 'stretch'."),
        (["--shard-size", "many"], "--shard-size: 'many' is no size in bytes, such as 256MB."),
        (["--partition", "1"], "--partition takes I/N, such as 0/4 (the first of four), not '1'."),
        (["--model", "ViT-B/16", "--model", "ViT-B/32"], "This command writes one bank; pass --model once."),
    ],
)
def test_a_wrong_value_is_named_as_an_option(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["extract", "folder", str(tmp_path), "--out", str(tmp_path / "bank"), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert message in done.exception.args[0]
