"""The Python packages around: versions, and the `clip` that EZ-HOI's own scripts would take."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from patchbank.bank.manifest import library_versions
from patchbank.doctor.directories import is_file
from patchbank.doctor.findings import Finding, run, shell

_NAMES = ("clip", "clip-anytorch", "openai-clip")  # what the stock package is called in an index
# OpenAI's forward keeps the [CLS] token alone; EZ-HOI's fork has this line as a comment.
_STOCK = re.compile(rb"^\s*x = self\.ln_post\(x\[:, 0", re.MULTILINE)
_NONE_USED = "patchbank uses no clip package."


def examine_environment(root: Path) -> list[Finding]:
    """Versions, and the `clip` package."""
    versions = library_versions()
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [Finding(what="versions", level="ok", text=f"{text}.", data=versions), _clip(root)]


def _clip(root: Path) -> Finding:
    """Which package `import clip` would take in a script that lies in the root. Imports nothing."""
    fork = root / "CLIP" / "clip"
    has_fork = is_file(fork / "model.py")
    path = run(f"export PYTHONPATH={shlex.quote(str(fork.parent.absolute()))}${{PYTHONPATH:+:$PYTHONPATH}}")
    place = _location(_find(root))
    data = {"location": None if place is None else str(place), "fork": str(fork) if has_fork else None}

    def finding(**values: object) -> Finding:
        return Finding(what="clip", data=data, **values)  # type: ignore[arg-type]

    if place is None:
        own = "; EZ-HOI's fork lies in CLIP/clip" if has_fork else ""
        return finding(
            level="ok",
            text=f"no clip package can be imported{own}. {_NONE_USED}",
            mend=f"For EZ-HOI's own scripts:\n{path}" if has_fork else None,
        )
    if has_fork and os.path.realpath(place) == os.path.realpath(fork):
        return finding(level="ok", text=f"import clip gives EZ-HOI's fork, CLIP/clip. {_NONE_USED}")
    stock = _is_stock(place)
    kind = "OpenAI's stock package" if stock else "neither OpenAI's package nor this root's fork"
    if stock is None:
        kind = "a package that cannot be told"
    effect = (
        "EZ-HOI's own scripts run with it without a word and write (511,) tensors in place of (196, 512)."
        if stock
        else "EZ-HOI's own scripts need their fork, CLIP/clip."
    )
    uninstall = run(shell("pip", "uninstall", name)) if (name := _distribution(place)) else None
    first = path if has_fork else "Get the CLIP directory of the EZ-HOI repository, and put it first on PYTHONPATH."
    return finding(
        level="note",
        text=f"import clip gives {place}, {kind}. {effect} {_NONE_USED}",
        mend=f"{first}\nOr:\n{uninstall}" if uninstall else first,
    )


def _find(root: Path) -> ModuleSpec | None:
    importlib.invalidate_caches()
    try:
        # A script's own directory comes first. The second call knows what only an import hook would find.
        return PathFinder.find_spec("clip", [str(root.absolute()), *sys.path]) or importlib.util.find_spec("clip")
    except (ImportError, ValueError, OSError):  # a module that is loaded without saying where it came from
        return None


def _location(spec: ModuleSpec | None) -> Path | None:
    """The package's directory, or the module's file."""
    if spec is None:
        return None
    directories = list(spec.submodule_search_locations or [])
    if directories:
        return Path(directories[0])
    return Path(spec.origin) if spec.origin else None


def _is_stock(place: Path) -> bool | None:
    """Whether its image tower gives [CLS] alone; None where that cannot be told."""
    try:
        return _STOCK.search((place / "model.py").read_bytes()) is not None
    except OSError:
        return None


def _distribution(place: Path) -> str | None:
    """What pip calls the installed package that lies there."""
    for name in _NAMES:
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if os.path.realpath(str(found.locate_file("clip"))) == os.path.realpath(place):
            return name
    return None
