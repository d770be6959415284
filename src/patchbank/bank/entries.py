"""What a bank knows of one image, and which of two such pieces of knowledge counts.

Entries of one key have an order. A bank is the union of what lies in it, and of each key the greatest entry counts:
whoever joins the same files gets the same result, in any order. That is what lets several processes write one bank
without a lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from patchbank.files import is_plain


class Entry(NamedTuple):
    """What a bank knows of one image.

    Attributes:
        key: the image's.
        size: (width, height) of the original in pixels; None of an image that failed, and where it is not known
            (an adopted feature whose image was not at hand).
        sha256: of the feature as it is stored; None of an image that failed.
        failure: why there is no feature; None where there is one.
        revision: how often what was known of the image has been taken back.
        bytes: of the feature's file, where that is not the size that patchbank's own files have (adopted ones).
    """

    key: str
    size: tuple[int, int] | None = None
    sha256: str | None = None
    failure: str | None = None
    revision: int = 0
    bytes: int | None = None

    def after(self, known: Entry | None) -> Entry:
        """This entry, as it must be written where another is known, so that it is the greater one."""
        if known is None:
            return self
        same = self._replace(revision=known.revision)
        return same if _rank(same) >= _rank(known) else self._replace(revision=known.revision + 1)


def _rank(entry: Entry) -> tuple[object, ...]:
    """The greater entry of a key is the one that counts: the later revision, and a feature over a failure."""
    feature = entry.failure is None
    return entry.revision, feature, entry.sha256 or "", entry.size or (), entry.failure or "", entry.bytes or 0


def wins(entry: Entry, known: Entry | None) -> bool:
    """Whether `entry` counts and not `known`, another of the same key."""
    return known is None or _rank(entry) > _rank(known)


def join(entries: dict[str, Entry], more: Iterable[Entry]) -> None:
    """Add entries to a mapping by key; the greater of two stays."""
    for entry in more:
        known = entries.setdefault(entry.key, entry)
        if known is not entry and wins(entry, known):
            entries[entry.key] = entry


def to_json(entry: Entry) -> dict[str, Any]:
    """What is written of an entry; what is usual (revision 0) is left out."""
    unusual: dict[str, Any] = {"revision": entry.revision} if entry.revision else {}
    if entry.failure is not None:
        return {"key": entry.key, "failure": entry.failure} | unusual
    if entry.bytes is not None:
        unusual["bytes"] = entry.bytes
    return {"key": entry.key, "size": entry.size, "sha256": entry.sha256} | unusual


def from_json(value: Any) -> Entry:
    """The inverse of `to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    revision = value.get("revision", 0)
    if "failure" not in value:
        return make_feature(value["key"], value["size"], value["sha256"], revision, value.get("bytes"))
    key, failure = value["key"], value["failure"]
    if not (is_plain(key) and type(failure) is str and (revision == 0 or _natural(revision))):
        raise ValueError(f"the entry of {key!r} is no entry")
    return Entry(key, failure=failure, revision=revision)


def make_feature(key: Any, size: Any, sha256: Any, revision: Any = 0, bytes: Any = None) -> Entry:
    """An entry of a feature, of values read from a file. Raises TypeError or ValueError where they are none."""
    sound = type(sha256) is str and (revision == 0 or _natural(revision)) and (bytes is None or _natural(bytes))
    if size is not None:
        size = tuple(size)
        sound = sound and len(size) == 2 and _natural(size[0]) and _natural(size[1])
    if not sound:
        raise ValueError(f"the entry of {key!r} is no entry")
    if not is_plain(key):
        raise ValueError(f"{key!r} would lead out of the bank")
    return Entry(key, size, sha256, None, revision, bytes)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 62
