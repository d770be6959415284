"""The log of the runs that made a bank: ``runs/*.json``, a file for each run that ended, which never changes.

They are no part of the bank: deleting them loses only what `patchbank report` says of the runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from patchbank.bank.storage import Storage, storage_of
from patchbank.files import is_plain, write_whole
from patchbank.locations import is_remote, remotely

DIRECTORY = "runs"
_LARGEST = 1 << 16  # bytes that are read of a file
_KEY = 32  # bytes of the key of seals
_OURS = re.compile(r"\d+T\d+Z-[0-9a-f]{16}\.json")  # the names that `write_run` gives
MOST_RUNS = 1000  # the latest ones are read

_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run did.

    Attributes:
        began: when, in UTC: ``2026-01-31T12:00:00Z``.
        seconds: how long it took, without loading the model.
        images, failures, remaining: written; failed; left to do.
        bytes_written: of features.
        waited: seconds waited for each stage, of all its processes together.
        bound: the stage that bounds it, or None.
        device: what it computed on: ``cpu``, ``cuda:0,1``.
        engine: ``local`` or ``ray``.
        partition: ``0/1`` is the whole.
        versions: of the libraries.
        warnings: of the decoders about images that were read all the same, each kind in a line.
        untrained: whether the weights are known to be random numbers.
        folder: of the images, relative to the bank; empty for annotated datasets, files and stores.
        example: an image in it: where there is none such, it is another folder.
        seal: proves that this user's run has written both. A bank from others must not choose which images are read.
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
    warnings: list[str] = field(default_factory=list)
    untrained: bool = False
    folder: str = ""
    example: str = ""
    seal: str = ""

    @property
    def images_per_second(self) -> float:
        """Failures not counted."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def copy_runs(bank: Path, copy: Path) -> None:
    """Copy a bank's log to a copy of the bank, which those runs made too. What cannot be copied is left out."""
    for run in read_runs(bank):
        folder = relative(bank / run.folder, copy) if _is_sealed(run) else ""
        with contextlib.suppress(OSError):
            write_run(copy, replace(run, folder=folder, seal=seal(folder, run.example)))


def seal(folder: str, example: str) -> str:
    """A mark that only this user can make, by a key in the home directory; empty without one, or without a folder."""
    try:
        place = Path("~/.cache/patchbank/key").expanduser()
        if folder and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), open(place, "xb", opener=partial(os.open, mode=0o600)) as file:
                file.write(os.urandom(_KEY))
        key = place.read_bytes() if folder else b""
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return ""
    text = f"{folder}\0{example}".encode(errors="surrogatepass")
    return hmac.new(key, text, "sha256").hexdigest() if len(key) == _KEY else ""


def _is_sealed(run: Run) -> bool:
    return bool(run.seal) and hmac.compare_digest(run.seal.encode(), seal(run.folder, run.example).encode())


def relative(images: Path, bank: Path) -> str:
    """The path from a bank to a folder; empty if one of them is in an object store."""
    return "" if is_remote(images) or is_remote(bank) else os.path.relpath(images.resolve(), bank.resolve())


def remembered_images(bank: Path) -> Path | None:
    """The folder of images that the last run read, if it is still there."""
    for run in () if is_remote(bank) else reversed(read_runs(bank)):
        if _is_sealed(run) and is_plain(run.example):
            found = Path(os.path.relpath(bank.resolve() / run.folder))
            with contextlib.suppress(OSError, ValueError):
                return found if (found / run.example).is_file() else None
    return None


def write_run(bank: Path, run: Run) -> None:
    """Log a run. Raises OSError where nothing can be written."""
    content = (json.dumps(asdict(run), indent=1) + "\n").encode()
    stamp = "".join(each for each in run.began if each.isalnum())
    path = bank / DIRECTORY / f"{stamp}-{hashlib.sha256(content).hexdigest()[:16]}.json"
    if is_remote(bank):
        remotely(path, lambda files, where: files.pipe_file(where, content))
    else:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content)


def read_runs(bank: Path) -> list[Run]:
    """The logged runs, in the order in which they began; what cannot be read is skipped."""
    log = storage_of(bank / DIRECTORY)
    try:
        names = sorted(_names(log))[-MOST_RUNS:]
    except OSError:
        return []
    runs = []
    for name in names:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            runs.append(msgspec.json.decode(log.read(name, 0, _LARGEST), type=Run))
    return sorted(runs, key=lambda run: run.began)


def _names(log: Storage) -> list[str]:
    return [name for name in log.names() if name.endswith(".json") and not name.startswith(".")]


def remove_runs(bank: Path) -> None:
    """Delete the log of a bank that is started from scratch; ignore failures."""
    log = storage_of(bank / DIRECTORY)
    with contextlib.suppress(OSError):
        for name in filter(_OURS.fullmatch, _names(log)):
            with contextlib.suppress(OSError):
                log.delete(name)
        if not is_remote(bank):
            log.directory.rmdir()
