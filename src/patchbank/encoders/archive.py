"""Reads the tensors of ``torch.save`` and ``torch.jit.save`` files as data: no code in them runs.

A TorchScript archive (OpenAI's format) is a zip of ``NAME/data.pkl`` (the module), ``NAME/data/N`` (each storage's
numbers), and ``NAME/code/`` (the classes; their text lists the parameters and buffers). A state dict's zip has the
first two; its older form is a series of pickles. `get_tensor` reads the numbers, each storage once.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from patchbank.errors import WeightsError
from patchbank.files import is_plain
from patchbank.torch_pickles import TENSOR_NAMES, Storage, View, read_legacy, storage_of
from patchbank.unpickling import (
    MOST_BYTES,
    Function,
    Module,
    Opaque,
    PickleError,
    UnsafePickleError,
    interpret,
    refusals,
)

_CHUNK = 1 << 20
_PROTO = b"\x80"  # how pickles begin; those of protocols 0 and 1, with a letter or a bracket
_LOCAL_HEADER = 30  # bytes before an entry's content, at least
_MOST_VISITS, _DEEPEST = 100_000, 64  # of modules and their attributes
_NESTED = ("state_dict", "model", "model_state_dict")  # where training code keeps the state dict
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.MULTILINE
)


class Archive:
    """The named tensors of one file. Use it in a ``with`` statement, like `safetensors.safe_open`.

    Attributes:
        attributes: the names of the tensors of a TorchScript file's outermost module; empty for a state dict.
    """

    def __init__(self, path: Path) -> None:
        """Read the description of the tensors. Raises WeightsError if it is no such file, or unsafe."""
        self._path = path
        self._numbers: dict[str, Tensor] = {}
        self.attributes: frozenset[str] = frozenset()
        with self._reported():
            self._file = Bounded(path)
        try:
            with self._reported():
                head = self._file.read(4)
                zipped = head == b"PK\x03\x04"
                if head[:1] > _PROTO:
                    raise WeightsError(
                        f"{path} is no checkpoint. Expected a state dict or a TorchScript archive (.pt, .safetensors)."
                    )
                self._file.seek(0)
                self._views, self._read = self._open_zip() if zipped else self._open_legacy()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """The names in the file's order, as in torch's ``state_dict``; a module's are dotted."""
        return list(self._views)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of `keys`."""
        return {name: view.size for name, view in self._views.items()}

    def get_tensor(self, name: str) -> Tensor:
        """A tensor on the CPU with its own dtype, shape and strides; tensors of one storage share memory.

        Raises WeightsError if its numbers are damaged.
        """
        view = self._views[name]
        key = view.storage.key
        with self._reported():
            if key not in self._numbers:
                self._numbers[key] = self._read(view.storage)
            return view.of(self._numbers[key])

    def _open_zip(self) -> tuple[dict[str, View], Callable[[Storage], Tensor]]:
        entries = _Entries(self._file)
        if entries.has("byteorder") and entries.text("byteorder") != b"little":
            raise PickleError("its numbers are not in little-endian order")
        value = interpret(io.BytesIO(entries.text("data.pkl")), _names, storage_of)
        if not isinstance(value, Module):
            return _state_dict(value), entries.numbers
        self.attributes = frozenset(name for name, each in value.attributes.items() if isinstance(each, View))
        return _module_tensors(entries, value), entries.numbers

    def _open_legacy(self) -> tuple[dict[str, View], Callable[[Storage], Tensor]]:
        value, places = read_legacy(self._file, _names)

        def read(storage: Storage) -> Tensor:
            self._file.seek(places[storage.key])
            return _numbers(self._file, storage)

        return _state_dict(value), read

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            with refusals():
                yield
        except OSError as error:
            raise WeightsError(f"The checkpoint {self._path} cannot be read: {error.strerror}.") from error
        except UnsafePickleError as error:
            raise WeightsError(
                f"{self._path} is not a checkpoint that can be read safely: {error}. Expected a state dict: "
                "save one with torch.save(model.state_dict(), ...), or as .safetensors."
            ) from None
        except PickleError as error:
            raise WeightsError(
                f"{self._path} cannot be read as a checkpoint: {error}. Expected a state dict or a TorchScript "
                "archive (.pt, .safetensors), and the whole file."
            ) from error


class Bounded(io.FileIO):
    """A file that reads at most `MOST_BYTES` at a time: `zipfile` reads a directory of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MOST_BYTES:
            raise PickleError("its zip directory is larger than any checkpoint's")
        return super().read(size) or b""


