"""One shard: a safetensors file that says of itself all there is to know.

Its name holds a hash of its header, and the header the checksum of each image's features. So a shard never changes:
what has another content has another name, and what has the same name has the same content.

The header is written here and not by the safetensors package, which takes all tensors in memory at once, orders the
metadata as a hash map happens to and flushes nothing to the disk. What is written is read by that package.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchbank.bank.entries import Entry, from_json, make_feature, to_json
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import fields
from patchbank.bank.storage import Storage
from patchbank.errors import BankError
from patchbank.files import parse_json

METADATA = "patchbank"  # the one key of the header's metadata
_NAME = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.safetensors")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors package has it
_LENGTH = struct.Struct("<Q")


class ShardDamagedError(BankError):
    """A shard whose content is not what its name says, or that is cut short."""


@dataclass(frozen=True)
class Shard:
    """A shard's header, read and checked.

    Attributes:
        path: the file.
        manifest: of the bank that it is part of.
        number: its place in the bank; shards with new images may share one.
        features: one a row of its tensors, in their order.
        failures: of images that have no feature.
        bytes: the file's size.
    """

    path: Path
    manifest: Manifest
    number: int
    features: tuple[Entry, ...]
    failures: tuple[Entry, ...]
    bytes: int


def shard_names(storage: Storage) -> list[str]:
    """The files in a place that have a shard's name, in order."""
    return sorted(name for name in storage.names() if _NAME.fullmatch(name))


def number_of(name: str) -> int:
    """The number in a shard's name."""
    return int(name.split("-")[1])


def make_header(
    manifest: Manifest, number: int, features: Sequence[Entry], failures: Sequence[Entry]
) -> tuple[bytes, str]:
    """What stands before a shard's numbers, and the shard's file name.

    After it come, for each of `packing.fields` in turn, the numbers of all features in order.
    """
    transforms = [None if entry.size is None else manifest.transform(entry.size) for entry in features]
    content: dict[str, Any] = {
        **manifest.to_dict(),
        "number": number,
        "keys": [entry.key for entry in features],
        "sizes": [entry.size for entry in features],
        "resized": [None if transform is None else transform.resized for transform in transforms],
        "offsets": [None if transform is None else transform.offset for transform in transforms],
        "sha256": [entry.sha256 for entry in features],
    }
    if any(entry.revision for entry in features):
        content["revisions"] = [entry.revision for entry in features]
    content["failures"] = [to_json(entry) for entry in failures]
    metadata = json.dumps(content, separators=(",", ":"))
    header = {"__metadata__": {METADATA: metadata}, **_tensors(manifest, len(features))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return _LENGTH.pack(len(text)) + text, f"shard-{number:05}-{hashlib.sha256(text).hexdigest()[:16]}.safetensors"


def _tensors(manifest: Manifest, count: int) -> dict[str, Any]:
    """The safetensors header's entries of the tensors of so many images."""
    tensors: dict[str, Any] = {}
    end = 0
    for field in fields(manifest):
        begin, end = end, end + count * field.nbytes
        tensors[field.name] = {
            "dtype": _DTYPES[field.dtype],
            "shape": [count, *field.shape],
            "data_offsets": [begin, end],
        }
    return tensors


def read_shard(storage: Storage, name: str) -> Shard:
    """Read and check a shard's header; its numbers are not looked at.

    Raises:
        FileNotFoundError: it is not there (any more).
        ShardDamagedError: its content is not what its name says, or it is cut short.
        BankError: it cannot be read, or is of a later format.
    """
    path = storage.directory / name
    match = _NAME.fullmatch(name)
    if match is None:
        raise BankError(f"{path} does not have a shard's name, shard-NUMBER-HASH.safetensors.")
    try:
        start, size = storage.head(name)
        length = _LENGTH.unpack(start[: _LENGTH.size])[0] if len(start) >= _LENGTH.size else 0
        end = _LENGTH.size + (length if length <= _LARGEST_HEADER else 0)
        if len(start) < end:
            start += storage.read(name, len(start), end)
        text = start[_LENGTH.size : end]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not text or hashlib.sha256(text).hexdigest()[:16] != match[2]:
        raise ShardDamagedError(f"{path} is damaged: its header is not what its name says.")
    try:
        header = parse_json(text)
        content = parse_json(header["__metadata__"][METADATA])
        manifest = Manifest.from_dict(content, path)
        features, failures = _entries(content)
        tensors = _tensors(manifest, len(features))
        rows = {len(content[column]) for column in ("keys", "resized", "offsets")}
        found = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        if (content["number"], rows, found) != (int(match[1]), {len(features)}, tensors):
            raise ValueError("its parts do not fit together")
        if manifest.layout != "shards":
            raise ValueError(f"a shard of the layout {manifest.layout}")
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ShardDamagedError(f"{path} is damaged: {type(error).__name__} {error}.") from error
    expected = _LENGTH.size + length + tensors["patch_tokens"]["data_offsets"][1]
    if size != expected:
        raise ShardDamagedError(f"{path} is damaged: it has {size:,} bytes, and its header says {expected:,}.")
    return Shard(path, manifest, content["number"], features, failures, size)


def _entries(content: dict[str, Any]) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    keys, sizes, sha256 = content["keys"], content["sizes"], content["sha256"]
    revisions = content.get("revisions", [0] * len(keys))
    if not len(keys) == len(sizes) == len(sha256) == len(revisions):
        raise ValueError("its columns are of different lengths")
    return tuple(map(make_feature, keys, sizes, sha256, revisions)), tuple(map(from_json, content["failures"]))
