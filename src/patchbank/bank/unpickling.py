"""Reads third-party pickles of one tensor each, without running what they name."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from torch import Tensor

from patchbank.errors import BankError
from patchbank.files import bytes_text, open_regular
from patchbank.torch_pickles import View, plain_names, storage_of
from patchbank.unpickling import Opaque, PickleError, interpret, refusals

_LONGEST = 100  # instructions; a tensor's pickle has about fifty
_LARGEST = 256_000_000  # bytes; a batch of 32 images, which a view keeps, has up to 60 MB


def content_of(path: Path) -> bytes:
    """A pickle's bytes. Raises OSError, and PickleError where there are more than of any batch of features."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > _LARGEST:
            raise PickleError(f"it has more than {bytes_text(_LARGEST)}")
        return file.read(size)


def read_pickle(path: Path) -> Tensor:
    """The tensor in a pickle, on the CPU. Raises BankError where the file cannot be read, or holds anything else."""
    try:
        return parse_pickle(content_of(path))[0]
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}.") from error
    except PickleError as error:
        raise BankError(f"{path} is not the pickle of a tensor: {error}.") from None


def parse_pickle(content: bytes) -> tuple[Tensor, View]:
    """The tensor in a pickle, whoever made it, and what the pickle says of it.

    Returns:
        The tensor, on the CPU, with the strides it was saved with; it shares no memory with anything else. And its
        `View`, whose storage names the device that ``pickle.load`` loads it to, and may hold more than the tensor.

    Raises:
        UnsafePickleError: it names what neither a tensor's pickle nor other known data names. Nothing was run.
        PickleError: it is cut short, or holds anything else.
    """
    if content.startswith(b"PK"):
        raise PickleError("it is an archive of torch.save")
    value = interpret(io.BytesIO(content), plain_names(len(content)), storage_of, _LONGEST)
    if isinstance(value, Opaque):
        raise PickleError(f"it holds a {value.name}, which is not a tensor")
    if not isinstance(value, View):
        raise PickleError(f"it holds a {type(value).__name__}")
    if value.storage.numbers is None or 0 in value.size:
        raise PickleError("it holds a tensor without numbers")
    with refusals():
        return value.of(torch.frombuffer(bytearray(value.storage.numbers), dtype=torch.uint8)), value