class _Entries:
    """The entries of a zip, by their names without ``NAME/``."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises PickleError if entries overlap, are encrypted, or lie in several directories."""
        self._zip = zipfile.ZipFile(file)
        self._left = MOST_BYTES  # bytes of pickles and code to unpack at most
        infos = sorted(self._zip.infolist(), key=lambda info: info.header_offset)
        top = infos[0].filename.partition("/")[0] if infos else ""
        self._infos = {info.filename.removeprefix(f"{top}/"): info for info in infos}
        if len(self._infos) < len(infos):
            raise PickleError("its zip has two entries of one name")
        for info in infos:
            if not is_plain(info.filename) or not info.filename.startswith(f"{top}/"):
                raise PickleError(f"its zip has an entry {info.filename[:100]!r}, which no archive of torch has")
            if info.flag_bits & 1:
                raise PickleError("its zip is encrypted")
        ends = [info.header_offset + _LOCAL_HEADER + info.compress_size for info in infos]
        starts = [info.header_offset for info in infos[1:]] + [self._zip.start_dir]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise PickleError("its zip has entries that overlap")

    def has(self, name: str) -> bool:
        return name in self._infos

    def text(self, name: str) -> bytes:
        """A pickle or a piece of code, whole."""
        info = self._info(name)
        self._left -= info.file_size
        if self._left < 0:
            raise PickleError(f"its {name[:100]} is larger than any checkpoint's")
        with self._zip.open(info) as member:
            content = member.read(info.file_size)
        if len(content) != info.file_size:
            raise PickleError(f"its {name[:100]} is cut short")
        return content

    def numbers(self, storage: Storage) -> Tensor:
        """A storage's bytes, (nbytes,) uint8. `zipfile` checks their CRC."""
        info = self._info(f"data/{storage.key}")
        if info.compress_type != zipfile.ZIP_STORED or not info.file_size == info.compress_size == storage.nbytes:
            raise PickleError(f"its storage {storage.key[:100]!r} does not have the {storage.nbytes:,} bytes it says")
        with self._zip.open(info) as member:
            return _numbers(member, storage)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise PickleError(f"it lacks {name[:100]}")
        return self._infos[name]


def _numbers(file: Any, storage: Storage) -> Tensor:
    numbers = torch.empty(storage.nbytes, dtype=torch.uint8)
    left = memoryview(numbers.numpy().data)
    while left:
        count = file.readinto(left[:_CHUNK])
        if not count:
            raise PickleError(f"its storage {storage.key[:100]!r} is cut short")
        left = left[count:]
    return numbers


def _module_tensors(entries: _Entries, root: Module) -> dict[str, View]:
    """The parameters and buffers of a TorchScript module and the modules in it, under dotted names.

    A module's class lists them in its code.
    """
    found: dict[str, View] = {}
    seen = 0

    @cache
    def classes(file: str) -> dict[str, list[str]]:
        """A file's classes of modules -> the names of their tensors."""
        code = entries.text(file).decode()
        return {match[1]: re.findall(r'"([^"]*)"', f"{match[2]} {match[3]}") for match in _CLASS.finditer(code)}

    def collect(module: Module, prefix: str) -> None:
        nonlocal seen
        seen += 1 + len(module.attributes)
        if seen > _MOST_VISITS or prefix.count(".") > _DEEPEST:
            raise PickleError("its modules contain each other")
        place, _, kind = module.name.rpartition(".")
        declared = classes(f"code/{place.replace('.', '/')}.py").get(kind)
        if declared is None:  # an object of another class
            return
        for name, value in module.attributes.items():
            if isinstance(value, Module):
                collect(value, f"{prefix}{name}.")
            elif name in declared and value is not None:
                found[f"{prefix}{name}"] = _view(f"{prefix}{name}", value)

    collect(root, "")
    return found


def _state_dict(value: Any) -> dict[str, View]:
    """The tensors of a state dict, or of the state dict in a training checkpoint."""
    for key in _NESTED:
        if type(value) is dict and type(value.get(key)) is dict:
            value = value[key]
    if type(value) is not dict:
        kind = "tensor" if isinstance(value, View) else getattr(value, "name", type(value).__name__)
        raise PickleError(f"it holds a {kind}, not a state dict")
    return {
        name: _view(name, each)
        for name, each in value.items()
        if isinstance(each, View) or (isinstance(each, Opaque) and each.name.startswith("torch._utils."))
    }


def _view(name: str, value: Any) -> View:
    if not isinstance(value, View):
        kind = getattr(value, "name", type(value).__name__)
        raise PickleError(f"{name[:100]} is a {kind[:100]}, not a dense tensor")
    return value


def _names(name: str) -> Any:
    """The names that a checkpoint may use: those of tensors, and TorchScript's classes (``__torch__.``)."""
    return Function(lambda *_: Module(name)) if name.startswith("__torch__.") else TENSOR_NAMES.get(name)
