"""The reader of one file reads what `open_bank` reads, to the bit, with nothing but torch.

`PATCHBANK_OLD_PYTHON` may name an interpreter of Python 3.8 with torch 1.9. Without it, this one takes its place.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchbank import open_bank
from patchbank.bank import patchbank_reader
from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import memory
from patchbank.bank.parts import name_part, payload_of
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.datasets.samples import Failure
from tests.bank.test_index import entries
from tests.support import parts_in, patchbank, tiny_manifest
from tests.third_party import Call

FILE = Path(patchbank_reader.__file__)
KEYS = [f"{'ümlaut/' * (number % 2)}photo_{number}.a.jpg" for number in range(10)]
BANKS = {
    f"{layout}-{dtype}": replace(tiny_manifest(layout, dtype), part_size=4)
    for layout, dtypes in {"ezhoi": (), "shards": ("int8",)}.items()
    for dtype in ("float32", "float16", "bfloat16", *dtypes)
}
PROGRAM = """
import ctypes, hashlib, json, os, pickle, sys
sys.modules.update(patchbank=None, safetensors=None)
import torch
from torch.utils.data import DataLoader
from patchbank_reader import open_bank

def facts(tensor):
    numbers = ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(numbers).hexdigest()]

def read(bank):
    return {
        "outputs": {key: {name: facts(bank.output(key, name)) for name in bank.manifest["outputs"]} for key in bank},
        "grids": {key: facts(bank.grid(key)) for key in bank},
        "sizes": {key: bank.size(key) for key in bank},
        "failures": bank.failures,
    }

if __name__ == "__main__":
    found = {name: read(open_bank(os.path.join("banks", name))) for name in os.listdir("banks")}
    bank = open_bank("banks/shards-float16")
    for method in ("fork", "spawn"):
        loader = DataLoader(bank, 4, sampler=list(bank), num_workers=2, multiprocessing_context=method)
        found[method] = facts(torch.cat(list(loader)))
    json.dump(found, sys.stdout)
"""


def feature(key: str, factor: float = 1) -> Feature:
    every = torch.randn(17, 32, generator=torch.Generator().manual_seed(KEYS.index(key))) * factor
    size = None if key == KEYS[3] else (640, 480 + KEYS.index(key))
    return Feature(key, {"patch_tokens": every[1:], "cls": every[0]}, size)


def write(bank: Path, manifest: Manifest, features: Iterable[Feature], failed: Iterable[str] = ()) -> None:
    with BankWriter(bank, manifest, KEYS) as writer:
        writer.add(list(features), [Failure(key, "missing") for key in failed])


def write_joined(bank: Path, manifest: Manifest) -> None:
    """Parts list some keys twice, as after a kill before a part that was merged is deleted."""
    write(bank, manifest, map(feature, KEYS[:2]), KEYS[2:4])
    [early] = parts_in(bank)
    kept = early.read_bytes()
    write(bank, manifest, [feature(KEYS[1], 2), *map(feature, [KEYS[0], *KEYS[2:9]])], KEYS[9:])
    assert not early.exists()
    early.write_bytes(kept)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the printed file, and banks in ``banks``."""
    place = tmp_path_factory.mktemp("reader")
    (place / "patchbank_reader.py").write_text(patchbank("reader", check=0).stdout)
    for name, manifest in BANKS.items():
        write_joined(place / "banks" / name, manifest)
    return place


