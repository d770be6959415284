"""The commands that put images right: under their listed names, and into their own directory."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from patchbank.doctor.findings import run, shell

_RULES = 4  # more different renames than these are not worth a loop each
_ORDINARY = re.compile(r"[\w.-]+", re.ASCII)  # names that a shell's patterns take as they are


def rename_files(directory: Path, pairs: Sequence[tuple[str, str]]) -> str:
    """Commands that rename files to their listed names.

    Args:
        directory: where they lie.
        pairs: (name on disk, listed name), which differ by case only.
    """
    rules = list(dict.fromkeys(_rule(*pair) for pair in pairs))
    if len(rules) <= _RULES and None not in rules:
        return run(*(_loop(directory, *rule) for rule in rules if rule))
    first = run(shell("mv", directory / pairs[0][0], directory / pairs[0][1]))
    return f"Rename each of them as it is listed, such as:\n{first}"


def _rule(actual: str, listed: str) -> tuple[str, str, str] | None:
    """("suffix", ".JPG", ".jpg") or ("prefix", "hico_", "HICO_"): what a whole series of names has in common."""
    if not _ORDINARY.fullmatch(actual):
        return None
    differing = [index for index, (one, other) in enumerate(zip(actual, listed, strict=False)) if one != other]
    if len(actual) != len(listed) or not differing:
        return None
    dot = actual.rfind(".")
    if differing[0] > dot >= 0:
        return "suffix", actual[dot:], listed[dot:]
    end = differing[-1] + 1
    if end > dot >= 0 or any(letter.isdigit() for letter in actual[: differing[0]]):
        return None
    while end < len(actual) and (actual[end].isalpha() or actual[end] == "_"):
        end += 1
    return "prefix", actual[:end], listed[:end]


def _loop(directory: Path, kind: str, actual: str, listed: str) -> str:
    if kind == "suffix":
        each, name = f"*{shlex.quote(actual)}", f'"${{f%{actual}}}"{shlex.quote(listed)}'
    else:
        each, name = f"{shlex.quote(actual)}*", f'{shlex.quote(listed)}"${{f#{actual}}}"'
    return f'(cd {shlex.quote(str(directory))} && for f in {each}; do mv "$f" {name}; done)'


def swap(one: Path, other: Path) -> str:
    """Commands that exchange the names of two files or directories."""
    aside = one.with_name(f"{one.name}.aside")
    return run(shell("mv", one, aside), shell("mv", other, one), shell("mv", aside, other))


def move_directory(source: Path, target: Path) -> str:
    """Commands that give a directory another place, which is not there yet or empty."""
    clear = [shell("rmdir", target)] if target.is_dir() else []
    parent = [] if target.parent.is_dir() else [shell("mkdir", "-p", target.parent)]
    return run(*parent, *clear, shell("mv", source, target))


def move_files(source: Path, target: Path, names: Sequence[str], others: Sequence[str]) -> str | None:
    """A command that moves the files `names` out of `source`; None where no pattern tells them from `others`."""
    first, last = min(names), max(names)  # what these two have in common, all between them have
    common = next((index for index, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))
    prefix = first[:common].rstrip("0123456789")
    if not prefix or "/" in prefix or any(other.startswith(prefix) for other in others):
        return None
    made = [] if target.is_dir() else [shell("mkdir", "-p", target)]
    # Not `mv *`: the names of a whole split are longer than a command line may be.
    find = shell("find", source, "-maxdepth", "1", "-name", f"{prefix}*", "-exec", "mv", "{}", target, ";")
    return run(*made, find)


def fetch_images(dataset: str, split: str, root: Path) -> str:
    """Where a data set's images come from."""
    if dataset == "vcoco":
        archive = f"{split}2014.zip"
        place = root / "vcoco/mscoco2014"
        return run(
            f"curl -fLO http://images.cocodataset.org/zips/{archive}",
            *([] if place.is_dir() else [shell("mkdir", "-p", place)]),
            shell("unzip", "-q", "-n", archive, "-d", place),
        )
    unpack = run(shell("tar", "-xzf", "hico_20160224_det.tar.gz", "-C", root / dataset))
    return f"Unpack HICO-DET's archive (again):\n{unpack}"
