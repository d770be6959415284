"""Reads the tensors of ``torch.save`` and ``torch.jit.save`` files as data: no code in them runs.

A TorchScript archive (OpenAI's format) is a zip of ``NAME/data.pkl`` (the module), ``NAME/data/N`` (each storage's
numbers), and ``NAME/code/`` (the classes; their text lists the parameters and buffers). A state dict's zip has the
first two; its older form is a series of pickles. `get_tensor` reads the numbers, each storage once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from patchbank.errors import WeightsError
from patchbank.torch_files import Bounded, Entries, numbers_of
from patchbank.torch_pickles import TENSOR_NAMES, Storage, View, read_legacy
from patchbank.unpickling import Function, Module, Opaque, PickleError, UnsafePickleError, refusals

_PROTO = b"\x80"  # how pickles begin; those of protocols 0 and 1, with a letter or a bracket
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
        entries = Entries(self._file)
        value = entries.value(_names)
        if not isinstance(value, Module):
            return _state_dict(value), entries.numbers
        self.attributes = frozenset(name for name, each in value.attributes.items() if isinstance(each, View))
        return _module_tensors(entries, value), entries.numbers

    def _open_legacy(self) -> tuple[dict[str, View], Callable[[Storage], Tensor]]:
        value, places = read_legacy(self._file, _names)

        def read(storage: Storage) -> Tensor:
            self._file.seek(places[storage.key])
            return numbers_of(self._file, storage)

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


def _module_tensors(entries: Entries, root: Module) -> dict[str, View]:
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