@pytest.fixture(scope="module")
def found(place: Path) -> Any:
    """What a process reads that can import neither patchbank nor safetensors."""
    (place / "program.py").write_text(PROGRAM)
    python = os.environ.get("PATCHBANK_OLD_PYTHON", sys.executable)
    done = subprocess.run([python, "program.py"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def facts(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype), [*tensor.shape], hashlib.sha256(memory(tensor.contiguous())).hexdigest()]


@pytest.mark.parametrize("name", BANKS)
def test_it_reads_what_open_bank_reads(name: str, place: Path, found: Any) -> None:
    bank = open_bank(place / "banks" / name)
    assert len(parts_in(bank.path)) == 4
    assert found[name] == {
        "outputs": {key: {each: facts(bank.output(key, each)) for each in bank.manifest.outputs} for key in bank},
        "grids": {key: facts(bank.grid(key)) for key in bank},
        "sizes": {key: size and [*size] for key in bank for size in [bank.size(key)]},
        "failures": bank.failures,
    }
    assert [*found[name]["outputs"]] == sorted(KEYS[:9]) and bank.failures == {KEYS[9]: "missing"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read_it(method: str, place: Path, found: Any) -> None:
    bank = open_bank(place / "banks/shards-float16")
    assert found[method] == facts(torch.stack([*bank.values()]))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(entries, max_size=5), min_size=1, max_size=4))
def test_of_a_keys_entries_the_same_counts(tmp_path_factory: pytest.TempPathFactory, parts: list[list[Entry]]) -> None:
    bank = tmp_path_factory.mktemp("bank")
    (bank / "index").mkdir()
    for number, listed in enumerate(parts):
        features = tuple(each for each in listed if each.failure is None)
        failures = tuple(each for each in listed if each.failure is not None)
        part = Part(Path(), BANKS["ezhoi-float32"], number, features, failures, 0, 0)
        start, name = name_part(payload_of(bank, "ezhoi"), part)
        (bank / "index" / name).write_bytes(start)
    opened, bare = open_bank(bank), patchbank_reader.open_bank(bank)
    assert [*bare] == [*opened] and bare.failures == opened.failures
    for key in opened:
        assert bare._entries[key].rank[:3] == (opened._entry(key).revision, True, opened.sha256(key))


def test_it_goes_on_when_a_run_replaces_a_part(tmp_path: Path) -> None:
    write(tmp_path, BANKS["shards-float32"], map(feature, KEYS[:2]))
    bank = patchbank_reader.open_bank(tmp_path)
    write(tmp_path, BANKS["shards-float32"], map(feature, KEYS[2:4]))
    assert torch.equal(bank[KEYS[1]], feature(KEYS[1]).outputs["patch_tokens"])
    assert [*bank] == sorted(KEYS[:2])
    for path in parts_in(tmp_path):
        path.unlink()
    with pytest.raises(patchbank_reader.BankError, match="There is no bank"):
        bank[KEYS[0]]
    write(tmp_path, BANKS["shards-float16"], map(feature, KEYS[:4]))
    with pytest.raises(patchbank_reader.BankError, match=r"was replaced: open it again\. They differ in outputs"):
        bank[KEYS[0]]


def test_what_is_not_there(place: Path, tmp_path: Path) -> None:
    bank = patchbank_reader.open_bank(place / "banks/ezhoi-float32")
    with pytest.raises(KeyError, match=r"photo_9\.a\.jpg' could not be extracted: missing\."):
        bank[KEYS[9]]
    with pytest.raises(patchbank_reader.KeyNotInBank, match=r"no 'photo'\. Its keys look like 'photo_0\.a\.jpg'"):
        bank.size("photo")
    assert bank.get("photo") is None and KEYS[9] not in bank
    with pytest.raises(patchbank_reader.BankError, match=r"does not store 'cls'\. It stores patch_tokens\."):
        bank.output(KEYS[0], "cls")
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(patchbank_reader.BankError, match="There is no bank"):
            patchbank_reader.open_bank(missing)
    write(tmp_path, BANKS["shards-float32"], [feature(KEYS[0])])
    write_part(tmp_path, json.loads(parts_in(bank.path)[0].read_bytes()))
    with pytest.raises(patchbank_reader.BankError, match=r"parts of two banks\. They differ in layout"):
        patchbank_reader.open_bank(tmp_path)


