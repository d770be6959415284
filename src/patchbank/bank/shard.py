"""Shards: safetensors files whose header holds a part of the index, with the features of its samples behind it.

The header is written here. The safetensors package reads it, but its writer takes all tensors in memory at once, leaves
the metadata in the order of a hash map, and flushes nothing to the disk.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import fields, memory, pack
from patchbank.bank.payload import LARGEST_HEADER, Column, Feature, Kept, Payload, Pieces, Rows
from patchbank.bank.ranges import fetch
from patchbank.config import Layout
from patchbank.errors import BankError
from patchbank.locations import is_remote

METADATA = "patchbank"  # the one key of the header's metadata
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
_LENGTH = struct.Struct("<Q")


class Shards(Payload):
    """The layout ``shards``: features behind the index, in the same file."""

    layout: ClassVar[Layout] = "shards"
    pattern = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.safetensors")
    name = "shard-{:05}-{}.safetensors"
    prefix = _LENGTH.size
    durable_at_once = False

    def frame(self, document: str, manifest: Manifest, count: int) -> bytes:
        """The length and header of a safetensors file."""
        header = {"__metadata__": {METADATA: document}, **self.tensors(manifest, count)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the numbers
        return _LENGTH.pack(len(text)) + text

    def end(self, start: bytes, size: int) -> int:
        """The header's end; that of the length, where no such header fits into the file."""
        length = _LENGTH.unpack(start[: self.prefix])[0] if len(start) >= self.prefix else 0
        return self.prefix + (length if length <= min(size, LARGEST_HEADER) else 0)

    def document_in(self, text: bytes) -> tuple[str, dict[str, Any]]:
        """The document in a header, and the rest of it."""
        header = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
        return header.pop("__metadata__")[METADATA], header

    def tensors(self, manifest: Manifest, count: int) -> dict[str, Any]:
        """Each field of all features, one after the other."""
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

    def pieces(self, manifest: Manifest, feature: Feature) -> Pieces:
        """The numbers of each field."""
        return [memory(tensor) for tensor in pack(manifest, feature.outputs).values()]

    def body(self, manifest: Manifest, features: Sequence[Entry], kept: Mapping[str, Kept], old: Rows) -> Iterator[Any]:
        """The numbers of all features, field by field."""
        for number, field in enumerate(fields(manifest.outputs)):
            for entry in features:
                yield kept[entry.key].pieces[number] if entry.key in kept else old(entry.key, field.name)

    def columns(self, part: Part, cache: Path | None = None, *, mmap: bool = True) -> Mapping[str, Column]:
        """Each field's rows: mapped into memory, or read one at a time, as from an object store."""
        stored = fields(part.manifest.outputs)
        if (remote := is_remote(part.path)) or not mmap:
            tensors = self.tensors(part.manifest, len(part.features))
            begins = [part.begin + tensors[field.name]["data_offsets"][0] for field in stored]
            return {
                field.name: partial(fetch, self.parts, part, field, begin, cache if remote else None)
                for field, begin in zip(stored, begins, strict=True)
            }
        import torch
        from safetensors import SafetensorError, safe_open

        def mapped(tensor: torch.Tensor) -> Column:
            numbers = tensor.reshape(len(part.features), math.prod(tensor.shape[1:])).view(torch.uint8).numpy()

            def read(row: int, count: int = 1, into: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
                found: NDArray[np.uint8] = numbers[row : row + count].reshape(-1)
                if into is None:
                    return found
                # By numpy: for so small a copy torch would wake its threads, which takes longer on busy cores.
                into[:] = found
                return into

            return read

        try:
            with safe_open(part.path, framework="pt") as file:
                return {field.name: mapped(file.get_tensor(field.name)) for field in stored}
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError) as error:
            raise BankError(f"{part.path} cannot be read: {error}.") from error
