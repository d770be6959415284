"""Reads third-party pickles of one tensor each, without running what they name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchbank import unpickling
from patchbank.errors import BankError
from patchbank.torch_pickles import TENSOR_NAMES, Storage, View, read_legacy, storage_of
from patchbank.unpickling import Function, Opaque, PickleError, interpret, refusals

_LONGEST = 100  # instructions; a tensor's pickle has about fifty


class UnsafePickleError(BankError):
    """A pickle that would do something else than give a tensor. It was not run."""


class PickledTensor(NamedTuple):
    """A tensor as a pickle holds it.

    Attributes:
        tensor: on the CPU, with the strides it was saved with; it shares no memory with anything else.
        location: the device it was saved from, and goes back to with plain ``pickle.load``: ``cpu``, ``cuda:0``.
        storage_bytes: the size of its storage, which may hold more than this tensor.
        requires_grad: whether it asks for gradients.
    """

    tensor: Tensor
    location: str
    storage_bytes: int
    requires_grad: bool


def read_pickle(path: Path) -> Tensor:
    """The tensor in a pickle, on the CPU, as `parse_pickle` finds it. Raises what that does, and BankError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return parse_pickle(content).tensor
    except BankError as error:
        raise type(error)(f"{path} is not the pickle of a tensor: {error}.") from None


def parse_pickle(content: bytes) -> PickledTensor:
    """The tensor in a pickle, whoever made it.

    Raises:
        UnsafePickleError: it names something that neither a tensor's pickle does nor other data that is known.
        BankError: it is cut short, or holds anything else.
    """
    if content.startswith(b"PK"):
        raise BankError("it is an archive of torch.save")
    try:
        return _parse(content)
    except unpickling.UnsafePickleError as error:
        raise UnsafePickleError(str(error)) from None
    except PickleError as error:
        raise BankError(str(error)) from error


def _parse(content: bytes) -> PickledTensor:
    left = len(content)  # bytes that may be made of texts: no more than the file has

    def encode(text: Any, _: Any) -> bytes:
        """``_codecs.encode``: how protocol 2 writes bytes."""
        nonlocal left
        if type(text) is not str:
            raise ValueError("it makes bytes of what is no text")
        left -= len(text)
        if left < 0:
            raise ValueError("it makes more of its texts than there is")
        return text.encode("latin1")

    names = {
        **TENSOR_NAMES,
        "torch.storage._load_from_bytes": Function(_load_storage),
        "_codecs.encode": Function(encode),
    }
    value = interpret(io.BytesIO(content), names.get, storage_of, _LONGEST)
    if isinstance(value, Opaque):
        raise PickleError(f"it holds a {value.name}, which is no tensor's")
    if not isinstance(value, View):
        raise PickleError(f"it holds a {type(value).__name__}")
    storage = value.storage
    if storage.numbers is None or 0 in value.size:
        raise PickleError("it holds a tensor without numbers")
    with refusals():
        tensor = value.of(torch.frombuffer(bytearray(storage.numbers), dtype=torch.uint8))
    return PickledTensor(tensor, storage.location, storage.nbytes, value.requires_grad)


def _load_storage(content: Any) -> Storage:
    """``torch.storage._load_from_bytes``: a storage by itself, in the older form of `torch.save`."""
    if type(content) is not bytes:
        raise ValueError("a storage that is not made of bytes")
    value, places = read_legacy(io.BytesIO(content), TENSOR_NAMES.get, _LONGEST)
    if not isinstance(value, Storage):
        raise ValueError("a storage of another form")
    first = places[value.key]
    return value._replace(numbers=memoryview(content)[first : first + value.nbytes])