def write_part(bank: Path, document: Any, tensors: Any = None) -> None:
    """A part of any content, with the name that fits it."""
    header = {"__metadata__": {"patchbank": json.dumps(document)}, **(tensors or {})}
    text = json.dumps(header if tensors else document).encode()
    name = f"-00000-{hashlib.sha256(text).hexdigest()[:16]}."
    if not tensors:
        (bank / "index").mkdir(exist_ok=True)
    path = bank / (f"shard{name}safetensors" if tensors else f"index/index{name}json")
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(10_000) if tensors else text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda document, _: document.update(version=3),
            r"version 3 of the format; this reader knows 2.*`patchbank reader`",
        ),
        (lambda document, _: document.update(format="other"), "its format or layout is another"),
        (lambda document, _: document["samples"]["keys"].append("another"), "differ in length"),
        (lambda document, _: document["samples"]["keys"].__setitem__(0, "../a.jpg"), "lead out of the bank"),
        (lambda document, _: document["samples"].update(sha256=None), "damaged: TypeError"),
        (
            lambda document, _: document["manifest"]["outputs"]["cls"].update(shape=[1 << 40]),
            r"cls is \(1099511627776,\)",
        ),
        (lambda document, _: document["manifest"]["outputs"]["cls"].update(shape=[-32]), "cls has the shape"),
        (lambda document, _: document["manifest"]["outputs"]["cls"].update(dtype="int64"), r"cls is \(32,\) int64"),
        (lambda document, _: document["manifest"].pop("outputs"), "damaged: KeyError"),
        (lambda _, tensors: tensors["cls"].update(data_offsets=[1 << 40, (1 << 40) + 256]), "cls is not what"),
        (lambda _, tensors: tensors["cls"].update(data_offsets=[-8, 248]), "cls is not what"),
        (lambda _, tensors: tensors["cls"].update(data_offsets=[9_800, 10_056]), "cls is not what"),
        (lambda _, tensors: tensors["cls"].update(shape=[9, 32]), "cls is not what"),
        (lambda _, tensors: tensors.pop("cls"), "damaged: KeyError"),
    ],
)
def test_no_header_is_believed(change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, BANKS["shards-float32"], map(feature, KEYS[:2]))
    [path] = parts_in(tmp_path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    tensors = json.loads(path.read_bytes()[8 : 8 + length])
    path.unlink()
    document = json.loads(tensors.pop("__metadata__")["patchbank"])
    write_part(tmp_path, document, tensors)
    assert patchbank_reader.open_bank(tmp_path).output(KEYS[0], "cls").shape == (32,)
    parts_in(tmp_path)[0].unlink()
    change(document, tensors)
    write_part(tmp_path, document, tensors)
    with pytest.raises(patchbank_reader.BankError, match=message):
        patchbank_reader.open_bank(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"{}"]
)
def test_a_damaged_part_is_an_error(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, BANKS["shards-float32"], map(feature, KEYS[:2]))
    parts_in(tmp_path)[0].write_bytes(content)
    with pytest.raises(patchbank_reader.BankError, match=r"damaged: .*does not match its name.*`patchbank repair`"):
        patchbank_reader.open_bank(tmp_path)


def test_a_shard_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, BANKS["shards-float32"], map(feature, KEYS[:2]))
    bank = patchbank_reader.open_bank(tmp_path)
    os.truncate(parts_in(tmp_path)[0], 3000)
    with pytest.raises(patchbank_reader.BankError, match=r"safetensors is cut short"):
        bank[KEYS[1]]


@pytest.fixture
def one(tmp_path: Path) -> tuple[patchbank_reader.Bank, Path]:
    """A bank of one pickle, and its path."""
    write(tmp_path, BANKS["ezhoi-float32"], [feature(KEYS[0])])
    return patchbank_reader.open_bank(tmp_path), tmp_path / "photo_0_clip.pkl"


