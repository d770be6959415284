"""The pages of a Parquet file, whose headers say what reading them takes: checked before pyarrow believes it.

pyarrow makes room for as many bytes and values as a header states. A page may unpack to `_USUAL` bytes, or to `_RATIO`
times those in the file, and it has no more values than rows or bytes. Headers are Thrift structs in its compact form
(parquet.thrift, PageHeader); Thrift skips a field of another type than it expects, and so does this.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

from patchbank.files import bytes_text

_USUAL = 4 << 20
_RATIO = 100
_HEADER = 1 << 16  # bytes; one with statistics of long values has some thousand
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = (*range(1, 9), 12)
_UNPACKED, _PACKED = (2, _I32), (3, _I32)
_KINDS = ((5, _STRUCT), (7, _STRUCT), (8, _STRUCT))  # data, dictionary, data of version 2; their field 1: the values
_DEEPEST = 8


class PageFile:
    """A Parquet file for pyarrow to read, which hands over no page header before it has been checked.

    pyarrow reads a column of a row group from its first page to its last, and no byte beyond.

    Attributes:
        size: in bytes.
    """

    mode = "rb"
    closed = False  # whoever opened the file closes it

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.size = file.seek(0, os.SEEK_END)
        self._next: int | None = self.size  # where the next header lies; None: where the next read begins
        self._rows = 0

    def begin(self, rows: int) -> None:
        """Check the pages of the column that is read next, in a row group of so many rows."""
        self._next, self._rows = None, min(rows, self.size)

    def read(self, size: int = -1) -> bytes:
        """Bytes of the file, up to the next page that would take more memory than it may, or is no page.

        Raises OSError where they would begin with that page.
        """
        content = self._file.read(size)
        start = self._file.tell() - len(content)
        page = start if self._next is None else self._next
        try:
            while page < start + len(content):
                page += self._page(page)
        except OSError:
            if page <= start:
                raise
            content = content[: page - start]
        self._next = page
        self._file.seek(start + len(content))
        return content

    def _page(self, start: int) -> int:
        """The bytes that a page has in the file, with its header. Raises OSError if it must not be read."""
        self._file.seek(start)
        header = _Header(self._file.read(_HEADER))
        unpacked, packed, values = header.page()
        if start + header.end + packed > self.size or values > max(self._rows, unpacked):  # a dictionary has its own
            raise OSError("a page is larger than its column")
        if unpacked > max(_USUAL, _RATIO * packed):
            raise OSError(
                f"a page of {bytes_text(packed)} unpacks to {bytes_text(unpacked)}, more than {bytes_text(_USUAL)} and "
                f"{_RATIO} times as much: write the file with smaller pages"
            )
        return header.end + packed


class _Header:
    """A page's header.

    Attributes:
        end: the number of bytes that were read.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.end = 0

    def page(self) -> tuple[int, int, int]:
        """Bytes when unpacked, bytes in the file, number of values. Raises OSError."""
        try:
            fields = self._struct(0)
            values = [fields[kind].get((1, _I32), 0) for kind in _KINDS if kind in fields]
            found = fields[_UNPACKED], fields[_PACKED], max(values, default=0)
        except (IndexError, KeyError, ValueError) as error:
            raise OSError("a page has no header") from error
        if min(found) < 0:
            raise OSError("a page has a negative size")
        return found

    def _struct(self, depth: int) -> dict[tuple[int, int], Any]:
        """(number, type) -> value of each field."""
        if depth > _DEEPEST:
            raise ValueError
        fields: dict[tuple[int, int], Any] = {}
        number = 0
        while (head := self._byte()) & 15:
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number, head & 15] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _STRUCT:
            return self._struct(depth + 1)
        if kind in (_TRUE, _FALSE):
            return None
        if kind not in (_BYTE, _DOUBLE, _BINARY):  # no header has a list
            raise ValueError
        length = self._varint() if kind == _BINARY else 8 if kind == _DOUBLE else 1
        self.end += length
        return None

    def _byte(self) -> int:
        self.end += 1
        return self._content[self.end - 1]

    def _varint(self) -> int:
        number = 0
        for place in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 127) << place
            if byte < 128:
                return number
        raise ValueError

    def _integer(self) -> int:
        number = self._varint()
        return number >> 1 ^ -(number & 1)
