"""Images in Parquet files: the features of single files, columns of any type, rows in any order, hostile files."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.check import verify
from patchbank.config import Partition
from patchbank.datasets import Dataset, Sample, tables
from patchbank.datasets.several import LARGEST, POSITIONS
from patchbank.errors import ConfigError, DatasetError
from tests.support import SecondLook, contents, photographs


def write(path: Path, group: int = 3, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def load(*paths: Path, **options: Any) -> Dataset:
    return load_dataset("parquet", list(paths), **{"key_column": "name", **options})


def read(sample: Sample) -> bytes:
    content: bytes = sample.source.content(sample).read()  # type: ignore[union-attr]
    return content


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Eleven photographs."""
    directory = tmp_path_factory.mktemp("images")
    return {name: (directory / name).read_bytes() for name in photographs(directory, 11)}


@pytest.fixture
def config(tiny_config: ExtractConfig) -> ExtractConfig:
    """Batches of four, shards of three images."""
    return replace(tiny_config, layout="shards", shard_size=3 * 2176)


@pytest.fixture
def both(files: Mapping[str, bytes], tmp_path: Path) -> list[Path]:
    """One file of plain bytes, one of Hugging Face's structs."""
    items = list(files.items())
    structs = [{"bytes": content, "path": name} for name, content in items[7:]]
    return [
        write(tmp_path / "a.parquet", name=[name for name, _ in items[:7]], image=[each for _, each in items[:7]]),
        write(tmp_path / "b.parquet", name=[name for name, _ in items[7:]], image=structs),
    ]


def test_the_same_features_as_of_a_folder(
    files: Mapping[str, bytes], both: list[Path], config: ExtractConfig, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    extract(load_dataset("folder", tmp_path / "folder"), tmp_path / "expected", config)
    dataset = load(*both)
    assert [(sample.position, sample.place) for sample in dataset.samples][6:8] == [(6, (2, 0)), (POSITIONS, (0, 0))]
    summary = extract(dataset, tmp_path / "bank", config)
    assert (summary.images, summary.failures) == (11, {})
    bank, expected = open_bank(tmp_path / "bank"), open_bank(tmp_path / "expected")
    assert list(bank) == list(expected)
    assert all(bank[key].allclose(expected[key], rtol=0, atol=1e-5) for key in files)
    assert verify(tmp_path / "bank").problems == []
    for index in range(2):
        part = Partition(index, 2)
        extract(load(*both, partition=part), tmp_path / "parts", replace(config, partition=part))
    assert contents(tmp_path / "parts") == contents(tmp_path / "bank")
    assert extract(load(*both), tmp_path / "stopped", config, stop=SecondLook()).remaining
    assert 0 < len(open_bank(tmp_path / "stopped")) < 11
    extract(load(*both), tmp_path / "stopped", config)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "bank")


@pytest.mark.parametrize("kept", [3, 1024])
def test_rows_in_any_order_from_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(tables, "_KEPT_ROWS", kept)
    monkeypatch.setattr(tables, "_window", lru_cache(2)(tables._Window))
    most = [0]
    drop = tables._Window._drop

    def watched(window: tables._Window) -> None:
        drop(window)
        most[0] = max(most[0], len(window._rows))

    monkeypatch.setattr(tables._Window, "_drop", watched)
    rows = [str(number).encode() * (number + 1) for number in range(200)]
    path = write(tmp_path / "a.parquet", 50, name=list(range(200)), image=rows)
    samples = list(load(path).samples)
    assert [sample.key for sample in samples[:2]] == ["0", "1"]

    orders = [list(range(200)), list(range(0, 200, 7)), list(range(200))[::-1], list(range(200))]
    random.Random(0).shuffle(orders[-1])
    with ThreadPoolExecutor(8) as threads:
        for order in orders:
            assert list(threads.map(read, [samples[index] for index in order])) == [rows[index] for index in order]
    assert 0 < most[0] <= kept + 8, "those that eight threads wait for"


def test_planning_reads_no_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", name=["a.jpg"], image=[b"x" * 5000])
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    dataset = load(path)
    assert not dataset.damaged
    with pytest.raises(OSError):
        dataset.samples[0].source.content(dataset.samples[0])


def test_rows_without_an_image_fail(files: Mapping[str, bytes], config: ExtractConfig, tmp_path: Path) -> None:
    structs = [None, {"bytes": None}, {"bytes": b""}, {"bytes": next(iter(files.values()))}]
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    summary = extract(load(write(tmp_path / "a.parquet", name=names, image=structs)), tmp_path / "bank", config)
    assert summary.failures == dict.fromkeys(names[:3], "the row holds no image")
    assert summary.images == 1


