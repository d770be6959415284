"""The index: what a bank knows of each sample, and which of two entries counts.

It consists of parts, each a header document that never changes and is named by its hash. In shards the features lie
behind the document in the same file; in ``ezhoi`` they lie beside it, as pickles. A bank is the union of its parts, and
the greatest entry of each key counts: joining the same parts in any order gives the same result. So any number of
processes can write one bank without a lock.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from patchbank import __version__
from patchbank.bank.manifest import Manifest
from patchbank.budget import without_collection
from patchbank.errors import BankError
from patchbank.features import Input
from patchbank.files import all_plain, is_plain, parse_json
from patchbank.regions import Region

FORMAT, FORMAT_VERSION = "patchbank", 2

_Natural = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)]
_Size = tuple[_Positive, _Positive]
_LATER = ("cover", "crop", "rgb", "pool", "cut")  # fields of `Input` that the format's first banks lack
_DIGITS = b"0123456789abcdef"


class Entry(NamedTuple):
    """What a bank knows of one sample.

    Attributes:
        key: the sample's.
        size: (width, height) of the image in pixels; None for a failure, and where it is unknown (imported pickles).
        sha256: of the features as they are stored; None for a failure.
        failure: why the sample has no features; None if it has.
        revision: how often an entry of this sample was revoked.
        region: the part of the image that it is; None for an image, and a failure.
    """

    key: str
    size: tuple[int, int] | None = None
    sha256: str | None = None
    failure: str | None = None
    revision: int = 0
    region: Region | None = None

    def after(self, known: Entry | None) -> Entry:
        """This entry, with the revision that makes it count over a known one."""
        if known is None:
            return self
        same = self._replace(revision=known.revision)
        return same if _rank(same) >= _rank(known) else self._replace(revision=known.revision + 1)


def _rank(entry: Entry) -> tuple[object, ...]:
    """The greater entry of a key counts: the later revision, and a feature over a failure."""
    return entry.revision, entry.failure is None, entry.sha256 or "", entry.size or (), entry.failure or ""


def join(entries: dict[str, Entry], more: Iterable[Entry]) -> None:
    """Add entries to a mapping by key; the greater of two stays."""
    more = tuple(more)
    new = {entry.key: entry for entry in more}
    if len(new) == len(more) and entries.keys().isdisjoint(new):  # as in most banks, and faster
        entries.update(new)
        return
    for entry in more:
        known = entries.setdefault(entry.key, entry)
        if known is not entry and _rank(entry) > _rank(known):
            entries[entry.key] = entry


@dataclass(frozen=True, eq=False)
class Part:
    """One part of an index, read and checked.

    Attributes:
        path: its file.
        manifest: of the bank.
        number: its place in the bank; until they are joined, several parts may have the same number.
        features: entries of samples with features, in the order of the rows.
        failures: entries of samples without features.
        bytes: the file's size.
        begin: where the numbers begin in the file, in bytes.
    """

    path: Path
    manifest: Manifest
    number: int
    features: tuple[Entry, ...]
    failures: tuple[Entry, ...]
    bytes: int
    begin: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries of all its samples."""
        return self.features + self.failures


class Row(NamedTuple):
    """Where a feature lies: the index of a part in a list of them, and the row in that part."""

    part: int
    row: int


@without_collection()
def joined(parts: Iterable[Part]) -> dict[str, Entry]:
    """The entry of every key."""
    entries: dict[str, Entry] = {}
    for part in parts:
        join(entries, part.features)
        join(entries, part.failures)
    return entries


def failures_of(entries: Mapping[str, Entry]) -> dict[str, str]:
    """key -> reason, of the samples without features."""
    return {key: entry.failure for key, entry in entries.items() if entry.failure is not None}


@without_collection()
def rows_of(parts: Iterable[Part], entries: dict[str, Entry]) -> dict[str, Row]:
    """Where the features of the `joined` entries lie."""
    return {
        entry.key: Row(number, row)
        for number, part in enumerate(parts)
        for row, entry in enumerate(part.features)
        if entries[entry.key] is entry
    }


class _Samples(msgspec.Struct, gc=False, kw_only=True, omit_defaults=True):
    """Columns with an element for each feature, in the order of the rows."""

    keys: list[str]
    sizes: list[_Size | None]
    resized: list[_Size | None]
    offsets: list[tuple[int, int] | None]
    sha256: list[str]
    revisions: list[_Natural] | None = None
    regions: list[Region] | None = None


class _Failure(msgspec.Struct, gc=False, kw_only=True, omit_defaults=True):
    key: str
    failure: str
    revision: _Natural = 0


