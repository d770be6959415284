"""Print the page of commands: `python scripts/options.py > docs/reference/commands.md`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

from patchbank.cli.application import app

HEAD = """# Commands and options

Made by `python scripts/options.py > docs/reference/commands.md`; `patchbank COMMAND --help` prints the same.

In Python, the options under Model, Bank, Machine and Several machines, `--limit` and `--overwrite` are the fields of
`ExtractConfig`: `--batch-size 8` is `ExtractConfig(batch_size=8)`."""


def page() -> str:
    """The text of docs/reference/commands.md."""
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    extract = commands.pop("extract").commands
    panels: dict[str, list[str]] = {}  # heading -> rows of extract's commands
    having: dict[str, list[str]] = {}  # row -> the commands that have it
    for name, command in extract.items():
        for option in options(command):
            row = row_of(option)
            if row not in having:
                panels.setdefault(option.rich_help_panel or "Run", []).append(row)
            having.setdefault(row, []).append(f"`{name}`")
    parts = [HEAD, f"## `patchbank extract {' | '.join(extract)}`", examples(extract.values())]
    helps = {name: command.help.replace("\n\n", "\n\n    ") for name, command in extract.items()}
    parts.append("\n".join(f"- `{name}`: {each}" for name, each in helps.items()))
    for panel, rows in panels.items():
        few = {row: f"{', '.join(having[row])} only" for row in rows if len(having[row]) < len(extract)}
        parts += [f"### {panel}", table(f"{row[:-2]} ({few[row]}) |" if row in few else row for row in rows)]
    for name, command in commands.items():
        parts += [f"## `patchbank {name}`", command.help, examples([command])]
        rows = [row_of(option) for option in options(command)]
        if own := [row for row in rows if row not in having]:
            parts.append(table(own))
        if shared := [f"`{row.split('`')[1]}`" for row in rows if row in having]:
            parts.append(f"As for `extract`: {', '.join(shared)}.")
    return "\n\n".join(parts) + "\n"


def options(command: Any) -> list[Any]:
    """A command's options, without its arguments."""
    return [each for each in command.params if each.param_type_name == "option"]


def row_of(option: Any) -> str:
    """A row of a table: the option, its default, its meaning."""
    name = " ".join(["`, `".join(sorted(option.opts, reverse=True)), option.metavar]).strip()
    default = "required" if option.required else option.show_default or ""
    return f"| `{name}` | {default} | {option.help} |"


def table(rows: Iterable[str]) -> str:
    """Rows under a head."""
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def examples(commands: Iterable[Any]) -> str:
    """The commands' examples, to be copied."""
    return "\n".join(["```sh", *(each.epilog.removeprefix("Example: ") for each in commands), "```"])


if __name__ == "__main__":
    print(page(), end="")
