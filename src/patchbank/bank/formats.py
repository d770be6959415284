"""Files of features for other programs: HDF5, Parquet, tars of WebDataset, numpy arrays. One row a sample.

docs/guides/exporting.md lists the names in them. A writer takes batches as they are read, and holds one at a time.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MARK = "patchbank export"
VERSION = 1
_CHUNK = 1 << 16  # bytes that a chunk of HDF5 has at least, if its rows are smaller

Row = Mapping[str, Any]  # a sample's key, and facts by name; None where one is not known
Shape = tuple[int, ...]


class Fact(NamedTuple):
    """What is known of every sample beside its features.

    Attributes:
        plural: its name where it is one array of all samples.
        dtype, shape: of one sample's.
        missing: stands for None in that array.
    """

    plural: str
    dtype: str
    shape: Shape
    missing: float


FACTS = {
    "size": Fact("sizes", "int64", (2,), 0),
    "scale": Fact("scales", "float64", (2,), np.nan),
    "offset": Fact("offsets", "float64", (2,), np.nan),
    "box": Fact("boxes", "float32", (4,), np.nan),
    "label": Fact("labels", "int64", (), -1),
    "score": Fact("scores", "float32", (), np.nan),
    "verb": Fact("verbs", "int64", (), -1),
    "hoi": Fact("hois", "int64", (), -1),
}
RESERVED = {"key", "keys", "width", "height", "failures", *FACTS, *(each.plural for each in FACTS.values())}


@dataclass(frozen=True)
class Contents:
    """What is written.

    Attributes:
        outputs: name -> shape of one sample.
        dtype: of all outputs.
        facts: the names of those of `FACTS` that are written.
        about: the document in every export: what it is, and of which bank.
        failures: key -> why it has no row; complete when the last batch was read.
    """

    outputs: Mapping[str, Shape]
    dtype: str
    facts: tuple[str, ...]
    about: Mapping[str, Any]
    failures: Mapping[str, str]

    def arrays(self) -> dict[str, tuple[str, Shape]]:
        """The arrays of all samples, without their first dimension: name -> (dtype, shape)."""
        facts = {FACTS[name].plural: (FACTS[name].dtype, FACTS[name].shape) for name in self.facts}
        return {name: (self.dtype, shape) for name, shape in self.outputs.items()} | facts


class Batch(NamedTuple):
    """Some samples, one after the other.

    Attributes:
        file: the number of the file that they belong to, if there are several.
        rows: a sample each.
        outputs: name -> features of these samples, (K, ...).
    """

    file: int
    rows: list[Row]
    outputs: Mapping[str, NDArray[Any]]

    def arrays(self, facts: Iterable[str]) -> dict[str, NDArray[Any]]:
        """What `Contents.arrays` lists, of these samples."""
        found = dict(self.outputs)
        for name in facts:
            plural, dtype, shape, missing = FACTS[name]
            values = (np.full(shape, missing) if row[name] is None else row[name] for row in self.rows)
            found[plural] = np.array([*values], dtype).reshape(len(self.rows), *shape)
        return found


def to_json(value: object) -> str:
    """JSON in ASCII: a key may hold what UTF-8 cannot."""
    return json.dumps(value, separators=(",", ":"))


def _hdf5(place: Path, contents: Contents, batches: Iterable[Batch]) -> None:
    import h5py

    def grow(data: Any, values: Any) -> None:
        data.resize(len(data) + len(values), 0)
        data[-len(values) :] = values

    with _Disk(place, "w+") as disk, h5py.File(disk, "w") as file:
        file.attrs["patchbank"] = to_json(contents.about)
        for name, (dtype, shape) in {"keys": (h5py.string_dtype(), ()), **contents.arrays()}.items():
            size = prod(shape) * (8 if name == "keys" else np.dtype(dtype).itemsize)
            chunks = (max(1, _CHUNK // size), *shape)
            file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=chunks)
        for batch in batches:
            grow(file["keys"], [row["key"] for row in batch.rows])
            for name, values in batch.arrays(contents.facts).items():
                grow(file[name], values)
            file.flush()
            disk.check()
        file["failures"] = to_json(dict(contents.failures))


class _Disk(io.FileIO):
    """A file that keeps its first error until `check`: HDF5 would print it, and others after it, as it closes."""

    _error: OSError | None = None

    def write(self, content: Any) -> int:
        """All of it."""
        view = memoryview(content)
        try:
            while view and self._error is None:
                view = view[super().write(view) :]
        except OSError as error:
            self._error = error
        return len(content)

    def check(self) -> None:
        """Raise the first error."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close it, after a `check`."""
        super().close()
        self.check()