class _Document(msgspec.Struct, gc=False, kw_only=True):
    format: str
    version: object
    manifest: Manifest
    number: _Natural
    samples: _Samples
    failures: list[_Failure]


class _Head(msgspec.Struct, gc=False):
    format: str
    version: object


def write_document(manifest: Manifest, number: int, features: Sequence[Entry], failures: Sequence[Entry]) -> str:
    """The header document of a part, as JSON in ASCII."""
    # Once per size: pickles write their part again with every batch, and many images share a size.
    whole = not manifest.input.cut  # else a transform is of what was cut out
    transforms = {
        size: manifest.transform(size) if size is not None and whole else None
        for size in {each.size for each in features}
    }
    resized = {size: None if each is None else each.resized for size, each in transforms.items()}
    offsets = {size: None if each is None else each.offset for size, each in transforms.items()}
    revisions = [entry.revision for entry in features]
    regions = [entry.region for entry in features if entry.region is not None]
    samples = _Samples(
        keys=[entry.key for entry in features],
        sizes=[entry.size for entry in features],
        resized=[resized[entry.size] for entry in features],
        offsets=[offsets[entry.size] for entry in features],
        sha256=[entry.sha256 or "" for entry in features],
        revisions=revisions if any(revisions) else None,
        regions=regions or None,
    )
    document = _Document(
        format=FORMAT,
        version=FORMAT_VERSION,
        manifest=_lean(manifest),  # type: ignore[arg-type]
        number=number,
        samples=samples,
        failures=[_Failure(key=each.key, failure=each.failure or "", revision=each.revision) for each in failures],
    )
    with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate, which file names may hold
        if (text := msgspec.json.encode(document)).isascii():
            return text.decode()
    return json.dumps(msgspec.to_builtins(document), separators=(",", ":"))


def _lean(manifest: Manifest) -> dict[str, Any]:
    """A manifest without the fields that came later, where they say nothing: its bytes stay what they were."""
    made: dict[str, Any] = msgspec.to_builtins(manifest)  # of one that was read, without what was left out
    defaults = {each.name: each.default for each in fields(Input) if each.name in _LATER}
    said = made["input"].items()
    made["input"] = {name: value for name, value in said if name not in defaults or value != defaults[name]}
    for name in ("reduction", "regions"):
        if not getattr(manifest, name):
            made.pop(name, None)
    return made


def read_document(text: bytes | str, path: Path) -> tuple[Manifest, int, tuple[Entry, ...], tuple[Entry, ...]]:
    """The inverse of `write_document`: manifest, number, features, failures.

    Raises:
        ValueError, RecursionError: it is not such a document. (msgspec's errors are ValueErrors.)
        BankError: it has another format version; the message names `path`.
    """
    try:
        document: _Document = parse_json(text, _Document)
    except ValueError:
        _check_version(parse_json(text, _Head), path)
        raise
    _check_version(document, path)
    document.manifest.check()
    columns = document.samples
    count = len(columns.keys)
    revisions = columns.revisions or [0] * count
    regions: Sequence[Region | None] = columns.regions or [None] * count
    lengths = {
        len(each) for each in (columns.sizes, columns.resized, columns.offsets, columns.sha256, revisions, regions)
    }
    if lengths != {count}:
        raise ValueError("its columns differ in length")
    # All at once: msgspec's patterns take longer than all else here.
    if not {64}.issuperset(map(len, columns.sha256)) or "".join(columns.sha256).encode().translate(None, _DIGITS):
        raise ValueError("its sha256 are not 64 hexadecimal digits each")
    features = tuple(map(Entry, columns.keys, columns.sizes, columns.sha256, repeat(None), revisions, regions))
    failures = tuple(Entry(each.key, failure=each.failure, revision=each.revision) for each in document.failures)
    keys = [*columns.keys, *(each.key for each in failures)]
    if not all_plain(keys) and (wrong := [key for key in keys if not is_plain(key)]):
        raise ValueError(f"the key {wrong[0]!r} would lead out of the bank")
    return document.manifest, document.number, features, failures


def _check_version(head: _Head | _Document, path: Path) -> None:
    if head.format != FORMAT:
        raise ValueError(f"its format is {head.format!r}")
    if head.version == FORMAT_VERSION:
        return
    fix = "Use the version of patchbank that wrote it."
    if head.version == 1:
        fix = (
            "Extract again; or run `patchbank convert --layout ezhoi` of patchbank 0.1, and then `patchbank import` of "
            "this version."
        )
    raise BankError(
        f"{path} has format version {head.version!r}; patchbank {__version__} reads version {FORMAT_VERSION}. {fix}"
    )
