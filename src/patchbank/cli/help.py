"""The look of ``--help``: no Python types, defaults within the text, an example at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup


class _Plain:
    """The difference of `Command` and `Group` from typer's."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for each in params:
            if each.param_type_name == "argument":
                vars(each)["display_type_rich"] = lambda **_: None  # the name is enough
                continue
            if each.is_flag:
                each.metavar = ""
            if isinstance(each.show_default, str):
                each.help += f" [dim]{escape(f'[default: {each.show_default}]')}[/dim]"
                each.show_default = False
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [each.replace("{", "").replace("}", "") for each in pieces]


class Command(_Plain, TyperCommand):
    """A command."""


class Group(_Plain, TyperGroup):
    """Commands; extract is listed first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the help."""
        return sorted(super().list_commands(ctx), key=lambda name: name != "extract")


def add_command(app: typer.Typer, name: str, command: Callable[..., None], text: str | None) -> None:
    """Add a command. `text` is its help; the last paragraph is an example."""
    # typer would keep the line breaks of the source.
    *about, example = (" ".join(each.split()) for each in (text or "").split("\n\n"))
    app.command(name, cls=Command, help="\n\n".join(about), epilog=f"Example: {escape(example)}")(command)
