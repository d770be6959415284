"""Parquet files with a column of images. Listing reads the key column alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchbank.datasets.several import LARGEST, Content, reason_of
from patchbank.datasets.tables import Table, forget, open_table
from patchbank.errors import ConfigError, DatasetError, first_line


def reader(image_column: str, key_column: str | None) -> Callable[[Path], Content]:
    """`read_table` of these columns. Raises ConfigError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError('Parquet files are read by pyarrow: pip install "patchbank[parquet]"') from None
    return lambda place: read_table(place, image_column, key_column)


def read_table(place: Path, image_column: str, key_column: str | None) -> Content:
    """A file's keys, each with its (row group, row). The images are not read.

    Raises ConfigError if a column is missing or of another type; DatasetError if a row has no key, two
    share one, or they are not UTF-8.
    """
    import pyarrow

    forget()
    source = Table(place, image_column)
    images: list[tuple[str, int, tuple[int, int]]] = []
    rows: dict[str, int] = {}
    try:
        with open_table(place) as file:
            _check_columns(place, file.schema_arrow, image_column, key_column)
            if file.metadata.num_rows > LARGEST:
                raise DatasetError(
                    f"{place} has {file.metadata.num_rows:,} rows, more than {LARGEST:,}: split it into several files."
                )
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, columns=[key_column], use_threads=False).column(0).to_pylist()
                for row, value in enumerate(keys):
                    number = len(images)
                    if value is None:
                        raise DatasetError(f"{place}: row {number:,} has no {key_column}, and so no key.")
                    key = str(value)
                    if (other := rows.setdefault(key, number)) != number:
                        raise DatasetError(f"{place}: rows {other:,} and {number:,} both have the key {key!r}.")
                    images.append((key, number, (group, row)))
    except UnicodeDecodeError:
        raise DatasetError(f"{place}: {key_column} holds text that is not UTF-8, and so no keys.") from None
    except OSError as error:
        return Content(source, images, reason_of(error))
    except pyarrow.ArrowException as error:
        return Content(source, images, f"damaged, or no Parquet file: {first_line(error)}")
    return Content(source, images)


def _check_columns(place: Path, schema: Any, image_column: str, key_column: str | None) -> None:
    from pyarrow import types

    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    for option, name in (("--image-column", image_column), ("--key-column", key_column)):
        if name not in schema.names:
            wrong = f"{place} has no column {name!r}" if name else "Say which column holds the keys"
            raise ConfigError(f"{wrong}: {option} is one of {listed}.")
    kind = schema.field(key_column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
        raise ConfigError(f"{place}: keys are texts or whole numbers, and {key_column} is neither. It has {listed}.")
    kind = schema.field(image_column).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ConfigError(
            f"{place}: images are bytes, or a struct with a field `bytes`, and {image_column} is neither. "
            f"It has {listed}."
        )
