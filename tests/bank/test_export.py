"""`convert --to`: each format holds the bank's numbers, as the packages that people use read it."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from torch import Tensor

from patchbank import open_bank, open_regions
from patchbank.bank import export as exporting
from patchbank.bank.convert import convert
from patchbank.bank.export import Exported, export, rows_at_once
from patchbank.bank.formats import FORMATS, Batch, Contents, webdataset_key
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.config import ExportFormat
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError, ConfigError
from patchbank.files import whole_directory, whole_file
from patchbank.locations import locate
from tests.ada_cm import extract_pairs
from tests.bank.test_check import damage_numbers
from tests.faults.processes import Calls, Run, run
from tests.support import contents, no_leftovers, pairs_root, patchbank, tiny_manifest

EVERY = get_args(ExportFormat)
Columns = dict[str, Any]


def read_hdf5(place: Path) -> Columns:
    with h5py.File(place) as file:
        found = {name: file[name][:] for name in file if name != "failures"}
        about = json.loads(file.attrs["patchbank"]) | {"failures": json.loads(file["failures"][()])}
        return found | {"keys": file["keys"].asstr()[:].tolist(), "about": about}


def read_parquet(place: Path) -> Columns:
    """As a whole directory, in which there is a document too."""
    table = pq.read_table(place)
    about = json.loads(table.schema.metadata[b"patchbank"])
    found = {name: table[name].to_pylist() for name in table.column_names}
    for name, shape in about["shapes"].items():
        found[name] = np.array(found[name], about["dtype"]).reshape(-1, *shape)
    sizes = np.array([(width or 0, height or 0) for width, height in zip(found["width"], found["height"], strict=True)])
    return found | {"keys": found["key"], "sizes": sizes, "about": about_beside(place)}


def read_webdataset(place: Path) -> Columns:
    urls = [str(each) for each in sorted(place.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    for each in samples:
        assert unquote(each["__key__"]) == each["json"]["key"]
    names = {name for each in samples for name in each if name.endswith(".npy")}
    found = {name.removesuffix(".npy"): np.stack([each[name] for each in samples]) for name in names}
    rows = [each["json"] for each in samples]
    sizes = np.array([row["size"] or (0, 0) for row in rows])
    return found | {"rows": rows, "keys": [row["key"] for row in rows], "sizes": sizes, "about": about_beside(place)}


def read_npy(place: Path) -> Columns:
    found: Columns = {path.stem: np.load(path, mmap_mode="r") for path in place.glob("*.npy")}
    return found | {"keys": json.loads((place / "keys.json").read_text()), "about": about_beside(place)}


READ = {"hdf5": read_hdf5, "parquet": read_parquet, "webdataset": read_webdataset, "npy": read_npy}


def about_beside(place: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((place / "_manifest.json").read_text())
    assert {*about["files"], "_manifest.json"} == {path.name for path in place.iterdir()}
    return about


def exported(source: Path, target: Path, to: str, dtype: str | None = None, **options: object) -> Exported:
    return export(open_bank(source), target, to, dtype, **{"shard_size": 10**6, **options})  # type: ignore[arg-type]


def written(path: Path, features: Mapping[str, Mapping[str, Tensor]], failures: Sequence[Failure] = ()) -> Path:
    """A bank of these features; of every second one, the image's size is not known."""
    first = next(iter(features.values()))
    made = tiny_manifest("shards")
    outputs = {name: replace(made.outputs["cls"], shape=tuple(each.shape)) for name, each in first.items()}
    with BankWriter(path, replace(made, outputs=outputs), [*features, *(each.key for each in failures)]) as writer:
        samples = enumerate(features.items())
        writer.add(
            [Feature(key, each, None if number % 2 else (64, 48)) for number, (key, each) in samples], list(failures)
        )
    return path


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
@pytest.mark.parametrize("to", EVERY)
def test_it_holds_what_the_bank_holds(banks: Path, tmp_path: Path, layout: str, to: str) -> None:
    done, bank = exported(banks / layout, tmp_path / "out", to), open_bank(banks / layout)
    assert (done.features, done.failures, done.left_out) == (7, 1, {})
    found = READ[to](tmp_path / "out")
    assert found["keys"] == [*bank]
    for name, output in bank.manifest.outputs.items():
        assert found[name].shape == (7, *output.shape) and found[name].dtype == np.float32
        assert np.array_equal(found[name], bank.batch(bank, name).numpy())
    assert found["sizes"].tolist() == [list(bank.size(key) or ()) for key in bank]
    about = found["about"]
    assert about["failures"] == bank.failures
    assert about["manifest"]["identity"] == bank.manifest.identity
    assert (about["grid"], about["cell"]) == ([4, 4], 8)
    assert about["shapes"] == {name: list(output.shape) for name, output in bank.manifest.outputs.items()}
    files = [path for path in (tmp_path / "out").rglob("*") if path.name != "_manifest.json"] or [tmp_path / "out"]
    assert done.files == len(files)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("to", EVERY)
