"""A Parquet file as a source of images, one a row.

A row group's column can be read only from its beginning on. So rows are read ahead in small batches, and kept until
they are asked for; decode threads ask nearly in order. What is kept is bounded; where a row has been dropped, or is
asked for a second time, its group is read anew. Open files are a process's own, and are not sent to another.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.datasets.archives import SingleFile
from patchbank.locations import filesystem, is_remote, remote_errors

if TYPE_CHECKING:
    from patchbank.datasets.samples import Sample

_BATCH_ROWS = 64
_BATCH_BYTES = 16 << 20  # about, where images are large
_KEPT_ROWS = 1024
_KEPT_BYTES = 128 << 20
_WINDOWS = 4  # row groups read at once: where one ends and the next begins, two are
_BUFFER = 1 << 20  # without one, pyarrow would read a whole column of a row group into memory

_NOTHING = "the row holds no image"


@dataclass(frozen=True)
class Table(SingleFile):
    """A Parquet file; a sample's place is (row group, row in it).

    Attributes:
        column: the images': binary, or a struct with a field ``bytes``.
    """

    column: str

    def content(self, sample: Sample) -> BytesIO:
        """A row's bytes. Safe to call from several threads. Raises OSError where they cannot be had."""
        assert sample.place is not None
        group, row = sample.place
        if not (found := _window(self, group).take(row)):
            raise OSError(_NOTHING)
        return BytesIO(found)


def open_table(place: Path, stack: ExitStack) -> Any:
    """A `pyarrow.parquet.ParquetFile` that `stack` closes. Raises OSError and pyarrow's exceptions."""
    from pyarrow.parquet import ParquetFile

    if not is_remote(place):
        return stack.enter_context(ParquetFile(str(place), buffer_size=_BUFFER, pre_buffer=False))
    with remote_errors(place):
        files, path = filesystem(place)
        file = stack.enter_context(files.open(path, "rb", block_size=_BUFFER))
        return stack.enter_context(ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False))


def first_line(error: Exception) -> str:
    """What an exception says, without the lines that pyarrow adds of its own source."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Window:
    """One row group's images, read from the first row on as they are asked for."""

    def __init__(self, table: Table, group: int) -> None:
        self._table, self._group = table, group
        self._lock = threading.Lock()
        self._wanted: set[int] = set()  # rows that a thread is waiting for
        self._stack = ExitStack()
        self._restart()

    def _restart(self) -> None:
        self._batches: Iterator[Any] | None = None
        self._stack.close()
        self._rows: OrderedDict[int, bytes | None] = OrderedDict()
        self._bytes = 0
        self._next = 0  # the first row that has not been read
        self._broken: str | None = None  # why the rows from there on cannot be

    def close(self) -> None:
        """Close the file, and forget what was read."""
        with self._lock:
            self._restart()

    def take(self, row: int) -> bytes | None:
        """A row's bytes, which are forgotten here; None where it has none. Raises OSError."""
        self._wanted.add(row)
        with self._lock:
            try:
                if row not in self._rows and row < self._next:
                    self._restart()
                while row >= self._next:
                    self._read()
                    self._drop()
                return self._forget(row)
            finally:
                self._wanted.discard(row)

    def _drop(self) -> None:
        """Forget the oldest rows that nobody waits for, while there are too many."""
        for row in list(self._rows):
            if len(self._rows) <= _KEPT_ROWS and self._bytes <= _KEPT_BYTES:
                return
            if row not in self._wanted:
                self._forget(row)

    def _forget(self, row: int) -> bytes | None:
        found = self._rows.pop(row)
        self._bytes -= len(found or b"")
        return found

    def _read(self) -> None:
        """Read the next batch of rows."""
        import pyarrow

        if self._broken is not None:
            raise OSError(self._broken)
        location = self._table.location
        try:
            with remote_errors(location) if self._table.remote else nullcontext():
                if self._batches is None:
                    self._batches = self._begin()
                batch = next(self._batches, None)
        except (OSError, pyarrow.ArrowException) as error:
            cause = error.__cause__ or error
            if not isinstance(cause, pyarrow.ArrowException) and (not isinstance(cause, OSError) or cause.errno):
                self._restart()  # of the disk or the network, and the next row may be luckier
                raise
            self._broken = f"damaged: {first_line(error)}"
            raise OSError(self._broken) from error
        if batch is None:
            self._broken = "the table ends before the row"
            raise OSError(self._broken)
        # Copies, since one row that waits would keep the memory of its whole batch.
        for value in batch.column(0):
            found = value.as_py()
            if isinstance(found, dict):
                found = found["bytes"]
            self._rows[self._next] = found
            self._bytes += len(found or b"")
            self._next += 1

    def _begin(self) -> Iterator[Any]:
        file = open_table(self._table.location, self._stack)
        name = self._table.column
        if file.schema_arrow.field(name).type.num_fields:
            name += ".bytes"
        group = file.metadata.row_group(self._group)
        columns = [group.column(index) for index in range(group.num_columns)]
        size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema == name)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, size)))
        batches: Iterator[Any] = file.iter_batches(rows, row_groups=[self._group], columns=[name], use_threads=False)
        return batches


_windows: OrderedDict[tuple[Table, int], _Window] = OrderedDict()
_windows_lock = threading.Lock()


def _window(table: Table, group: int) -> _Window:
    with _windows_lock:
        window = _windows.pop((table, group), None) or _Window(table, group)
        _windows[table, group] = window  # the one used last is the last
        while len(_windows) > _WINDOWS:
            _windows.popitem(last=False)[1].close()
        return window


def forget(place: Path) -> None:
    """Close a file that this process has open, since another may lie in its place."""
    with _windows_lock:
        for key in [key for key in _windows if key[0].location == place]:
            _windows.pop(key).close()


def _forget() -> None:
    """In a forked process: the parent's files are not its own, and its threads do not go on."""
    global _windows_lock
    _windows.clear()
    _windows_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
