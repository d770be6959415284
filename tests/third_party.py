"""Pickles as the original scripts and their variants leave them: each kind of defect, made the way it comes about."""

from __future__ import annotations

import errno
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchbank.bank import check, unpickling


class Call:
    """Pickles as a call: what a hostile file, or one put together by hand, holds."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return self._call[0], self._call[1:]


# (size, stride, offset) of tensors that do not lie within a storage of twelve numbers.
BEYOND_TWELVE_NUMBERS = [
    ((1000, 1000), (1000, 1), 0),
    ((3, 4), (-4, 1), 8),
    ((3, 4), (4, 1), -4),
    ((3, 4), (4, 1), 1),
    ((3, 4), (4,), 0),
    ((-3, 4), (4, 1), 0),
    ((3, 4), (2**62, 2**62), 0),
    ((196, 512), (0, 0), 0),
    ((2**62 + 1, 1), (4, 1), 0),
    ((True, 4), (4, 1), 0),
    ((3, 4), (4, 2**100), 0),
    ((1,) * 9, (1,) * 9, 0),
    ([3, 4], (4, 1), 0),
]


def unreadable(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Have the disk fail at files of such names."""
    read = unpickling.content_of

    def failing(path: Path) -> bytes:
        if path.match(pattern):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    for module in (unpickling, check):
        monkeypatch.setattr(module, "content_of", failing)


def dumped(every: Tensor) -> bytes:
    """As the scripts do: ``pickle.dump`` of the ``[1:]`` of one image's tokens, and with it of all its storage."""
    return pickle.dumps(every[1:])


def cuda_tagged(tokens: Tensor) -> bytes:
    """The pickle of a tensor on a GPU; the tag is put in by hand, so that nobody needs one."""
    whole = pickle.dumps(tokens.clone())
    payloads = [argument for opcode, argument, _ in pickletools.genops(whole) if opcode.name == "BINBYTES"]
    [payload] = payloads or [max(_short(whole), key=len)]
    tagged = payload.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert tagged != payload
    storage = Call(torch.storage._load_from_bytes, tagged)
    shape, stride = tuple(tokens.shape), tokens.contiguous().stride()
    return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, None))


def _short(content: bytes) -> list[bytes]:
    return [argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "SHORT_BINBYTES"]


def _changed(every: Tensor, change: Callable[[Tensor], object]) -> bytes:
    tokens = every[1:].clone()
    change(tokens)
    return pickle.dumps(tokens)


# Kind of finding -> the pickle of an image's (1 + N, D) tokens that has it.
DEFECTS: dict[str, Callable[[Tensor], bytes]] = {
    "unsafe": lambda _: pickle.dumps(Call(os.mkdir, "patchbank-was-run")),
    "unreadable": lambda every: pickle.dumps(every[1:].clone())[:1000],
    "shape": lambda _: pickle.dumps(torch.ones(511)),
    "not-finite": lambda every: _changed(every, lambda tokens: tokens[3, 5].fill_(torch.nan)),
    "zero": lambda every: _changed(every, lambda tokens: tokens[3].zero_()),
    "normalised": lambda every: _changed(every, lambda tokens: tokens.div_(tokens.norm(dim=-1, keepdim=True))),
    "cls": lambda every: pickle.dumps(every.clone()),
    "cuda": lambda every: cuda_tagged(every[1:]),
    "dtype": lambda every: pickle.dumps(every[1:].half()),
    "view": dumped,
    "gradient": lambda every: _changed(every, lambda tokens: tokens.requires_grad_()),
}
FIXED_BY_IMPORT = ("cls", "cuda", "dtype", "view", "gradient")


def write_bank(directory: Path, tokens: dict[str, Tensor], defects: dict[str, str]) -> None:
    """Write each image's pickle, of its (1 + N, D) tokens by key; sound, or with the defect that `defects` names."""
    directory.mkdir(parents=True, exist_ok=True)
    for key, every in tokens.items():
        make = DEFECTS[defects[key]] if key in defects else lambda every: pickle.dumps(every[1:].clone())
        (directory / f"{key.split('.')[0]}_clip.pkl").write_bytes(make(every))
