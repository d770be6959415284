"""Features of a bank in an object store: fetched one at a time, and cached in a local directory if there is one.

A cached file is named by the checksum of its feature. So it never grows stale, serves every bank that holds the same
feature, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchbank.bank.index import Part
from patchbank.bank.packing import Field
from patchbank.bank.storage import Storage
from patchbank.errors import BankError


@dataclass(frozen=True)
class RemoteColumn:
    """One field of a shard: row i is fetched when it is asked for.

    Attributes:
        begin: where the field begins in the shard, in bytes.
        cache: where fetched rows are kept; None keeps nothing.
    """

    storage: Storage
    part: Part
    field: Field
    begin: int
    cache: Path | None

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """(bytes,) uint8. Raises BankError where the store does not give it, FileNotFoundError where it is gone."""
        kept = self._kept(row)
        if kept is not None:
            with contextlib.suppress(FileNotFoundError):
                content = kept.read_bytes()
                if len(content) == self.field.nbytes:
                    return np.frombuffer(bytearray(content), np.uint8)
        start = self.begin + row * self.field.nbytes
        try:
            content = self.storage.read(self.part.path.name, start, start + self.field.nbytes)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BankError(f"{self.part.path} cannot be read: {error.strerror or error}.") from error
        if len(content) != self.field.nbytes:
            raise BankError(f"{self.part.path} cannot be read: {len(content):,} bytes came, not {self.field.nbytes:,}.")
        if kept is not None:
            _keep(kept, content)
        return np.frombuffer(bytearray(content), np.uint8)

    def _kept(self, row: int) -> Path | None:
        sha256 = self.part.features[row].sha256
        if self.cache is None or sha256 is None:
            return None
        return self.cache / sha256[:2] / f"{sha256}.{self.field.name}"


def _keep(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. A cache that takes no more is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
