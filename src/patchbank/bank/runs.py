"""The runs that made a bank, as far as they came to their end: ``runs/*.json``, a file each that never changes.

They are not part of what the bank is: whoever deletes them loses nothing but what `patchbank report` says of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from patchbank.locations import is_remote, remotely

DIRECTORY = "runs"
_LARGEST = 1 << 16  # bytes of a file that is looked at
_NEVER = 1 << 62  # that many of anything
MOST_RUNS = 1000  # of the latest runs that are looked at


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
    seconds: float
    images: int
    failures: int
    remaining: int
    bytes_written: int
    waited: Mapping[str, float] = field(default_factory=dict)
    bound: str | None = None
    device: str
    engine: str
    partition: str
    versions: Mapping[str, str] = field(default_factory=dict)
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
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            runs.append(_run(json.loads(_content(bank / DIRECTORY / name))))
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


def _run(content: Any) -> Run:
    """A run as it was written. Raises TypeError, ValueError where it is none."""
    if not isinstance(content, dict):
        raise TypeError("no run")
    names = {each.name for each in fields(Run)}
    run = Run(**{name: value for name, value in content.items() if name in names})
    kinds = {"str": str, "int": int, "bool": bool}
    for name, hint in get_type_hints(Run).items():
        value = getattr(run, name)
        kind = kinds.get(getattr(hint, "__name__", ""))
        if kind and type(value) is not kind:
            raise TypeError(name)
    if type(run.seconds) not in (int, float) or not isinstance(run.versions, dict) or not isinstance(run.waited, dict):
        raise TypeError("seconds, versions or waited")
    if not all(isinstance(each, str) for each in run.versions.values()):
        raise TypeError("versions")
    if not all(
        0 <= each < _NEVER for each in (run.images, run.failures, run.remaining, run.bytes_written, run.seconds)
    ):
        raise ValueError("counts")
    if not all(type(each) in (int, float) for each in run.waited.values()) or not isinstance(run.bound, str | None):
        raise TypeError("waited")
    return run


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
