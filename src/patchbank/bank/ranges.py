"""Features read from a shard by their byte range; those of an object store are cached in a local directory on request.

A cached file is named by the checksum of its feature, and ends with that of its own bytes. So it never grows stale,
serves every bank that holds the same feature, is fetched again when damaged, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Part
from patchbank.bank.packing import Field
from patchbank.bank.storage import Storage
from patchbank.errors import BankError
from patchbank.files import open_regular, write_whole


def fetch(storage: Storage, part: Part, field: Field, begin: int, cache: Path | None, row: int) -> NDArray[np.uint8]:
    """One field of one feature of a shard, (bytes,) uint8.

    Args:
        begin: where the field begins in the shard, in bytes.
        cache: the directory that keeps fetched rows; None keeps nothing.

    Raises BankError where the store refuses, FileNotFoundError where the shard is gone.
    """
    sha256 = part.features[row].sha256
    kept = cache / sha256[:2] / f"{sha256}.{field.name}" if cache and sha256 else None
    if kept is not None:
        with contextlib.suppress(OSError), open_regular(kept) as file:  # another user's cache may be closed to this one
            content, digest = file.read(field.nbytes), file.read(33)
            if digest == hashlib.sha256(content).digest():
                return np.frombuffer(bytearray(content), np.uint8)
    start = begin + row * field.nbytes
    try:
        content = storage.read(part.path.name, start, start + field.nbytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BankError(f"{part.path} cannot be read: {error.strerror or error}.") from error
    if len(content) != field.nbytes:
        raise BankError(f"{part.path} cannot be read: {len(content):,} bytes came, not {field.nbytes:,}.")
    if kept is not None:
        with contextlib.suppress(OSError):  # a full cache is no error
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, content + hashlib.sha256(content).digest())
    return np.frombuffer(bytearray(content), np.uint8)
