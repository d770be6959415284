"""What the doctor says: findings, each with its mend. Data only, nothing is printed here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from patchbank.config import ExtractConfig

# ok: as it should be. note: worth knowing, stops nothing. problem: an extraction would stop, or lack images.
Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: the thing, in a word or two: ``hicodet train``, ``ViT-B/16``, ``disk``.
        level: how it is.
        text: how it is, for people.
        mend: how to mend it, a step a line; a line that begins with ``$ `` is a command to be run. None where nothing
            is to mend.
        data: how it is, for programs: what JSON can hold.
    """

    what: str
    level: Level
    text: str
    mend: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found.

    Attributes:
        root: the EZ-HOI root.
        sections: title -> findings, in the order in which they are shown.
        commands: what is left to run once there is no problem; empty where every bank is complete.
    """

    root: Path
    sections: Mapping[str, tuple[Finding, ...]]
    commands: tuple[str, ...]

    @property
    def problems(self) -> list[Finding]:
        """The findings that are problems."""
        return [finding for found in self.sections.values() for finding in found if finding.level == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "root": str(self.root),
            "problems": len(self.problems),
            "commands": list(self.commands),
            "findings": [
                {"section": title, **asdict(finding)} for title, found in self.sections.items() for finding in found
            ],
        }


def shell(*words: object) -> str:
    """A command line, its words quoted where a shell needs it."""
    return shlex.join(str(word) for word in words)


def run(*commands: str) -> str:
    """Commands, as lines of a mend."""
    return "\n".join(f"$ {command}" for command in commands)


def relative(path: Path, root: Path) -> str:
    """A path as the text of a finding shows it: from the root on, where it lies there."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def extract_command(root: Path, dataset: str, *options: object) -> str:
    """``patchbank extract ...`` for this root."""
    at = () if root == Path() else ("--root", root)
    return shell("patchbank", "extract", dataset, *at, *options)


def given(config: ExtractConfig) -> tuple[str, ...]:
    """The options, as `extract` takes them, with which a configuration differs from the default."""
    return config.arguments()
