"""Reads banks where patchbank cannot be installed: one file, for Python 3.8 and torch 1.9 or later, and nothing else.

    from patchbank_reader import open_bank

    bank = open_bank("hicodet_shards/clipbase_img_hicodet_train")  # of either layout
    key = "HICO_train2015_00000001.jpg"
    bank[key]  # (196, 512), as stored (int8: as float32), not normalised; the caller's own
    bank.grid(key)  # (14, 14, 512), row-major
    bank.output(key, "cls")  # (512,); of `bank.manifest["outputs"]`, which names all that the bank holds
    bank.size(key)  # (width, height) of the original image; None if it is unknown
    bank.region(key)  # of a bank of boxes, {"box": [x1, y1, x2, y2] or None, "label": 3, ...}; None of an image
    bank.failures  # {key: reason}

`patchbank reader > patchbank_reader.py` writes this file. Threads and data-loader workers may share a bank, and nothing
that it names is executed. docs/reference/bank-format.md of patchbank describes the format.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_VERSION = 2  # of the format
_PARTS = {  # layout -> the directory of a bank's parts, and their names
    "shards": ("", re.compile(r"shard-\d{5,}-([0-9a-f]{16})\.safetensors")),
    "ezhoi": ("index", re.compile(r"index-\d{5,}-([0-9a-f]{16})\.json")),
}
_COMMON = ("layout", "dataset", "split", "outputs", "identity", "input", "rounded", "regions")  # to all parts of a bank
_DTYPES = {  # stored dtype -> torch's, bytes, its name in safetensors and in pickles
    "float32": (torch.float32, 4, "F32", "FloatStorage"),
    "float16": (torch.float16, 2, "F16", "HalfStorage"),
    "bfloat16": (torch.bfloat16, 2, "BF16", "BFloat16Storage"),
    "int8": (torch.int8, 1, "I8", "CharStorage"),
}
_LARGEST_HEADER = 100_000_000  # bytes
_MOST_NUMBERS = 1 << 26  # in one output of a sample
_FRAME = 4096  # bytes: more than a tensor's pickle has around its numbers
_ATTEMPTS = 100  # at reading what others are writing


class BankError(Exception):
    """There is no bank, or it is damaged or of another version."""


class KeyNotInBank(BankError, KeyError):
    """The bank has no features of this key."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class _Entry(NamedTuple):
    """What a part lists of a sample. Where several parts list a key, the entry of the greatest rank counts."""

    rank: tuple[Any, ...]  # revision, whether it has features, their SHA-256, the image's size, the failure
    part: Path
    begins: dict[str, int]  # tensor's name -> where its first row begins in the part
    row: int
    region: list[Any] | None = None


