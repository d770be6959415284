"""The log of the runs that made a bank: ``runs/*.json``, a file for each run that ended, which never changes.

They are no part of the bank: deleting them loses only what `patchbank report` says of the runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from patchbank.locations import is_remote, remotely

DIRECTORY = "runs"
_LARGEST = 1 << 16  # bytes of a file that is looked at
MOST_RUNS = 1000  # the latest ones are read

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run did.

    Attributes:
        began: when, in UTC: ``2026-01-31T12:00:00Z``.
        seconds: how long it took, without loading the model.
        images, failures, remaining: written; not to be extracted; left to do.
        bytes_written: of features.
        waited: seconds waited for each stage, of all its processes together.
        bound: the stage that bounds it, or None.
        device: what it computed on: ``cpu``, ``cuda:0,1``.
        engine: ``local`` or ``ray``.
        partition: ``0/1`` is the whole.
        versions: of the libraries.
        untrained: whether the weights are known to be random numbers.
    """

    began: str
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    images: _Count
    failures: _Count
    remaining: _Count
    bytes_written: _Count
    waited: dict[str, float] = field(default_factory=dict)
    bound: str | None = None
    device: str
    engine: str
    partition: str
    versions: dict[str, str] = field(default_factory=dict)
    untrained: bool = False

    @property
    def images_per_second(self) -> float:
        """Failures not counted."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def copy_runs(bank: Path, copy: Path) -> None:
    """Note the runs of a bank with a copy of it, which they made too. What cannot be noted is left out."""
    for run in read_runs(bank):
        with contextlib.suppress(OSError):
            write_run(copy, run)


def write_run(bank: Path, run: Run) -> None:
    """Note a run. Raises OSError where nothing can be written."""
    content = (json.dumps(asdict(run), indent=1) + "\n").encode()
    stamp = "".join(each for each in run.began if each.isalnum())
    name = f"{stamp}-{hashlib.sha256(content).hexdigest()[:16]}.json"
    if is_remote(bank):
        remotely(bank / DIRECTORY / name, lambda files, path: files.pipe_file(path, content))
        return
    directory = bank / DIRECTORY
    directory.mkdir(exist_ok=True)
    temporary = directory / f".{name}"
    try:
        temporary.write_bytes(content)
        temporary.rename(directory / name)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_runs(bank: Path) -> list[Run]:
    """The runs that were noted, in the order in which they began; what cannot be read is passed over."""
    try:
        names = sorted(_names(bank))[-MOST_RUNS:]
    except OSError:
        return []
    runs = []
    for name in names:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            runs.append(msgspec.json.decode(_content(bank / DIRECTORY / name), type=Run))
    return sorted(runs, key=lambda run: run.began)


def _names(bank: Path) -> list[str]:
    directory = bank / DIRECTORY
    if is_remote(bank):
        listed = remotely(directory, lambda files, path: files.ls(path, detail=False))
        found = [entry.rstrip("/").rpartition("/")[2] for entry in listed]
    else:
        found = os.listdir(directory)  # noqa: PTH208
    return [name for name in found if name.endswith(".json") and not name.startswith(".")]


def _content(path: Path) -> bytes:
    if is_remote(path):
        content: bytes = remotely(path, lambda files, where: files.cat_file(where, start=0, end=_LARGEST))
        return content
    if not path.is_file():  # of a pipe, nothing may ever come
        raise OSError("no file")
    with open(path, "rb") as file:
        return file.read(_LARGEST)


def remove_runs(bank: Path) -> None:
    """Delete what was noted; of a bank that is started anew."""
    try:
        names = _names(bank)
    except OSError:
        return
    for name in names:
        path = bank / DIRECTORY / name
        with contextlib.suppress(OSError):
            remotely(path, lambda files, where: files.rm_file(where)) if is_remote(bank) else path.unlink()
    if not is_remote(bank):
        with contextlib.suppress(OSError):
            (bank / DIRECTORY).rmdir()
