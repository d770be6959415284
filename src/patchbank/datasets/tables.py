"""A Parquet file as a source of images, one a row.

A row group's column can be read only from its beginning, a page (of 1,024 rows or more, as pyarrow writes them) at a
time. So rows are read ahead one by one and kept until they are asked for; decode threads ask nearly in order. The kept
bytes are bounded. If a row was dropped, or is asked for a second time, its group is read again. A process never sends
its open files to another one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbank.datasets.pages import PageFile
from patchbank.datasets.sources import Source
from patchbank.errors import first_line
from patchbank.locations import open_file, remote_errors

if TYPE_CHECKING:
    from patchbank.datasets.samples import Sample

_KEPT_ROWS = 1024
_KEPT_BYTES = 128 << 20
_WINDOWS = 4  # row groups read at once: at a boundary, two are
_BUFFER = 1 << 20  # without a buffer, pyarrow reads a whole column of a row group into memory
_MOST_LISTED = 1_000_000  # elements of a list in the file's footer: pyarrow's own limit


@dataclass(frozen=True)
class Table(Source):
    """A Parquet file; a sample's place is (row group, row in it).

    Attributes:
        column: of the images' bytes; of a struct's field, ``image.bytes``.
    """

    column: str

    def content(self, sample: Sample) -> BytesIO:
        assert sample.place is not None
        group, row = sample.place
        if not (found := _window(self, group).take(row)):
            raise OSError("the row holds no image")
        return BytesIO(found)


class Opened(NamedTuple):
    """An open Parquet file, and its `pyarrow.parquet.ParquetFile`."""

    file: PageFile
    table: Any

    def values(self, group: int, column: str, count: int) -> Iterator[Any]:
        """A column's values in a row group, `count` of which are read at once.

        They are copies: an arrow of a batch would keep the memory of all of it. Of a struct, only one field is read.
        Raises OSError and pyarrow's exceptions; UnicodeDecodeError for texts that are not UTF-8.
        """
        self.file.begin(self.table.metadata.row_group(group).num_rows)
        for batch in self.table.iter_batches(count, row_groups=[group], columns=[column], use_threads=False):
            for value in batch.column(0).to_pylist():
                while isinstance(value, dict):
                    (value,) = value.values()
                yield value


@contextmanager
def open_table(place: Path) -> Iterator[Opened]:
    """Open a Parquet file. Raises OSError and pyarrow's exceptions."""
    from pyarrow.parquet import ParquetFile

    with open_file(place, _BUFFER) as opened:
        file = PageFile(opened)
        listed = min(file.size + 1, _MOST_LISTED)  # pyarrow makes room for as many elements as a list states
        with ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, thrift_container_size_limit=listed) as table:
            yield Opened(file, table)


def _images(table: Table, group: int) -> Iterator[bytes | None]:
    """A row group's images. One is read at a time: many rows may share one value of a dictionary."""
    with remote_errors(table.location), open_table(table.location) as opened:
        yield from opened.values(group, table.column, 1)


class _Window:
    """One row group's images, read from the first row on as they are asked for."""

    def __init__(self, table: Table, group: int) -> None:
        self._table, self._group = table, group
        self._lock = threading.Lock()
        self._wanted: set[int] = set()  # rows that a thread waits for
        self._restart()

    def _restart(self) -> None:
        self._images = _images(self._table, self._group)
        self._rows: dict[int, bytes] = {}
        self._bytes = 0  # of them all
        self._next = 0  # the first row that has not been read
        self._broken: str | None = None  # why the rows from there on cannot be read

    def take(self, row: int) -> bytes:
        """Remove and return a row's bytes; none if it holds no image. Raises OSError."""
        self._wanted.add(row)
        with self._lock:
            try:
                if row not in self._rows and row < self._next:
                    self._restart()
                while row >= self._next:
                    self._read()
                    self._drop()
                return self._pop(row)
            finally:
                self._wanted.discard(row)

    def _pop(self, row: int) -> bytes:
        image = self._rows.pop(row)
        self._bytes -= len(image)
        return image

    def _drop(self) -> None:
        """Forget the oldest rows that no thread waits for, until the others are within bounds."""
        unwanted = (row for row in [*self._rows] if row not in self._wanted)
        while (len(self._rows) > _KEPT_ROWS or self._bytes > _KEPT_BYTES) and (row := next(unwanted, -1)) >= 0:
            self._pop(row)

    def _read(self) -> None:
        """Read the next row."""
        import pyarrow

        if self._broken is not None:
            raise OSError(self._broken)
        try:
            image = next(self._images)
        except StopIteration:
            self._broken = "the table ends before the row"
            raise OSError(self._broken) from None
        except (OSError, pyarrow.ArrowException) as error:
            cause = error.__cause__ or error
            if not isinstance(cause, pyarrow.ArrowException) and (not isinstance(cause, OSError) or cause.errno):
                self._restart()  # an error of the disk or the network may pass
                raise
            self._broken = f"damaged: {first_line(cause)}"
            raise OSError(self._broken) from error
        self._rows[self._next] = image or b""
        self._bytes += len(self._rows[self._next])
        self._next += 1


_window = lru_cache(_WINDOWS)(_Window)


def forget() -> None:
    """Close the tables that this process has open: a file may have been replaced, and a fork must not read on."""
    _window.cache_clear()


os.register_at_fork(after_in_child=forget)
