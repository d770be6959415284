"""The ledger: one line an image, saying that its feature is there and whole, or why it is not.

It lies in the bank as ``index-<hash>.jsonl`` files, each named by its content and never changed. A writer replaces
a file by first writing a larger one and then deleting the smaller; so at every instant the union of the files that
are there holds everything that was ever committed, and any number of processes can write, and tidy up, at once
without a lock. At the end of a run `compact` leaves one file, sorted by key: its bytes depend on what is in the
bank and not on how it got there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from patchbank.errors import BankError
from patchbank.files import fsync_directory, is_plain, write_and_sync

_PREFIX, _SUFFIX = "index-", ".jsonl"
_CHUNK = 1024  # entries a growing file holds before the next is begun
_ROUNDS = 8  # of tidying up, while other processes go on writing


class Entry(NamedTuple):
    """What the ledger knows of one image.

    Attributes:
        key: the image's.
        size: (width, height) of the original in pixels; None of an image that failed.
        sha256: of the feature's file; None of an image that failed.
        failure: why there is no feature; None where there is one.
    """

    key: str
    size: tuple[int, int] | None = None
    sha256: str | None = None
    failure: str | None = None

    def to_line(self) -> str:
        """One line of JSON. Keys that are no valid Unicode survive: JSON escapes them."""
        if self.failure is not None:
            return json.dumps({"key": self.key, "failure": self.failure})
        return json.dumps({"key": self.key, "size": self.size, "sha256": self.sha256})


def parse_lines(content: bytes) -> list[Entry]:
    """The inverse of `Entry.to_line`, for a whole file. Raises KeyError, TypeError or ValueError on anything else."""
    # One document is parsed several times faster than as many as there are images.
    values = json.loads(b"[" + content.rstrip().replace(b"\n", b",") + b"]")
    for value in values:
        if not is_plain(value["key"]):
            raise ValueError(f"{value['key']!r} would lead out of the bank")
    return [
        Entry(value["key"], failure=value["failure"])
        if "failure" in value
        else Entry(value["key"], tuple(value["size"]), value["sha256"])
        for value in values
    ]


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}"))


def merge(entries: dict[str, Entry], more: Iterable[Entry]) -> None:
    """Add entries to a mapping by key: a feature wins over a failure, else the later one wins."""
    for entry in more:
        known = entries.get(entry.key)
        if known is None or known.failure is not None or entry.failure is None:
            entries[entry.key] = entry


def read_ledger(directory: Path, damaged: Literal["raise", "skip", "delete"] = "raise") -> dict[str, Entry]:
    """All entries of a bank, by key.

    Args:
        damaged: what to do about a file whose content is not what its name says: raise BankError; or leave it out,
            so that what it listed counts as not done and is made again; or delete it too.
    """
    while True:
        entries: dict[str, Entry] = {}
        try:
            for path in _files(directory):
                content = path.read_bytes()
                if _name_for(content) == path.name:
                    merge(entries, parse_lines(content))
                elif damaged == "raise":
                    raise BankError(
                        f"{path} is damaged: its content is not what its name says. Run the same extraction again: "
                        "it makes anew what that file listed."
                    )
                elif damaged == "delete":
                    path.unlink(missing_ok=True)
            return entries
        except FileNotFoundError:
            continue  # somebody tidied up meanwhile: what it held is in another file now


def remove_ledger(directory: Path) -> None:
    """Delete all of a bank's ledger."""
    for path in _files(directory):
        path.unlink(missing_ok=True)


def _name_for(content: bytes) -> str:
    return f"{_PREFIX}{hashlib.sha256(content).hexdigest()[:16]}{_SUFFIX}"


class Ledger:
    """One process's hand on a bank's ledger."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        """Read what is there. Damaged files are deleted, so that what they listed is made again."""
        self._directory = directory
        self._scratch = scratch
        self._growing: dict[str, Entry] = {}
        self._growing_file: Path | None = None
        self.entries = read_ledger(directory, damaged="delete")

    def append(self, entries: list[Entry]) -> None:
        """Make entries durable. Call it only when the features they tell of are."""
        merge(self.entries, entries)
        merge(self._growing, entries)
        before, self._growing_file = self._growing_file, self._write(self._growing)
        if before not in (None, self._growing_file):
            before.unlink(missing_ok=True)
        if len(self._growing) >= _CHUNK:
            self._growing, self._growing_file = {}, None

    def compact(self, forget: Collection[str] = ()) -> None:
        """Leave one file with everything that anybody has written so far, less the keys to `forget`."""
        self._growing, self._growing_file = {}, None
        for key in forget:
            self.entries.pop(key, None)
        for _ in range(_ROUNDS):
            files = _files(self._directory)
            if len(files) < 2 and not forget:
                return
            # Read what others wrote; of images that both know, the own word is the later.
            entries = read_ledger(self._directory, damaged="delete")
            for key in forget:
                entries.pop(key, None)
            merge(entries, self.entries.values())
            kept = self._write(entries)
            for path in files:
                if path != kept:
                    path.unlink(missing_ok=True)
            self.entries, forget = entries, ()

    def _write(self, entries: Mapping[str, Entry]) -> Path:
        content = "".join(f"{entries[key].to_line()}\n" for key in sorted(entries)).encode()
        path = self._directory / _name_for(content)
        if not path.exists():
            temporary = self._scratch / path.name
            write_and_sync(temporary, [content])
            temporary.rename(path)
            fsync_directory(self._directory)
        return path
