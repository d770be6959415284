"""Records: what `python -m benchmarks` found on one machine, as JSON and as Markdown."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown as table
from patchbank.bench.machine import words

RESULTS = Path(__file__).parent / "results"

# Quoted, with its spaces; or as far as spaces, quotes, brackets and a sentence's punctuation. `images/s` is none.
_PATH = re.compile(
    r"""(?<=(["'`]))(?:/|~[\w.-]*/|\w+://)(?:(?!\1).)+(?=\1)"""
    r"""|(?:\w+:/|(?<![\w.)\]]))(?:~[\w.-]*)?/+(?=[^\s/])[^\s"'`,;<>()\[\]{}]*[^\s"'`,;<>()\[\]{}.:]"""
    r"""|(?<!\w)~[A-Za-z_][\w-]*"""
)


def load(path: Path) -> dict[str, Any]:
    """A record: its machine, and by name each benchmark's date, arguments, seconds, and its JSON line as `result`, or
    else the reason why it was `skipped` or `failed`."""
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record, and its tables beside it: five significant digits; PATH for paths and URLs, they name people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_public(record), indent=1)
    flat = re.sub(r"\[[^]\[{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)  # a row on a line
    path.write_text(f"{flat}\n")
    path.with_suffix(".md").write_text(page(load(path)))


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {_public(name): _public(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(each) for each in value]
    if isinstance(value, str):
        return _PATH.sub("PATH", value)
    return float(f"{value:.5g}") if isinstance(value, float) else value


def slug(machine: dict[str, Any]) -> str:
    """A name for files: ``amd-epyc-25-17-2-cores``."""
    parts = [machine["processor"], *machine["family_and_model"], machine["cores"], "cores", machine["gpu"] or ""]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


def today() -> str:
    """The date in UTC: ``2026-11-28``."""
    return datetime.now(UTC).date().isoformat()


def page(record: dict[str, Any]) -> str:
    """All of a record as Markdown."""
    parts = [f"# Benchmarks: {words(record['machine'])}"]
    for name, found in record["benchmarks"].items():
        parts += [f"## {name}", section(name, found)]
    return "\n\n".join(parts) + "\n"


def section(name: str, found: dict[str, Any]) -> str:
    """One benchmark's command and date, and its tables, or why there are none."""
    command = f"`{' '.join(filter(None, ['python -m', f'benchmarks.{name}', found['arguments']]))}`, {found['date']}"
    for state in ("skipped", "failed"):
        if state in found:
            return f"{command}: {state}: {found[state]}"
    result = found["result"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    left_out = [f"Skipped: {each}." for each in result["skipped"]]
    return "\n\n".join([f"{command}, {found['seconds']:.0f} s; {versions}.", *map(table, result["tables"]), *left_out])