class Bank(Mapping):  # type: ignore[type-arg]  # of str and Tensor; Python 3.8 cannot say so
    """The bank in a directory, read-only. Iterates over the keys that have features, sorted.

    Opening it raises BankError where there is none, or it is damaged or of another version.

    Attributes:
        path: its directory.
        manifest: what it is, as docs/reference/bank-format.md lists it.
        failures: key -> reason, of images that could not be extracted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest, entries = _read_index(self.path)
        self._entries = {key: entries[key] for key in sorted(entries) if entries[key].rank[1]}
        self.failures: dict[str, str] = {key: entries[key].rank[4] for key in sorted(entries.keys() - self._entries)}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Tensor:
        """The patch tokens of one image, (N, D); the first output if the bank has none. Raises what `output` does."""
        return self.output(key, self._main)

    @property
    def _main(self) -> str:
        outputs = self.manifest["outputs"]
        return "patch_tokens" if "patch_tokens" in outputs else next(iter(outputs))

    def output(self, key: str, name: str) -> Tensor:
        """One output of a sample, on the CPU, in its shape and stored dtype (int8: float32); the caller's own.

        Raises:
            KeyNotInBank: a KeyError; the key was never listed, or failed (the message gives the reason).
            BankError: the bank does not store the output, or the feature's file is missing or damaged.
        """
        outputs = self.manifest["outputs"]
        for _ in range(_ATTEMPTS):
            entry = self._entry(key)
            if name not in outputs:
                raise BankError(f"{self.path} does not store {name!r}. It stores {', '.join(outputs)}.")
            dtype, shape = outputs[name]["dtype"], tuple(outputs[name]["shape"])
            if self.manifest["layout"] == "ezhoi":
                directory, slash, last = key.rpartition("/")
                return _read_pickle(self.path / f"{directory}{slash}{last.partition('.')[0]}_clip.pkl", dtype, shape)
            try:
                with open(entry.part, "rb") as shard:
                    value = _read_row(shard, entry, name, dtype, shape)
                    if dtype != "int8":
                        return value
                    return value.float() * _read_row(shard, entry, f"{name}.scale", "float32", shape[:-1]).unsqueeze(-1)
            except FileNotFoundError:  # a run has put a more complete part in its place
                manifest, entries = _read_index(self.path)
                _compare(f"{self.path} was replaced: open it again", [self.manifest, manifest])
                self._entries = {each: entries[each] for each in self._entries if each in entries}
        raise BankError(f"{self.path} changes too fast to be read.")

    def grid(self, key: str, name: str | None = None) -> Tensor:
        """An output as a picture: (Gh, Gw, D), row-major; None is that of ``bank[key]``.

        Raises what `output` does, and BankError where the output has not one token for each place of the grid.
        """
        made, name = self.manifest["input"], name or self._main
        rows, columns = (side // (made["patch"] * made.get("pool", 1)) for side in made["size"])
        value = self.output(key, name)
        if value.shape[:-1] != (rows * columns,) or name == "registers":
            raise BankError(f"{name} of {self.path} is no grid of patches.")
        return value.view(rows, columns, -1)

    def size(self, key: str) -> tuple[int, int] | None:
        """(width, height) of the original image in pixels; None if it is unknown. Raises KeyNotInBank."""
        return self._entry(key).rank[3] or None

    def region(self, key: str) -> dict[str, Any] | None:
        """The box of a region in original pixels (None: the whole image), its label, score, verb and hoi class.

        None of an image. Raises KeyNotInBank.
        """
        region = self._entry(key).region
        return None if region is None else dict(zip(("box", "label", "score", "verb", "hoi"), region))

    def _entry(self, key: str) -> _Entry:
        if key in self._entries:
            return self._entries[key]
        if key in self.failures:
            raise KeyNotInBank(f"{key!r} could not be extracted: {self.failures[key]}.")
        raise KeyNotInBank(f"The bank {self.path} has no {key!r}. Its keys look like {next(iter(self), None)!r}.")

    __eq__ = object.__eq__  # a Mapping's would read every feature of both
    __hash__ = object.__hash__


open_bank = Bank  # as patchbank names it


def _read_index(bank: Path) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """The bank's manifest, and of each key the entry that counts."""
    for _ in range(_ATTEMPTS):
        try:
            parts = [_read_part(path, layout) for layout in _PARTS for path in _part_files(bank, layout)]
            break
        except FileNotFoundError:  # a run has put a more complete part in its place
            continue
    else:
        raise BankError(f"{bank} changes too fast to be read.")
    if not parts:
        raise BankError(f"There is no bank {bank}: it holds neither shards nor an index.")
    _compare(f"{bank} holds parts of two banks", [manifest for manifest, _ in parts])
    entries: dict[str, _Entry] = {}
    for _, listed in parts:
        for key, entry in listed:
            if entry.rank > entries.setdefault(key, entry).rank:
                entries[key] = entry
    return parts[0][0], entries


def _compare(trouble: str, manifests: list[dict[str, Any]]) -> None:
    for name in _COMMON:
        if any(each.get(name) != manifests[0].get(name) for each in manifests):
            raise BankError(f"{trouble}. They differ in {name}.")


def _part_files(bank: Path, layout: str) -> list[Path]:
    directory, pattern = bank / _PARTS[layout][0], _PARTS[layout][1]
    if not directory.is_dir():
        return []
    with os.scandir(directory) as found:
        return sorted(directory / each.name for each in found if pattern.fullmatch(each.name) and each.is_file())