def test_a_pickle_that_other_code_wrote(one: tuple[patchbank_reader.Bank, Path]) -> None:
    bank, path = one
    path.write_bytes(pickle.dumps(torch.ones(16, 32)))
    assert torch.equal(bank[KEYS[0]], torch.ones(16, 32))
    bank[KEYS[0]].zero_()
    assert bank[KEYS[0]].sum() == 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps(Call(os.mkdir, "made")),
            r"it names posix\.mkdir, which no tensor's pickle does; nothing was run",
        ),
        (pickle.dumps(Call(torch.load, "made")), r"it names torch\.serialization\.load"),
        (pickle.dumps(torch.ones(32, 16)), "another tensor"),
        (pickle.dumps(torch.ones(16, 32).half()), "another tensor"),
        (pickle.dumps(torch.ones(32, 32)[:16]), "is no feature of this bank"),
        (pickle.dumps(torch.ones(32, 16).T), "another tensor"),
        (pickle.dumps(torch.ones(16, 32))[:1500], "is no feature of this bank"),
        (pickle.dumps(Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, "made")))), "nothing was run"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x08__code__K\x01s\x86b.", "AttributeError"),
        (pickle.dumps(("FloatStorage", "x" * 2048, 0, (16, 32), (32, 1))), "TypeError"),
        (pickle.dumps(("FloatStorage", bytes(2048), 1, (16, 32), (32, 1))), "another tensor"),
        (pickle.dumps(("FloatStorage", bytes(2048), 0, (16, 32), (0, 0))), "another tensor"),
        (pickle.dumps(("FloatStorage", bytes(2044), 0, (16, 32), (32, 1))), "another tensor"),
        (b"", "EOFError"),
    ],
)
def test_no_pickle_is_believed_or_run(
    content: bytes, message: str, one: tuple[patchbank_reader.Bank, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, path = one
    monkeypatch.chdir(path.parent)
    path.write_bytes(content)
    with pytest.raises(patchbank_reader.BankError, match=message):
        bank[KEYS[0]]
    assert not Path("made").exists()


def test_a_pickle_takes_no_more_memory_than_it_has_bytes(one: tuple[patchbank_reader.Bank, Path]) -> None:
    """Python's faster unpickler makes a list as long as the greatest number that a pickle gives an object."""
    bank, path = one
    path.write_bytes(b"\x80\x02N" + b"r" + struct.pack("<I", 1 << 28) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(patchbank_reader.BankError, match="no feature of this bank"):
        bank[next(iter(bank))]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(patchbank_reader.BankError, match="no regular file"):
        bank[next(iter(bank))]


def test_a_pickle_that_is_gone(one: tuple[patchbank_reader.Bank, Path]) -> None:
    bank, path = one
    path.unlink()
    with pytest.raises(patchbank_reader.BankError, match=r"photo_0_clip\.pkl cannot be read: No such file"):
        bank[KEYS[0]]


def test_it_is_python_38_and_names_only_what_torch_19_has() -> None:
    """Where no old interpreter runs it. `torch.frombuffer`, for one, came with 1.10."""
    nodes = [*ast.walk(ast.parse(FILE.read_text(), feature_version=(3, 8)))]
    modules = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    names = {(node.module, each.name) for node in nodes if isinstance(node, ast.ImportFrom) for each in node.names}
    assert modules | {str(module).partition(".")[0] for module, _ in names} <= {*sys.stdlib_module_names, "torch"}
    of_torch = {name for module, name in names if module == "torch"}
    of_torch |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch"}
    assert of_torch == {"Tensor", "bfloat16", "empty", "float16", "float32", "int8"}


def test_the_command_prints_the_file_without_torch(place: Path) -> None:
    assert (place / "patchbank_reader.py").read_bytes() == FILE.read_bytes()
    program = (
        "import sys; from patchbank.cli import main; sys.argv[1:] = ['reader']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == FILE.read_bytes()