def test_a_box_is_mapped_by_scale_and_offset(banks: Path, tmp_path: Path, to: str) -> None:
    exported(banks / "shards", tmp_path / "out", to)
    found, bank = READ[to](tmp_path / "out"), open_bank(banks / "shards")
    rows = found.get("rows", [{}] * 7)
    for number, key in enumerate(bank):
        scale, offset = (
            np.array(rows[number].get(name) or found[name if to == "parquet" else f"{name}s"][number])
            for name in ("scale", "offset")
        )
        box = np.array([10, 20, 30, 45])
        expected = bank.transform(key).boxes_to_input(box)
        assert np.allclose(box * np.tile(scale, 2) + np.tile(offset, 2), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("to", EVERY)
def test_the_same_bank_gives_the_same_bytes(banks: Path, tmp_path: Path, to: str) -> None:
    for name in ("one", "two"):
        exported(banks / "shards", tmp_path / name / "out", to)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_stored_dtypes(banks: Path, tmp_path: Path, to: str, dtype: str) -> None:
    """float16 stays; what the formats lack becomes float32; both are the bank's numbers."""
    convert(open_bank(banks / "shards"), tmp_path / "bank", "shards", dtype, shard_size=10**6)  # type: ignore[arg-type]
    exported(tmp_path / "bank", tmp_path / "out", to)
    exported(tmp_path / "bank", tmp_path / "wide", to, "float32", outputs=["cls"])
    bank, found, wide = open_bank(tmp_path / "bank"), READ[to](tmp_path / "out"), READ[to](tmp_path / "wide")
    wanted = "float16" if dtype == "float16" else "float32"
    for name in ("patch_tokens", "cls"):
        assert found[name].dtype == wanted
        assert np.array_equal(found[name], bank.batch(bank, name, dtype=getattr(torch, wanted)).numpy())
    assert wide["cls"].dtype == np.float32 and "patch_tokens" not in wide
    assert found["about"]["manifest"]["rounded"] == ([] if dtype == "float16" else [dtype])
    with pytest.raises(ConfigError, match=rf"dtype bfloat16: to {to} writes float32 or float16"):
        exported(tmp_path / "bank", tmp_path / "other", to, "bfloat16")


@pytest.mark.parametrize("to", EVERY)
def test_numbers_too_large_for_float16_are_left_out_and_listed(tmp_path: Path, to: str) -> None:
    features = {key: {"cls": torch.randn(8) * factor} for key, factor in (("a", 1.0), ("b", 1e6), ("c", 1.0))}
    written(tmp_path / "bank", features, [Failure("x", "no picture")])
    done = exported(tmp_path / "bank", tmp_path / "out", to, "float16")
    assert (done.features, done.left_out) == (2, {"b": "its features are too large for float16"})
    found = READ[to](tmp_path / "out")
    assert found["keys"] == ["a", "c"]
    assert np.array_equal(found["cls"], np.stack([features[key]["cls"].half().numpy() for key in "ac"]))
    assert found["about"]["failures"] == {"x": "no picture"} | done.left_out
    written(tmp_path / "large", {"b": features["b"]})
    with pytest.raises(
        BankError, match=r"has no feature to export \(its features are too large for float16\); nothing"
    ):
        exported(tmp_path / "large", tmp_path / "none", to, "float16")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("to", EVERY)
def test_damaged_features_are_left_out_and_listed(banks: Path, tmp_path: Path, to: str) -> None:
    source = shutil.copytree(banks / "shards", tmp_path / "bank")
    damage_numbers(open_bank(source).file("photo_0001.jpg"))  # of a row in the middle
    done = exported(source, tmp_path / "out", to, shard_size=1)  # a file of its own each
    [(damaged, reason)] = done.left_out.items()
    assert "patchbank repair" in reason and done.features == 6
    found = READ[to](tmp_path / "out")
    assert damaged not in found["keys"] and found["about"]["failures"][damaged].startswith("damaged: ")
    assert str(source) in reason and str(source) not in json.dumps(found["about"])
    if to in ("parquet", "webdataset"):
        names = sorted(path.stem for path in (tmp_path / "out").glob("0*"))
        assert names == [f"{number:06}" for number in range(6)]


HOSTILE = [
    *("a/b.c/d.e.jpg", "a/b.c/d%2Ee.jpg", "a.b.jpg", "a%2Eb.jpg", "a.jpg", "A.jpg", "a.png"),
    *("..a/..b.jpg", ".hidden", "__x__/y.jpg", "__key__", "a b'\".jpg", "a.jpg#union-0", "line\nbreak.jpg"),
    *("ünï/日本.png", "\u202egpj.a", "a\\b.jpg", "no_extension", f"{'long' * 60}/{'long' * 60}.jpg"),
]


@pytest.mark.parametrize("to", EVERY)
def test_hostile_keys(tmp_path: Path, to: str) -> None:
    features = {key: {"block:6": torch.randn(16, 2)} for key in HOSTILE}
    written(tmp_path / "bank", {**features, "\udc80.jpg": features[".hidden"]})
    done = exported(tmp_path / "bank", tmp_path / "place/out", to, shard_size=1000)
    assert done.left_out == {"\udc80.jpg": "its key is not UTF-8"}
    found = READ[to](tmp_path / "place/out")
    assert found["keys"] == sorted(HOSTILE)
    assert np.array_equal(found["block:6"], np.stack([features[key]["block:6"].numpy() for key in found["keys"]]))
    expected = {key: [0, 0] if number % 2 else [64, 48] for number, key in enumerate(HOSTILE)}
    assert found["sizes"].tolist() == [expected[key] for key in found["keys"]]
    assert found["about"]["failures"] == done.left_out
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


def test_keys_for_webdataset_are_unique_and_reversible() -> None:
    names = [webdataset_key(key) for key in [*HOSTILE, "\udc80.jpg"]]
    assert len({*names}) == len(names)
    assert [unquote(name) for name in names[:-1]] == HOSTILE
    assert not any("." in name or name.startswith("__") for name in names)
    assert webdataset_key("train2015/a.b.jpg") == "train2015/a%2Eb%2Ejpg"


@pytest.mark.parametrize("name", ["../cls", "a/b", ".cls", "keys", "sizes", "width"])
def test_outputs_whose_name_is_no_files(tmp_path: Path, name: str) -> None:
    written(tmp_path / "bank", {"a.jpg": {name: torch.randn(8)}})
    with pytest.raises(BankError, match="cannot name a file or a column"):
        exported(tmp_path / "bank", tmp_path / "out", "npy")


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_files_are_of_bounded_size(tmp_path: Path, to: str) -> None:
    written(tmp_path / "bank", {f"{number:03}.jpg": {"cls": torch.randn(1000)} for number in range(50)})
    done = exported(tmp_path / "bank", tmp_path / "out", to, shard_size=50_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("0*")]
    assert done.files == len(sizes) >= 5 and max(sizes) < 60_000
    assert len(READ[to](tmp_path / "out")["keys"]) == 50


def test_a_row_is_read_alone(banks: Path, tmp_path: Path) -> None:
    """Rows that are large have a chunk each in HDF5; in Parquet, a group is a batch."""
    written(tmp_path / "bank", {f"{n}.jpg": {"patch_tokens": torch.randn(16, 2000)} for n in range(5)})
    exported(tmp_path / "bank", tmp_path / "out.h5", "hdf5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["patch_tokens"].chunks == (1, 16, 2000)
        assert file["sizes"].chunks[0] > 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_BATCH", 2 * 130_000)
        exported(tmp_path / "bank", tmp_path / "out", "parquet")
    groups = pq.ParquetFile(tmp_path / "out/000000.parquet").metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [2, 2, 1]


def test_memory_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch, whose arrays are all that is read at once, is within the bound, whatever the sizes of bank and files."""
    written(tmp_path / "bank", {f"{n:02}": {"cls": torch.randn(100), "x": torch.randn(16, 50)} for n in range(40)})
    seen: list[int] = []

    def writer(place: Path, _: Contents, batches: Any) -> None:
        for batch in batches:
            assert isinstance(batch, Batch)
            seen.append(sum(each.nbytes for each in batch.outputs.values()))
        (place / "nothing").touch()

    monkeypatch.setattr(exporting, "_BATCH", 30_000)
    monkeypatch.setitem(exporting.FORMATS, "npy", FORMATS["npy"]._replace(write=writer))
    exported(tmp_path / "bank", tmp_path / "out", "npy", shard_size=10**9)
    assert sum(seen) == 40 * 3600 and max(seen) <= 30_000 and len(seen) < 20
    assert rows_at_once(10**9) == 1


@pytest.mark.parametrize("to", EVERY)
def test_regions(banks: Path, tmp_path: Path, tiny_weights: Path, to: str) -> None:
    """In the dataset's order, with their boxes and classes; those of a grid have its transform too."""
    extract_pairs(pairs_root(tmp_path / "root"), tmp_path / "bank", tiny_weights, "--output", "cls", check=1)
    exported(tmp_path / "bank", tmp_path / "out", to)
    bank, found = open_bank(tmp_path / "bank"), READ[to](tmp_path / "out")
    assert found["keys"] == [*bank.in_order()] != sorted(found["keys"])
    rows = found.get("rows") or [
        {name: found[plural if plural in found else name][number] for name, plural in PLURALS.items()}
        for number in range(len(found["keys"]))
    ]
    regions, checked = open_regions(bank), 0
    for image in regions:
        one = regions[image]
        for name, box, label, verb, hoi in zip(one.names, one.boxes, one.labels, one.verbs, one.hois, strict=True):
            row = rows[found["keys"].index(f"{image}#{name}")]
            assert np.array_equal(np.array(row["box"], np.float32), box.numpy())
            classes = [-1 if row[each] is None else int(row[each]) for each in ("label", "verb", "hoi")]
            assert classes == [int(label), int(verb), int(hoi)]
            checked += 1
    assert checked == len(bank) == len(found["keys"])
    assert "scales" not in found and "scale" not in rows[0]


PLURALS = {"box": "boxes", "label": "labels", "verb": "verbs", "hoi": "hois"}


def test_a_bank_in_an_object_store(banks: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    convert(open_bank(banks / "shards"), locate(url), "shards", shard_size=3 * 2176)
    export(open_bank(url), tmp_path / "remote", "npy", shard_size=1)
    exported(banks / "shards", tmp_path / "local", "npy")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    with pytest.raises(BankError, match="exports are written to a local path"):
        export(open_bank(banks / "shards"), locate(url), "npy", shard_size=1)


@pytest.mark.parametrize("to", EVERY)
def test_only_an_export_is_replaced_and_only_if_asked(banks: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    exported(banks / "shards", out, to, shard_size=1)
    before = contents(tmp_path)
    with pytest.raises(BankError, match=r"exists\. overwrite replaces it; else choose another\."):
        exported(banks / "shards", out, to)
    assert contents(tmp_path) == before
    exported(banks / "shards", out, to, outputs=["cls"], overwrite=True)
    found = READ[to](out)
    assert "cls" in found and "patch_tokens" not in found
    assert not list(tmp_path.glob(".*"))
    foreign = out if FORMATS[to].single else out / "notes.txt"
    foreign.write_text("mine")
    with pytest.raises(BankError, match=f"{foreign.name} is not of an export, so that overwrite does not replace"):
        exported(banks / "shards", out, to, overwrite=True)
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("to", EVERY)
def test_places_that_are_refused(banks: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BankError, match="is the source itself, or in it"):
        exported(banks / "shards", banks / "shards/out", to)
    wrong = tmp_path / "wrong"
    wrong.mkdir() if FORMATS[to].single else wrong.write_text("mine")
    with pytest.raises(BankError, match="a directory; name a file" if FORMATS[to].single else "a file; name a dir"):
        exported(banks / "shards", wrong, to, overwrite=True)
    other = shutil.copytree(banks / "shards", tmp_path / "other")
    with pytest.raises(BankError, match="a directory; name a file" if FORMATS[to].single else "is not of an export"):
        exported(banks / "shards", other, to, overwrite=True)
    assert contents(other) == contents(banks / "shards")
    monkeypatch.setattr("patchbank.bank.writer.free_bytes", lambda _: 10_000)
    with pytest.raises(BankError, match="Not enough disk"):
        exported(banks / "shards", tmp_path / "full", to)
    assert not (tmp_path / "full").exists()


def test_an_empty_directory_is_taken(banks: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exported(banks / "shards", tmp_path / "out", "npy")
    assert len(read_npy(tmp_path / "out")["keys"]) == 7


@pytest.mark.parametrize(("to", "package"), [("hdf5", "h5py"), ("parquet", "pyarrow")])
def test_a_missing_package(banks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'to {to} needs {package}: pip install "patchbank\[{to}\]"'):
        exported(banks / "shards", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", EVERY)
def test_a_killed_export_leaves_nothing_of_the_name(
    banks: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, printed = tmp_path / "made/out", tmp_path / "printed"
    words = ("convert", banks / "shards", out, "--to", to, "--shard-size", 5000)
    paused = Calls(2, exporting.__name__, "_read")
    process = Run(printed, *words, pause_after=paused).paused()
    assert [path.name[0] for path in out.parent.iterdir()] == ["."], "it writes under a temporary name"
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    text = run(printed, *words, check=0)
    assert "7 samples written" in text and "1 failure listed" in text
    whole = contents(out.parent)
    assert no_leftovers(out.parent) and len(READ[to](out)["keys"]) == 7
    process = Run(printed, *words, "--overwrite", pause_after=paused).paused()
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    assert process.wait() == 130
    assert "nothing was written" in process.printed
    assert contents(out.parent) == whole and no_leftovers(out.parent)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("to", EVERY)
def test_what_appears_during_an_export_stays(banks: Path, tmp_path: Path, to: str, overwrite: bool) -> None:
    mine = tmp_path / "out" if FORMATS[to].single else tmp_path / "out/notes.txt"

    def appear(*_: int) -> None:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")

    with pytest.raises(BankError, match="is not of an export" if overwrite else r"out exists\."):
        exported(banks / "shards", tmp_path / "out", to, overwrite=overwrite, progress=appear)
    assert mine.read_text() == "mine" and [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_only_an_empty_directory_is_replaced_unasked(tmp_path: Path) -> None:
    target, file = tmp_path / "out", tmp_path / "out.h5"
    target.mkdir()
    with whole_directory(target, replace=False) as place:
        (place / "mine").touch()
    with pytest.raises(OSError, match="not empty"), whole_directory(target, replace=False):
        pass
    with pytest.raises(FileExistsError), whole_file(file, replace=False) as place:
        place.write_text("new")
        file.write_text("mine")
    assert file.read_text() == "mine" and {*tmp_path.rglob("*")} == {target, target / "mine", file}


def test_interrupted_between_the_two_renames(banks: Path, tmp_path: Path) -> None:
    out, printed = tmp_path / "made/out", tmp_path / "printed"
    exported(banks / "shards", out, "npy", outputs=["cls"])
    before = contents(out)
    words = ("convert", banks / "shards", out, "--to", "npy", "--overwrite")
    process = Run(printed, *words, pause_after=Calls(1, Path, "rename")).paused()
    assert not out.exists()
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    assert process.wait() == 130
    assert contents(out) == before and no_leftovers(out.parent)


@pytest.mark.parametrize("to", EVERY)
def test_a_full_disk(banks: Path, tmp_path: Path, to: str) -> None:
    text = run(
        *(tmp_path / "printed", "convert", banks / "shards", tmp_path / "made/out", "--to", to),
        check=2,
        limits={resource.RLIMIT_FSIZE: 9000},
    )
    assert re.search(r"out cannot be written: .*File too large. Nothing was written.$", " ".join(text.split()))
    assert list((tmp_path / "made").iterdir()) == []


def test_on_the_command_line(banks: Path, tmp_path: Path) -> None:
    done = patchbank("convert", banks / "shards", tmp_path / "bank.h5", "--to", "hdf5", "--output", "cls", check=0)
    assert "7 samples written" in done.stdout and "cls (32,) in float32, 1 file, 1 failure listed" in done.stdout
    done = patchbank("convert", banks / "shards", tmp_path / "npy", "--to", "npy", "--dtype", "fp16", "--json", check=0)
    found = json.loads(done.stdout)
    assert (found["place"], found["to"], found["dtype"]) == (str(tmp_path / "npy"), "npy", "float16")
    assert (found["features"], found["failures"], found["files"]) == (7, 1, len([*(tmp_path / "npy").glob("[!_]*")]))
    for option in (("--layout", "shards"), ("--layout", "ada-cm"), ("--pca", "4")):
        done = patchbank("convert", banks / "shards", tmp_path / "x", "--to", "npy", *option, check=2)
        assert f"{option[0]} makes a bank, and --to files for other programs" in " ".join(done.stderr.split())
    done = patchbank("convert", banks / "shards", tmp_path / "x", "--to", "csv", check=2)
    assert "--to must be one of hdf5, parquet, webdataset, npy, not 'csv'" in " ".join(done.stderr.split())
    source = shutil.copytree(banks / "shards", tmp_path / "bank")
    damage_numbers(open_bank(source).file("photo_0006.jpg"))
    done = patchbank("convert", source, tmp_path / "out", "--to", "npy", check=1)
    assert "left out: photo_000" in done.stdout