def test_wrong_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", name=["a.jpg"], image=[b"x"], score=[0.5], thumb=[{"bytes": b"x"}])
    with pytest.raises(ConfigError, match=r"no column 'pixels' of images.*image_column is one of image, thumb\."):
        load(path, image_column="pixels")
    with pytest.raises(ConfigError, match=r"which column holds the keys: key_column is one of name, or :row"):
        load(path, key_column=None)
    with pytest.raises(ConfigError, match=r"'score' of keys, which are texts.*one of name, or :row"):
        load(path, key_column="score")
    with pytest.raises(ConfigError, match=r"'score' of images, which are bytes.*one of image, thumb\."):
        load(path, image_column="score")
    with pytest.raises(ConfigError, match=r"no column 'image' of images.*: it has name, score\."):
        load(write(tmp_path / "b.parquet", name=["a.jpg"], score=[0.5]))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"patchbank\[parquet\]"):
        load(path)


def hugging_face(*names: str | None) -> pyarrow.Array:
    """A column of images as `datasets` writes it."""
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return pyarrow.array([{"bytes": f"<{name}>".encode(), "path": name} for name in names], kind)


def test_hugging_faces_files_need_no_option(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train-00000-of-00001.parquet", 2, img=hugging_face("a.jpg", "b.jpg", "c.jpg"), label=[0] * 3
    )
    dataset = load_dataset("parquet", path)
    assert [(each.key, each.place) for each in dataset.samples] == [
        ("a.jpg", (0, 0)),
        ("b.jpg", (0, 1)),
        ("c.jpg", (1, 0)),
    ]
    assert [read(each) for each in dataset.samples] == [b"<a.jpg>", b"<b.jpg>", b"<c.jpg>"]
    with pytest.raises(DatasetError, match=r"row 1 has no image.path.*key_column :row"):
        load_dataset("parquet", write(tmp_path / "b.parquet", image=hugging_face("a.jpg", None)))


def test_numbers_of_rows_as_keys(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name, 2, image=hugging_face("a.jpg", None, "a.jpg")) for name in ("a.parquet", "b.parquet")
    ]
    dataset = load_dataset("parquet", paths, key_column=":row")
    assert [each.key for each in dataset.samples] == [f"{name}/00000{row}" for name in "ab" for row in range(3)]
    assert [read(each) for each in dataset.samples] == [b"<a.jpg>", b"<None>", b"<a.jpg>"] * 2


@pytest.mark.parametrize("text", ["string", "large_string", "string_view", "binary", "binary_view", "dictionary"])
@pytest.mark.parametrize("nested", [False, True])
def test_columns_of_every_type(tmp_path: Path, text: str, nested: bool) -> None:
    names, images = ["a", "b", "c"], [b"1", b"2", b"1"]
    if text == "dictionary":
        columns = [pyarrow.array(names).dictionary_encode(), pyarrow.array(images).dictionary_encode()]
    else:
        kinds = [getattr(pyarrow, name)() for name in (text, text.replace("string", "binary"))]
        columns = [pyarrow.array(values, kind) for values, kind in zip((names, images), kinds, strict=True)]
    if nested:
        struct = pyarrow.StructArray.from_arrays(columns, ["name", "bytes"])
        path = write(tmp_path / "a.parquet", pixels=struct)
        dataset = load(path, image_column="pixels", key_column="pixels.name")
    else:
        path = write(tmp_path / "a.parquet", name=columns[0], pixels=columns[1])
        dataset = load(path, image_column="pixels")
    assert [(each.key, read(each)) for each in dataset.samples] == list(zip(names, images, strict=True))


POOLS: list[pyarrow.MemoryPool] = []  # a table that is open keeps a pool in use, and not alive


@contextmanager
def memory() -> Iterator[list[int]]:
    """The most bytes that pyarrow and Python hold within the block, in a list of one element."""
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    POOLS.append(pool)
    most = [0]
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield most
    finally:
        most[0] = pool.max_memory() + tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        pyarrow.set_memory_pool(before)


def rows(count: int, **columns: Any) -> dict[str, Any]:
    """A table's columns: names, and images, unless they are given."""
    return {"name": list(range(count)), "image": [b"x"] * count} | columns


_PLAIN: dict[str, Any] = {"use_dictionary": False}
VAST: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {  # columns, and how they are written
    "rows that share a value": (lambda: rows(100, image=[bytes(3 << 20)] * 100), {}),
    "a value": (lambda: rows(1, image=[bytes(100 << 20)]), {}),
    "a page": (lambda: rows(100, image=[bytes(1 << 20)] * 100), _PLAIN | {"data_page_size": 1 << 30}),
    "keys that share a value": (lambda: rows(20, name=["x" * (3 << 20)] * 20), {}),
    "keys that share a beginning": (
        lambda: rows(20, name=["x" * (3 << 20) + str(row) for row in range(20)]),
        _PLAIN | {"column_encoding": {"name": "DELTA_BYTE_ARRAY"}},
    ),
    "a key": (lambda: rows(1, name=["x" * (100 << 20)]), {}),
    "rows": (
        lambda: rows(800_000, image=pyarrow.nulls(800_000, pyarrow.binary())),
        _PLAIN | {"column_encoding": {"name": "DELTA_BINARY_PACKED"}},
    ),
}


