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


def fetch(
    storage: Storage,
    part: Part,
    field: Field,
    begin: int,
    cache: Path | None,
    row: int,
    count: int = 1,
    into: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """One field of `count` features of a shard, (bytes,) uint8: `into`, or else an array of its own.

    Args:
        begin: where the field begins in the shard, in bytes.
        cache: the directory that keeps fetched rows; None keeps nothing. Rows of which it lacks some are fetched at
            once.

    Raises BankError where the store refuses, FileNotFoundError where the shard is gone.
    """
    checksums = [each.sha256 for each in part.features[row : row + count]]
    kept = [cache / each[:2] / f"{each}.{field.name}" if cache and each else None for each in checksums]
    known = [each and _cached(each, field.nbytes) for each in kept]
    start, size = begin + row * field.nbytes, count * field.nbytes
    numbers = np.empty(size, np.uint8) if into is None else into
    if all(known):
        numbers.data[:] = b"".join(each or b"" for each in known)
        return numbers
    try:
        content = storage.read(part.path.name, start, start + size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BankError(f"{part.path} cannot be read: {error.strerror or error}.") from error
    if len(content) != size:
        raise BankError(f"{part.path} cannot be read: {len(content):,} bytes came, not {size:,}.")
    for number, place in enumerate(kept):
        if place is not None and not known[number]:
            one = content[number * field.nbytes : (number + 1) * field.nbytes]
            with contextlib.suppress(OSError):  # a full cache is no error
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, one + hashlib.sha256(one).digest())
    numbers.data[:] = content
    return numbers


def _cached(path: Path, size: int) -> bytes | None:
    """What a cached file holds; None if there is none, or a damaged one."""
    with contextlib.suppress(OSError), open_regular(path) as file:  # another user's cache may be closed to this one
        content, digest = file.read(size), file.read(33)
        if digest == hashlib.sha256(content).digest():
            return content
    return None
