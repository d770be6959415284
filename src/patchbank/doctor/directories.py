"""Directories listed once each: which names are there, and which differ from the wanted ones by case only.

A list names tens of thousands of images. One listing answers for all of them what a look at each would, in a
hundredth of the time on a network file system.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_DEPTH, _COUNT = 4, 200  # how far and how wide a search goes


class Directories:
    """Listings of directories, kept.

    Attributes:
        unreadable: directories that are there and could not be listed, and why.
    """

    def __init__(self) -> None:
        self.unreadable: dict[Path, str] = {}
        self._listed: dict[Path, tuple[frozenset[str], frozenset[str]]] = {}

    def files(self, directory: Path) -> frozenset[str]:
        """Names of the files in it, links to files included; none where it is not there or cannot be listed."""
        return self._list(directory)[0]

    def directories(self, directory: Path) -> frozenset[str]:
        """Names of the directories in it, likewise."""
        return self._list(directory)[1]

    def twin(self, root: Path, place: str) -> Path | None:
        """`place` below `root` under these very names, or else under names that differ by case only."""
        candidates = [root]
        for part in place.split("/"):
            candidates = [
                candidate / name
                for candidate in candidates
                for name in sorted(frozenset().union(*self._list(candidate)), key=lambda name: (name != part, name))
                if name.lower() == part.lower()
            ]
        return candidates[0] if candidates else None

    def below(self, starts: Iterable[Path]) -> Iterator[Path]:
        """The directories `starts` and what lies below them, nearest first, none twice, within bounds."""
        level, entered = list(starts), set[str]()
        for _ in range(_DEPTH):
            following: list[Path] = []
            for directory in level:
                real = os.path.realpath(directory)
                if real in entered:
                    continue
                if len(entered) == _COUNT:
                    return
                entered.add(real)
                yield directory
                following += [directory / name for name in sorted(self.directories(directory))]
            level = following

    def _list(self, directory: Path) -> tuple[frozenset[str], frozenset[str]]:
        if directory not in self._listed:
            self._listed[directory] = self._read(directory)
        return self._listed[directory]

    def _read(self, directory: Path) -> tuple[frozenset[str], frozenset[str]]:
        files, directories = [], []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if _is(entry, "dir"):
                        directories.append(entry.name)
                    elif _is(entry, "file"):
                        files.append(entry.name)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no name that a file system has
            pass
        except OSError as error:
            self.unreadable[directory] = error.strerror or str(error)
        else:
            if not os.access(directory, os.X_OK):  # its names can be read, but nothing in it
                self.unreadable[directory] = os.strerror(errno.EACCES)
        return frozenset(files), frozenset(directories)


def _is(entry: os.DirEntry[str], kind: str) -> bool:
    """Asks the file system only about links: what they lead to may be gone."""
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:
        return False


def exists(path: Path) -> bool:
    """Whether something is there; not where a directory on the way may not be entered, or the name cannot be."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """Whether a directory is there, likewise."""
    return exists(path) and path.is_dir()


def is_file(path: Path) -> bool:
    """Whether a file is there, likewise."""
    return exists(path) and path.is_file()


def closed(path: Path) -> Path | None:
    """The first on the way to `path`, itself included, that this user may not enter or read; None where all is open."""
    for place in reversed((path, *path.parents)):
        if exists(place) and not os.access(place, os.R_OK | (os.X_OK if is_directory(place) else 0)):
            return place
    return None


def needed_rename(root: Path, actual: Path, wanted: Path) -> tuple[Path, Path]:
    """(from, to): the one rename that brings `actual`, the twin of `wanted`, nearer to it. Its target is free."""
    parts = list(zip(actual.relative_to(root).parts, wanted.relative_to(root).parts, strict=True))
    for count in range(1, len(parts) + 1):
        here = root.joinpath(*(part for part, _ in parts[:count]))
        there = root.joinpath(*(part for _, part in parts[:count]))
        if not os.path.lexists(there):
            break
    return here, there
