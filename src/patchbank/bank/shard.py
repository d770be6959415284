"""Shards: safetensors files whose header holds a part of the index, and the features of its samples behind it.

The header is written here and not by the safetensors package, which takes all tensors in memory at once, orders the
metadata as a hash map happens to and flushes nothing to the disk. That package reads what is written here.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import checksum, fields, memory, pack
from patchbank.bank.payload import Column, Feature, Kept, Payload, Rows
from patchbank.bank.remote import RemoteColumn
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.locations import is_remote

METADATA = "patchbank"  # the one key of the header's metadata
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors package has it
_LENGTH = struct.Struct("<Q")


class Shards(Payload):
    """The layout ``shards``: features behind the index, in the same file."""

    layout: ClassVar[Layout] = "shards"
    pattern = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.safetensors")
    name = "shard-{:05}-{}.safetensors"
    durable_at_once = False

    def frame(self, document: str, manifest: Manifest, count: int) -> tuple[bytes, bytes]:
        """The length and header of a safetensors file; the header is what the name's hash is of."""
        header = {"__metadata__": {METADATA: document}, **_tensors(manifest, count)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers are aligned
        return _LENGTH.pack(len(text)) + text, text

    def unframe(self, start: bytes, size: int, name: str) -> tuple[bytes, int]:
        """The header, and where the numbers begin; reads on where `start` ends too early."""
        length = _LENGTH.unpack(start[: _LENGTH.size])[0] if len(start) >= _LENGTH.size else 0
        end = _LENGTH.size + (length if length <= min(size, _LARGEST_HEADER) else 0)
        if len(start) < end:
            start += self.parts.read(name, len(start), end)
        return start[_LENGTH.size : end], end

    def document_in(self, text: bytes) -> tuple[str, dict[str, Any]]:
        """The document in a header, and what the header says of its tensors."""
        header = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
        return header.pop("__metadata__")[METADATA], header

    def check(self, part: Part, tensors: dict[str, Any]) -> None:
        """Raise ValueError where header and document do not fit together, or the file is cut short."""
        expected = _tensors(part.manifest, len(part.features))
        if tensors != expected:
            raise ValueError("its tensors are not those that its index describes")
        end = part.begin + max((each["data_offsets"][1] for each in expected.values()), default=0)
        if part.bytes != end:
            raise ValueError(f"it has {part.bytes:,} bytes, and its header says {end:,}")

    def keep(self, manifest: Manifest, feature: Feature, scratch: Path) -> Kept:
        """In memory, until the shard is written."""
        numbers = {name: memory(tensor) for name, tensor in pack(manifest, feature.outputs).items()}
        return Kept(checksum(numbers), numbers, sum(each.nbytes for each in numbers.values()))

    def sha256(self, manifest: Manifest, feature: Feature) -> str:
        """Of the numbers, field by field."""
        return checksum({name: memory(tensor) for name, tensor in pack(manifest, feature.outputs).items()})

    def place(self, kept: Mapping[str, Kept]) -> None:
        """Nothing lies beside a shard."""

    def body(self, manifest: Manifest, features: Sequence[Entry], kept: Mapping[str, Kept], old: Rows) -> Iterator[Any]:
        """The numbers of all features: field by field, the new ones from memory, the others from the shards before."""
        for field in fields(manifest.outputs):
            for entry in features:
                yield kept[entry.key].numbers[field.name] if entry.key in kept else old(entry.key, field.name)

    def columns(self, part: Part, cache: Path | None = None) -> Mapping[str, Column]:
        """Each field's rows: mapped into memory, or fetched from an object store one at a time."""
        if is_remote(part.path):
            return self._remote(part, cache)
        import torch
        from safetensors import SafetensorError, safe_open

        rows = len(part.features)
        try:
            with safe_open(part.path, framework="pt") as file:
                return {
                    field.name: _Mapped(
                        file.get_tensor(field.name).reshape(rows, math.prod(field.shape)).view(torch.uint8).numpy()
                    )
                    for field in fields(part.manifest.outputs)
                }
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError) as error:
            raise BankError(f"{part.path} cannot be read: {error}.") from error

    def _remote(self, part: Part, cache: Path | None) -> Mapping[str, Column]:
        columns, begin = {}, part.begin
        for field in fields(part.manifest.outputs):
            columns[field.name] = RemoteColumn(self.parts, part, field, begin, cache)
            begin += len(part.features) * field.nbytes
        return columns

    def present(self, entries: Mapping[str, Entry], manifest: Manifest) -> set[str]:
        """Keys of features that are there: what a shard lists, it holds."""
        return {key for key, entry in entries.items() if entry.failure is None}

    def file(self, part: Part, key: str) -> Path:
        """The shard itself."""
        return part.path

    def checksum(self, part: Part, row: int, columns: Mapping[str, Column]) -> str:
        """The SHA-256 of a feature's numbers as they are now."""
        return checksum({name: column[row].data for name, column in columns.items()})

    def bytes_on_disk(self, parts: Sequence[Part], entries: Mapping[str, Entry]) -> int:
        """The size of all shards."""
        return sum(part.bytes for part in parts)


class _Mapped:
    """Rows of a tensor that is mapped into memory."""

    def __init__(self, numbers: NDArray[np.uint8]) -> None:
        self._numbers = numbers

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        # Copied by numpy: torch would wake its threads for so small a copy, which takes longer where cores are busy.
        numbers: NDArray[np.uint8] = self._numbers[row].copy()
        return numbers


def _tensors(manifest: Manifest, count: int) -> dict[str, Any]:
    """The safetensors header's entries of the tensors of so many samples."""
    tensors: dict[str, Any] = {}
    end = 0
    for field in fields(manifest.outputs):
        begin, end = end, end + count * field.nbytes
        tensors[field.name] = {
            "dtype": _DTYPES[field.dtype],
            "shape": [count, *field.shape],
            "data_offsets": [begin, end],
        }
    return tensors
