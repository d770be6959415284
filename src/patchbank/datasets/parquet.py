"""Parquet files with a column of images. Listing reads the key column alone.

Columns are Parquet's own, whatever type Arrow gives them: texts and bytes may be views, large, or encoded in a
dictionary. A field of a struct is named with a dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from patchbank.datasets.several import LARGEST, Content, reason_of
from patchbank.datasets.tables import Opened, Table, forget, open_table
from patchbank.errors import ConfigError, DatasetError, first_line, install

ROW = ":row"  # in the place of a key column: a row's number is its key
_BYTES, _PATH = ".bytes", ".path"  # the fields of an image as Hugging Face writes it
_LONGEST = 4096  # characters of a key, as of a path
_LISTED = 10  # columns in an error
_AT_ONCE = 4  # keys, each of which may be as long as its page


def reader(image_column: str | None, key_column: str | None) -> Callable[[Path], Content]:
    """`read_table` of these columns. Raises ConfigError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"Parquet files are read by pyarrow: {install('parquet')}") from None
    return lambda place: read_table(place, image_column, key_column)


def read_table(place: Path, image_column: str | None, key_column: str | None) -> Content:
    """A file's keys, each with its (row group, row). The images are not read.

    Args:
        image_column, key_column: as `load_dataset` takes them.

    Raises ConfigError if a column is missing or of another type; DatasetError if a row has no key, two
    share one, or they are too long or not UTF-8.
    """
    import pyarrow

    forget()
    source = Table(place, "")
    images: list[tuple[str, int, tuple[int, int]]] = []
    numbers: dict[str, int] = {}
    try:
        with open_table(place) as opened:
            column, key_column = _columns(place, opened.table.schema, image_column, key_column)
            source = Table(place, column)
            for group, rows in enumerate(_rows(place, opened)):
                numbered = range(len(images), len(images) + rows)
                keys: Iterable[Any] = map("{:06}".format, numbered)
                if key_column != ROW:
                    keys = opened.values(group, key_column, _AT_ONCE)
                for number, value in zip(numbered, keys, strict=False):
                    if value is None:
                        raise DatasetError(
                            f"{place}: row {number:,} has no {key_column}, and so no key. --key-column {ROW} numbers "
                            "the rows."
                        )
                    key = value.decode() if isinstance(value, bytes) else str(value)
                    if len(key) > _LONGEST:
                        raise DatasetError(f"{place}: row {number:,} has a key of more than {_LONGEST:,} characters.")
                    if (other := numbers.setdefault(key, number)) != number:
                        raise DatasetError(
                            f"{place}: rows {other:,} and {number:,} both have the key {key!r}. --key-column {ROW} "
                            "numbers the rows."
                        )
                    images.append((key, number, (group, number - numbered.start)))
    except UnicodeDecodeError:
        raise DatasetError(f"{place}: {key_column} holds text that is not UTF-8, and so no keys.") from None
    except OSError as error:
        return Content(source, images, reason_of(error))
    except pyarrow.ArrowException as error:
        return Content(source, images, f"damaged, or no Parquet file: {first_line(error)}")
    return Content(source, images)


def _rows(place: Path, opened: Opened) -> list[int]:
    """The number of rows of each row group. Raises DatasetError if there are too many, OSError if it cannot be."""
    about = opened.table.metadata
    groups = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
    if min(groups, default=0) < 0 or (count := sum(groups)) > opened.file.size:
        raise OSError(f"it states {sum(groups):,} rows, and has {opened.file.size:,} bytes")
    if count > LARGEST:
        raise DatasetError(f"{place} has {count:,} rows, more than {LARGEST:,}: split it into several files.")
    return groups


def _columns(place: Path, schema: Any, image_column: str | None, key_column: str | None) -> tuple[str, str]:
    """The columns of the images' bytes and of the keys, or `ROW`. Raises ConfigError."""
    columns = [schema.column(number) for number in range(len(schema))]
    flat = [
        (each.path, each.physical_type, each.logical_type.type) for each in columns if each.max_repetition_level == 0
    ]
    binary = [path for path, stored, kind in flat if (stored, kind) == ("BYTE_ARRAY", "NONE")]
    named = [
        path for path, stored, kind in flat if kind == "STRING" or (stored[:3] == "INT" and kind in ("NONE", "INT"))
    ]
    images = {path.removesuffix(_BYTES): path for path in binary}
    if image_column is None:
        image_column = next(iter(images)) if len(images) == 1 else "image"
    if (column := images.get(image_column.removesuffix(_BYTES))) is None:
        listed = f"--image-column is one of {_some(images)}" if images else f"it has {_some(path for path, *_ in flat)}"
        raise ConfigError(
            f"{place} has no column {image_column!r} of images, which are bytes, or structs with a field `bytes`: "
            f"{listed}."
        )
    if key_column is None:
        beside = column.removesuffix(_BYTES) + _PATH
        key_column = beside if beside in named else ""
    if key_column not in (ROW, *named, *binary):
        wrong = "Say which column holds the keys"
        if key_column:
            wrong = f"{place} has no column {key_column!r} of keys, which are texts or whole numbers"
        listed = f"{_some(named)}, or {ROW}" if named else ROW
        raise ConfigError(f"{wrong}: --key-column is one of {listed}, which numbers the rows.")
    for name in (column, key_column):
        if sum(f"{each.path}.".startswith(f"{name}.") for each in columns) > 1:
            raise ConfigError(f"{place} has several columns {name!r}: name another one.")
    return column, key_column


def _some(names: Iterable[str]) -> str:
    first = list(islice(names, _LISTED + 1))
    return ", ".join(first[:_LISTED]) + ", ..." * (len(first) > _LISTED)
