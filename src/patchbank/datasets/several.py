"""Datasets in several large files, tars or tables: the files that patterns name, and their images in one list.

File t of the list has the positions from ``t * POSITIONS`` on. So its images share batches and shards with no other
file's, and a process with some of the files need not open the others.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from patchbank.config import WHOLE, Partition
from patchbank.datasets.samples import NOT_PLAIN, Dataset, Sample
from patchbank.datasets.sources import Source
from patchbank.errors import ConfigError, DatasetError, install
from patchbank.files import is_plain
from patchbank.locations import is_remote, locate, remotely

POSITIONS = 1_000_000  # for each file
LARGEST = 900_000  # images a file: the shard of the last ones must not reach the next file's positions
MISSING = "missing: there is no such file"

_AT_ONCE = 8  # files that are indexed
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Content:
    """The images in one file.

    Attributes:
        source: the file.
        images: (key, number in the file, place in it) of each.
        damage: why some or all are missing; None if the file is whole.
        refused: key -> why that image cannot be read.
    """

    source: Source
    images: Sequence[tuple[str, int, tuple[int, int]]] = ()
    damage: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)


def expand(patterns: Iterable[str | PurePath]) -> list[Path]:
    """The files that patterns name, in their order, each once.

    A pattern is a path or a URL. webdataset expands braces, ``::`` and ``${...}``; then ``*``, ``?`` and ``[...]``
    match existing files (in a URL, ``*`` alone). A pattern that is an existing local file's name is that file.

    Raises:
        ConfigError: a pattern cannot be expanded, or would run a command; or webdataset is not installed.
        DatasetError: no file matches.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        names = [os.fspath(pattern)]
        if not os.path.exists(pattern):  # noqa: PTH110  # a pattern may be a URL
            names = _braces(names[0])
        found |= {str(place): place for name in names for place in _matches(name)}
    if not found:
        raise ConfigError("Name at least one file.")
    return list(found.values())


def _braces(pattern: str) -> list[str]:
    expanded = [pattern]
    if "{" in pattern or "::" in pattern:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise ConfigError(
                f"{pattern} is expanded by webdataset: name the files themselves, or {install('tar')}"
            ) from None
        try:
            expanded = expand_urls(pattern)
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"{pattern} cannot be expanded: {error}.") from None
    if any(each.startswith("pipe:") for each in expanded):
        raise ConfigError(f"{pattern}: pipe: runs a command, which patchbank refuses. Name the files themselves.")
    return expanded


def _matches(name: str) -> list[Path]:
    place = locate(name)
    if is_remote(place):
        if "*" not in name:
            return [place]
        try:
            names: list[str] = remotely(
                place, lambda files, path: [files.unstrip_protocol(each) for each in sorted(files.glob(path))]
            )
        except OSError as error:
            raise DatasetError(f"{name} cannot be listed: {error.strerror or error}.") from error
        matching = [locate(each) for each in names]
    elif _WILD.isdisjoint(name) or place.exists():
        return [place]
    else:
        matching = [Path(each) for each in sorted(glob.glob(str(place)))]  # noqa: PTH207
    if not matching:
        raise DatasetError(f"No file matches {name}.")
    return matching


def gather(
    name: str, places: Sequence[Path], read: Callable[[Path], Content], *, part: Partition = WHOLE, prefix: bool = False
) -> Dataset:
    """The images of a part of the files, in the files' order.

    Args:
        read: a file's content; called from several threads. A fault of one file is its `damage`.
        prefix: put the file's name, without its extension, before every key; and so many of its directories that the
            files differ.

    Raises:
        DatasetError: all files of the part are missing, or have no image; a file has more than `LARGEST`; or two files
            have the same key.
    """
    mine = part.of(len(places))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="index") as threads:
        contents = list(threads.map(read, [places[index] for index in mine]))
    samples: list[Sample] = []
    owners: dict[str, Path] = {}
    damaged: dict[str, str] = {}
    refused: dict[str, str] = {}
    prefixes = _prefixes(places) if prefix else [""] * len(places)
    for index, content in zip(mine, contents, strict=True):
        place = content.source.location
        if content.damage is not None:
            damaged[str(place)] = content.damage
        refused |= {f"{place}/{key}": reason for key, reason in content.refused.items()}
        for key, number, where in content.images:
            if number >= LARGEST:
                raise DatasetError(f"{place} holds more than {LARGEST:,} images: split it into several files.")
            key = prefixes[index] + key
            if not is_plain(key):
                refused[f"{place}/{key}"] = NOT_PLAIN
                continue
            if (other := owners.setdefault(key, place)) is not place:
                fix = "Keys must differ: make a bank of each."
                if not prefix:
                    fix = "With --prefix (prefix=True) the keys begin with the file's name, so that they differ."
                raise DatasetError(f"{other} and {place} both hold {key!r}. {fix}")
            samples.append(Sample(key, content.source, index * POSITIONS + number, where))
    if mine and all(reason == MISSING for reason in damaged.values()) and len(damaged) == len(mine):
        others = f", nor does any other of the {len(mine):,} files named" if len(mine) > 1 else ""
        raise DatasetError(f"{places[mine[0]]} does not exist{others}.")
    if not samples and (part == WHOLE or len(damaged) == len(mine) > 0):
        reasons = "".join(f"\n  {place}: {reason}" for place, reason in list((damaged | refused).items())[:5])
        raise DatasetError(f"There are no images in {places[mine[0]]}{', ...' if len(mine) > 1 else ''}.{reasons}")
    return Dataset(name, None, places[0].parent, tuple(samples), part=part, damaged=damaged | refused)


def _prefixes(places: Sequence[Path]) -> list[str]:
    """Each file's name, with as many of its directories as tell them all apart."""
    names = [str(place.with_suffix("")).split("/") for place in places]
    deepest = max(map(len, names), default=1)
    depths = (depth for depth in range(1, deepest) if len({tuple(name[-depth:]) for name in names}) == len(names))
    depth = next(depths, 1)
    return ["/".join(name[-depth:]) + "/" for name in names]


def reason_of(error: OSError) -> str:
    """Why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return MISSING
    return f"it cannot be read: {error.strerror or str(error) or type(error).__name__}"
