"""The ledger: one line an image, saying that its feature is there and whole, or why it is not.

It lies in the bank as ``index/<hash>.jsonl`` files, each named by its content and never changed, and is their union
(`patchbank.bank.entries`). A file is deleted only when another one is there that says everything it says. So nothing
that was committed is ever lost, and any number of processes can write, and tidy up, at once without a lock. At the
end of a run `compact` leaves one file, sorted by key: its bytes depend on what is in the bank and not on how it got
there.

The files have a directory to themselves so that it stays small: a listing of a large directory may miss a file
that is renamed while it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from patchbank.bank.entries import Entry, from_json, join, to_json
from patchbank.budget import without_collection
from patchbank.errors import BankError
from patchbank.files import fsync_directory, is_dangling, make_directory, parse_json, write_and_sync

DIRECTORY = "index"
_SUFFIX = ".jsonl"
_CHUNK = 1024  # entries a growing file holds before the next is begun
_ATTEMPTS = 100  # at reading what others are writing
_ROUNDS = 8  # of tidying up, while other processes go on writing


def parse_lines(content: bytes) -> list[Entry]:
    """The entries in a file of the ledger. Raises KeyError, TypeError or ValueError on anything else."""
    # One document is parsed several times faster than as many as there are images.
    values = parse_json(b"[" + content.rstrip().replace(b"\n", b",") + b"]")
    return [from_json(value) for value in values]


class Snapshot(NamedTuple):
    """What a ledger said at one time.

    Attributes:
        entries: by key.
        files: that they were read from.
    """

    entries: dict[str, Entry]
    files: list[Path]


def read_ledger(bank: Path, damaged: Literal["raise", "skip", "delete"] = "raise") -> dict[str, Entry]:
    """All entries of a bank, by key.

    Args:
        damaged: what to do about a file whose content is not what its name says: raise BankError; or leave it out,
            so that what it listed counts as not done and is made again; or delete it too.
    """
    return take_snapshot(bank, damaged).entries


def take_snapshot(bank: Path, damaged: Literal["raise", "skip", "delete"]) -> Snapshot:
    """As `read_ledger`, to be remembered."""
    return _read(bank / DIRECTORY, damaged)


def damaged_files(bank: Path) -> list[str]:
    """Names, relative to the bank, of the ledger's files whose content is not what their name says."""
    return [path.relative_to(bank).as_posix() for path in _files(bank / DIRECTORY) if _read_file(path) is None]


def remove_ledger(bank: Path) -> None:
    """Delete all of a bank's ledger."""
    for path in _files(bank / DIRECTORY):
        path.unlink(missing_ok=True)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"*{_SUFFIX}") if not is_dangling(path))


@without_collection()
def _read(
    directory: Path,
    damaged: Literal["raise", "skip", "delete"],
    known: Snapshot = Snapshot({}, []),  # noqa: B008
) -> Snapshot:
    """What a ledger says; the files in `known` never change, and are not read again, unless one of them has gone."""
    for _ in range(_ATTEMPTS):
        files: list[Path] = []
        try:
            there = _files(directory)
            if not set(known.files) <= set(there):
                known = Snapshot({}, [])
            entries = dict(known.entries)
            for path in there:
                if path in known.files:
                    files.append(path)
                elif (found := _read_file(path)) is not None:
                    join(entries, found)
                    files.append(path)
                elif damaged == "raise":
                    raise BankError(
                        f"{path} is damaged: its content is not what its name says. Run the same extraction again: "
                        "it makes anew what that file listed."
                    )
                elif damaged == "delete":
                    path.unlink(missing_ok=True)
            return Snapshot(entries, files)
        except FileNotFoundError:
            continue  # somebody tidied up meanwhile: what it held is in another file now
        except PermissionError as error:
            raise BankError(f"{error.filename} cannot be read: {error.strerror}.") from error
    raise BankError(f"{directory} changes too fast to be read.")


def _read_file(path: Path) -> list[Entry] | None:
    """The entries in one file; None where it is damaged."""
    content = path.read_bytes()
    if _name_for(content) != path.name:
        return None
    try:
        return parse_lines(content)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None


def _name_for(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:16]}{_SUFFIX}"


class Ledger:
    """One process's hand on a bank's ledger."""

    def __init__(
        self,
        bank: Path,
        scratch: Path,
        known: Snapshot = Snapshot({}, []),  # noqa: B008
        *,
        look: bool = True,
    ) -> None:
        """Read what is there, beside what is known. Damaged files are deleted, and what they listed is made again.

        Args:
            look: False takes what is known for all there is.
        """
        self._directory = bank / DIRECTORY
        self._scratch = scratch
        self._growing: dict[str, Entry] = {}
        self._growing_file: Path | None = None
        make_directory(self._directory)
        self.entries, self._files = _read(self._directory, "delete", known) if look else (dict(known.entries), [])

    def begin(self, known: Mapping[str, Entry]) -> None:
        """Go on with other images, of which this is known, in files of their own."""
        self.entries, self._files = dict(known), []
        self._growing, self._growing_file = {}, None

    def append(self, entries: Iterable[Entry]) -> None:
        """Make entries durable. Call it only when the features they tell of are."""
        entries = [entry.after(self.entries.get(entry.key)) for entry in entries]
        join(self.entries, entries)
        join(self._growing, entries)
        before, self._growing_file = self._growing_file, self._write(self._growing)
        if before not in (None, self._growing_file):
            before.unlink(missing_ok=True)
        if len(self._growing) >= _CHUNK:
            self._growing, self._growing_file = {}, None

    def compact(self) -> None:
        """Leave one file with everything that anybody has written so far."""
        self._growing, self._growing_file = {}, None
        for _ in range(_ROUNDS):
            files = _files(self._directory)
            if len(files) < 2 and {*files} <= {*self._files}:
                return
            self.entries, self._files = _read(self._directory, "delete")
            files = self._files
            if len(files) < 2:
                return
            kept = self._write(self.entries)
            self._files = [kept]
            for path in files:
                if path != kept:
                    path.unlink(missing_ok=True)

    def replace(self, entries: Iterable[Entry]) -> None:
        """Put these in the place of all that the ledger says. Only for one process alone."""
        kept = self._write({entry.key: entry for entry in entries})
        for path in _files(self._directory):
            if path != kept:
                path.unlink(missing_ok=True)
        self.entries = _read(self._directory, "delete").entries

    def _write(self, entries: Mapping[str, Entry]) -> Path:
        content = "".join(f"{json.dumps(to_json(entries[key]))}\n" for key in sorted(entries)).encode()
        path = self._directory / _name_for(content)
        if not path.exists():
            temporary = self._scratch / path.name
            write_and_sync(temporary, [content])
            temporary.rename(path)
            fsync_directory(self._directory)
        return path