@pytest.mark.parametrize(("columns", "options"), VAST.values(), ids=VAST)
def test_small_files_take_little_memory(
    tmp_path: Path, columns: Callable[[], dict[str, Any]], options: dict[str, Any]
) -> None:
    """Whatever their pages, dictionaries and rows unpack to, and whether they can be read or not."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns()), path, compression="zstd", write_statistics=False, **options)
    assert path.stat().st_size < 100_000
    with memory() as most, suppress(DatasetError, OSError):
        for each in load(path).samples:
            read(each)
    assert 0 < most[0] < 40 << 20


def test_a_page_that_states_another_size(tmp_path: Path) -> None:
    """Its image and those behind it fail; pyarrow would make room for 134 MB first."""
    images = [random.Random(row).randbytes(1 << 20) for row in range(3)]
    table = pyarrow.table({"name": [0, 1, 2], "image": images})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        table, path, use_dictionary=False, compression="none", write_batch_size=1, data_page_size=1
    )
    size = b"\x15\x94\x80\x80\x01"  # 1 MiB and 10 bytes, as Thrift writes it: unpacked, and then in the file
    before, *pages = path.read_bytes().split(size * 2)
    assert len(pages) == 3
    path.write_bytes(before + size * 2 + pages[0] + b"\x15\xfe\xff\xff\x7f" + size + (size * 2).join(pages[1:]))
    samples = load(path).samples
    with memory() as most:
        assert read(samples[0]) == images[0]
        for each in samples[1:]:
            with pytest.raises(OSError, match=r"damaged: a page of 1.0 MB unpacks to 134 MB.*smaller pages"):
                read(each)
    assert most[0] < 40 << 20


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["a", None], "row 1 has no name"),
        (["a", "a"], "rows 0 and 1 both"),
        (pyarrow.array([b"a", b"\xff"]).cast("string", safe=False), "name holds text that is not UTF-8"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, names: list[str | None] | pyarrow.Array, word: str) -> None:
    with pytest.raises(DatasetError, match=word):
        load(write(tmp_path / "a.parquet", name=names, image=[b"x", b"y"]))


def test_a_key_that_leads_elsewhere_fails_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", name=["../a.jpg", "b"], image=[b"x", b"y"])
    dataset = load(path)
    assert [sample.key for sample in dataset.samples] == ["b"]
    assert dataset.damaged == {f"{path}/../a.jpg": "its name is not a plain relative path"}


def test_files_that_are_damaged_missing_or_too_long(both: list[Path], tmp_path: Path) -> None:
    both[0].write_bytes(both[0].read_bytes()[:-100])
    dataset = load(*both, tmp_path / "c.parquet")
    assert len(dataset) == 4
    assert "no Parquet file" in dataset.damaged[str(both[0])]
    assert dataset.damaged[str(tmp_path / "c.parquet")] == "missing: there is no such file"
    with pytest.raises(DatasetError, match="does not exist"):
        load(tmp_path / "c.parquet")
    many = list(range(LARGEST + 1))
    image = pyarrow.nulls(len(many), pyarrow.binary())
    with pytest.raises(DatasetError, match=r"900,001 rows.*split"):
        load(write(tmp_path / "long.parquet", len(many), name=many, image=image))


def test_two_files_with_one_key(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, name=["x"], image=[b"1"]) for name in ("a.parquet", "b.parquet")]
    with pytest.raises(DatasetError, match="prefix"):
        load(*paths)
    assert [sample.key for sample in load(*paths, prefix=True).samples] == ["a/x", "b/x"]


def test_what_is_kept_while_rows_are_read_ahead_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for the last row first drops the rows before it; they are read again when asked for."""
    monkeypatch.setattr(tables, "_KEPT_BYTES", 4000)
    count, largest = 1000, [0]
    drop = tables._Window._drop

    def watched(window: tables._Window) -> None:
        drop(window)
        largest[0] = max(largest[0], sum(len(each or b"") for each in window._rows.values()))

    monkeypatch.setattr(tables._Window, "_drop", watched)
    names = [f"{number:04}.jpg" for number in range(count)]
    contents = [number.to_bytes(4, "big") * 100 for number in range(count)]
    dataset = load(write(tmp_path / "many.parquet", count, name=names, image=contents))
    for position in (count - 1, 0, 500):
        sample = dataset.samples[position]
        assert read(sample) == contents[position]
    assert 0 < largest[0] <= 4000
