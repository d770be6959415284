"""A Parquet file as a source of images, one a row.

A row group's column can be read only from its beginning, a page (of 1,024 rows or more, as pyarrow writes them) at a
time. So rows are read ahead in small batches and kept until they are asked for; decode threads ask nearly in order. The
kept bytes are bounded. If a row was dropped, or is asked for a second time, its group is read again. A process never
sends its open files to another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.datasets.sources import Source
from patchbank.errors import first_line
from patchbank.locations import filesystem, is_remote, remote_errors

if TYPE_CHECKING:
    from patchbank.datasets.samples import Sample

_BATCH_ROWS = 64
_BATCH_BYTES = 16 << 20  # of a batch of large images, about
_KEPT_ROWS = 1024
_KEPT_BYTES = 128 << 20
_WINDOWS = 4  # row groups read at once: at a boundary, two are
_BUFFER = 1 << 20  # without a buffer, pyarrow reads a whole column of a row group into memory


@dataclass(frozen=True)
class Table(Source):
    """A Parquet file; a sample's place is (row group, row in it).

    Attributes:
        column: of the images: binary, or a struct with a field ``bytes``.
    """

    column: str

    def content(self, sample: Sample) -> BytesIO:
        assert sample.place is not None
        group, row = sample.place
        if not (found := _window(self, group).take(row)):
            raise OSError("the row holds no image")
        return BytesIO(found)


@contextmanager
def open_table(place: Path) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`. Raises OSError and pyarrow's exceptions."""
    from pyarrow.parquet import ParquetFile

    if not is_remote(place):
        with ParquetFile(str(place), buffer_size=_BUFFER, pre_buffer=False) as table:
            yield table
        return
    with remote_errors(place):
        files, path = filesystem(place)
        file = files.open(path, "rb", block_size=_BUFFER)
    with file, ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
        yield table


def _batches(table: Table, group: int) -> Iterator[list[bytes | None]]:
    """A row group's images in batches. They are copies: an arrow of a batch would keep the memory of all of it."""
    with remote_errors(table.location) if table.remote else nullcontext(), open_table(table.location) as file:
        name = table.column
        if file.schema_arrow.field(name).type.num_fields:
            name += ".bytes"
        about = file.metadata.row_group(group)
        columns = [about.column(index) for index in range(about.num_columns)]
        size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema == name)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(1, size)))
        for batch in file.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False):
            yield [each["bytes"] if isinstance(each, dict) else each for each in batch.column(0).to_pylist()]


class _Window:
    """One row group's images, read from the first row on as they are asked for."""

    def __init__(self, table: Table, group: int) -> None:
        self._table, self._group = table, group
        self._lock = threading.Lock()
        self._wanted: set[int] = set()  # rows that a thread waits for
        self._restart()

    def _restart(self) -> None:
        self._batches = _batches(self._table, self._group)
        self._rows: dict[int, bytes | None] = {}
        self._next = 0  # the first row that has not been read
        self._broken: str | None = None  # why the rows from there on cannot be read

    def take(self, row: int) -> bytes | None:
        """Remove and return a row's bytes; None if it has none. Raises OSError."""
        self._wanted.add(row)
        with self._lock:
            try:
                if row not in self._rows and row < self._next:
                    self._restart()
                while row >= self._next:
                    self._read()
                    self._drop()
                return self._rows.pop(row)
            finally:
                self._wanted.discard(row)

    def _drop(self) -> None:
        """Forget the oldest rows that no thread waits for, until the others are within bounds."""
        size = sum(len(each or b"") for each in self._rows.values())
        for row in list(self._rows):
            if len(self._rows) <= _KEPT_ROWS and size <= _KEPT_BYTES:
                return
            if row not in self._wanted:
                size -= len(self._rows.pop(row) or b"")

    def _read(self) -> None:
        """Read the next batch of rows."""
        import pyarrow

        if self._broken is not None:
            raise OSError(self._broken)
        try:
            images = next(self._batches, None)
        except (OSError, pyarrow.ArrowException) as error:
            cause = error.__cause__ or error
            if not isinstance(cause, pyarrow.ArrowException) and (not isinstance(cause, OSError) or cause.errno):
                self._restart()  # an error of the disk or the network may pass
                raise
            self._broken = f"damaged: {first_line(cause)}"
            raise OSError(self._broken) from error
        if images is None:
            self._broken = "the table ends before the row"
            raise OSError(self._broken)
        self._rows |= enumerate(images, self._next)
        self._next += len(images)


_window = lru_cache(_WINDOWS)(_Window)


def forget() -> None:
    """Close the tables that this process has open: a file may have been replaced, and a fork must not read on."""
    _window.cache_clear()


os.register_at_fork(after_in_child=forget)