def is_hdf5_export(file: Path) -> bool:
    """Whether `_hdf5` wrote a file."""
    import h5py

    try:
        with h5py.File(file) as opened:
            return MARK in str(opened.attrs.get("patchbank"))
    except OSError:
        return False


def _parquet(place: Path, contents: Contents, batches: Iterable[Batch]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    fields = {"key": pa.string(), "width": pa.int64(), "height": pa.int64()}
    for name in contents.facts:
        if name != "size":
            single = pa.from_numpy_dtype(FACTS[name].dtype)
            # Of any length: pyarrow 21 writes no null among lists of a fixed one.
            fields[name] = pa.list_(single) if FACTS[name].shape else single
    single = pa.from_numpy_dtype(contents.dtype)
    fields |= {name: pa.list_(single, prod(shape)) for name, shape in contents.outputs.items()}  # flat, for pandas
    schema = pa.schema(fields, {"patchbank": to_json(contents.about)})

    def columns(batch: Batch) -> Iterator[Any]:
        for name, wanted in fields.items():
            if (values := batch.outputs.get(name)) is not None:
                yield pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=wanted)
            elif name in ("width", "height"):
                sizes = (row["size"] or (None, None) for row in batch.rows)
                yield pa.array([size[name == "height"] for size in sizes], wanted)
            else:
                yield pa.array([row[name] for row in batch.rows], wanted)

    for number, group in enumerate(_by_file(batches)):
        with ParquetWriter(
            place / f"{number:06}.parquet",
            schema,
            compression="NONE",  # of features it saves little
            use_dictionary=False,
            write_statistics=["key"],
        ) as file:
            for batch in group:  # a row group each
                file.write_table(pa.Table.from_arrays([*columns(batch)], schema=schema))


def _webdataset(place: Path, _: Contents, batches: Iterable[Batch]) -> None:
    for number, group in enumerate(_by_file(batches)):
        with tarfile.open(place / f"{number:06}.tar", "w") as file:
            for batch in group:
                for index, row in enumerate(batch.rows):
                    name = webdataset_key(row["key"])
                    for output, values in batch.outputs.items():
                        _add(file, f"{name}.{output}.npy", _npy_header(values[index]) + values[index].tobytes())
                    _add(file, f"{name}.json", to_json(row).encode())
                file.members = []  # type: ignore[attr-defined]  # tarfile would keep them all


def webdataset_key(key: str) -> str:
    """A key as WebDataset takes it, which cuts it at the first dot: `urllib.parse.unquote` is the inverse.

    ``train/a.b.jpg`` -> ``train/a%2Eb%2Ejpg``. Names that begin with two underscores would be WebDataset's own.
    """
    text = quote(key, errors="surrogatepass").replace(".", "%2E")
    return f"%5F{text[1:]}" if text.startswith("__") else text


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no time, and nobody's: the same bytes every time
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


def _npy(place: Path, contents: Contents, batches: Iterable[Batch]) -> None:
    arrays, keys = contents.arrays(), list[str]()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(place / f"{name}.npy", "wb")) for name in arrays}
        for name, file in files.items():
            file.write(_npy_header(np.empty((0, *arrays[name][1]), arrays[name][0])))
        for batch in batches:
            keys += [row["key"] for row in batch.rows]
            for name, values in batch.arrays(contents.facts).items():
                files[name].write(values.data)
        for name, file in files.items():  # numpy leaves room for any number of rows
            dtype, shape = arrays[name]
            file.seek(0)
            file.write(_npy_header(np.broadcast_to(np.empty((), dtype), (len(keys), *shape))))
    (place / "keys.json").write_text(to_json(keys))


def _npy_header(like: NDArray[Any]) -> bytes:
    """What a .npy file of an array of this dtype and shape begins with."""
    header = io.BytesIO()
    about = {"descr": npy.dtype_to_descr(like.dtype), "fortran_order": False, "shape": like.shape}
    npy.write_array_header_1_0(header, about)
    return header.getvalue()


def _by_file(batches: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    return (group for _, group in groupby(batches, lambda batch: batch.file))


class Format(NamedTuple):
    """A way to write features.

    Attributes:
        write: writes them to a new file, or into a new directory.
        package: that it needs, and the extra with it; empty if it needs none.
        single: whether it is one file.
        overhead: approximate bytes a sample and array, beside the numbers.
    """

    write: Callable[[Path, Contents, Iterable[Batch]], None]
    package: str = ""
    extra: str = ""
    single: bool = False
    overhead: int = 64


FORMATS = {
    "hdf5": Format(_hdf5, "h5py", "hdf5", single=True),
    "parquet": Format(_parquet, "pyarrow", "parquet"),
    "webdataset": Format(_webdataset, overhead=1024),
    "npy": Format(_npy),
}