def _read_part(path: Path, layout: str) -> tuple[dict[str, Any], list[tuple[str, _Entry]]]:
    """A part's manifest and entries. Raises FileNotFoundError where it is gone."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 if layout == "shards" else 0  # a safetensors header comes after its length
        end = start + int.from_bytes(file.read(8), "little") if start else size
        text = file.read(end - start) if end <= min(size, _LARGEST_HEADER) else b""
    try:
        _require(hashlib.sha256(text).hexdigest()[:16] in path.name, "its content does not match its name")
        header = json.loads(text)
        document = json.loads(header["__metadata__"]["patchbank"]) if start else header
        if document["format"] == "patchbank" and document["version"] != _VERSION:
            raise BankError(
                f"{path} has version {document['version']!r} of the format; this reader knows {_VERSION}. Take the one "
                "of the patchbank that wrote the bank: `patchbank reader`."
            )
        manifest, samples = document["manifest"], document["samples"]
        keys, checksums, sizes = samples["keys"], samples["sha256"], samples["sizes"]
        revisions = samples.get("revisions") or [0] * len(keys)
        _require((document["format"], manifest["layout"]) == ("patchbank", layout), "its format or layout is another")
        regions = samples.get("regions") or [None] * len(keys)
        columns = (keys, checksums, sizes, revisions, regions)
        _require(len({len(each) for each in columns}) == 1, "its columns differ in length")
        begins = {}
        for name, dtype, shape in _stored(manifest["outputs"]):
            _require(all(type(side) is int and side > 0 for side in shape), f"{name} has the shape {shape}")
            _require(dtype in _DTYPES and math.prod(shape) <= _MOST_NUMBERS, f"{name} is {shape} {dtype}")
            if start:
                first, last = map(int, header[name]["data_offsets"])
                found = header[name]["dtype"], header[name]["shape"], last - first
                expected = _DTYPES[dtype][2], [len(keys), *shape], len(keys) * _bytes(dtype, shape)
                _require(found == expected and 0 <= first <= last <= size - end, f"{name} is not what the index says")
                begins[name] = end + first
        listed = []
        for row, (key, sha256, pixels, revision, region) in enumerate(zip(*columns)):
            rank = (int(revision), True, str(sha256), tuple(map(int, pixels or ())), "")
            listed.append((key, _Entry(rank, path, begins, row, region)))
        for each in document["failures"]:
            rank = (int(each.get("revision", 0)), False, "", (), str(each["failure"]))
            listed.append((each["key"], _Entry(rank, path, begins, 0)))
        for key, _ in listed:
            _require({"", ".", ".."}.isdisjoint(key.split("/")), f"the key {key!r} would lead out of the bank")
    except BankError:
        raise
    except Exception as error:  # damaged JSON raises errors of many kinds
        raise BankError(f"{path} is damaged: {error!r}. `patchbank repair` says what to do.") from error
    return manifest, listed


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _stored(outputs: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape of a sample) of each tensor in a shard."""
    for name, output in outputs.items():
        yield name, output["dtype"], tuple(output["shape"])
        if output["dtype"] == "int8":
            yield f"{name}.scale", "float32", tuple(output["shape"][:-1])


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return _DTYPES[dtype][1] * math.prod(shape)


def _read_row(shard: Any, entry: _Entry, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    shard.seek(entry.begins[name] + entry.row * _bytes(dtype, shape))
    return _fill(shard, dtype, shape)


def _fill(file: Any, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A new tensor of the bytes at a file's position. (torch.frombuffer came with 1.10.)"""
    tensor = torch.empty(shape, dtype=_DTYPES[dtype][0])
    memory = (ctypes.c_char * _bytes(dtype, shape)).from_address(tensor.data_ptr())
    if file.readinto(memory) != len(memory):
        raise BankError(f"{getattr(file, 'name', 'A feature')} is cut short. `patchbank repair` says what to do.")
    return tensor


def _read_pickle(path: Path, dtype: str, shape: tuple[int, ...]) -> Tensor:
    try:
        with open(path, "rb", opener=_open_regular) as file:
            content = file.read(_bytes(dtype, shape) + _FRAME)
        storage, numbers, *view = _Unpickler(io.BytesIO(content)).load()
        expected = (_DTYPES[dtype][3], _bytes(dtype, shape), 0, shape, (shape[-1], 1))
        _require((storage, len(numbers), *view) == expected, "it holds another tensor")
        return _fill(io.BytesIO(numbers), dtype, shape)
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}. Run the same extraction again.") from error
    except Exception as error:  # of many kinds, likewise
        raise BankError(f"{path} is no feature of this bank: {error!r}. Run the same extraction again.") from error


def _open_regular(path: str, flags: int) -> int:
    opened = os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its other end
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "it is no regular file")
    return opened


class _Unpickler(pickle._Unpickler):  # whose memo grows with what is in it
    """Reads a pickled tensor as (its storage's type and bytes, offset, shape, stride). Nothing of torch's is called.

    What a pickle names stands for methods here: bound ones, since it may also set attributes of what it names.
    """

    _NAMES = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        if f"{module}.{name}" not in self._NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor's pickle does; nothing was run")
        return getattr(self, name)

    def persistent_load(self, identifier: Any) -> Any:
        return identifier

    def OrderedDict(self) -> None:
        """Of hooks, which a stored tensor has none of."""

    def _rebuild_tensor_v2(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
        return (*storage, offset, shape, stride)

    def _load_from_bytes(self, content: bytes) -> tuple[str, bytes]:
        """A storage as `torch.save` writes it: five pickles, the count of its numbers, and the numbers."""
        stream = io.BytesIO(content)
        _, _, machine, (_, storage, *_), _ = (type(self)(stream).load() for _ in range(5))
        _require(machine["little_endian"] is True, "its byte order is another")
        stream.read(8)
        return storage, stream.read()
