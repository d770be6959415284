"""The layout shards: their content, that other programs read it, and that no shard is lost or wrongly trusted."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbank import ExtractConfig, ImageTransform, extract, load_dataset, open_bank
from patchbank.bank import patchbank_reader, storage
from patchbank.bank import writer as writing
from patchbank.bank.index import Entry, Part
from patchbank.bank.manifest import Manifest
from patchbank.bank.parts import PartDamagedError, name_part, payload_of, read_parts
from patchbank.bank.payload import Feature
from patchbank.bank.removal import remove_bank
from patchbank.bank.shard import Shards
from patchbank.bank.writer import BankWriter, revoke
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from tests.support import REPOSITORY, contents, no_leftovers, parts_in, photographs, read_part, tiny_manifest

KEYS = [f"photo_{number}.jpg" for number in range(10)]
MANIFEST = replace(tiny_manifest("shards"), part_size=4)


def feature(key: str) -> Feature:
    generator = torch.Generator().manual_seed(KEYS.index(key))
    every = torch.randn(17, 32, generator=generator)
    return Feature(key, {"patch_tokens": every[1:], "cls": every[0]}, (640, 480))


def tokens(key: str) -> torch.Tensor:
    return feature(key).outputs["patch_tokens"]


def cls(key: str) -> torch.Tensor:
    return feature(key).outputs["cls"]


def write(directory: Path, keys: Iterable[str], failed: Iterable[str] = (), manifest: Any = MANIFEST) -> None:
    with BankWriter(directory, manifest, KEYS) as bank:
        bank.add([feature(key) for key in keys], [Failure(key, "missing") for key in failed])


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    write(tmp_path / "bank", [key for key in KEYS if key != KEYS[5]], [KEYS[5]])
    return tmp_path / "bank"


def rewrite(path: Path, change: Any) -> Path:
    """Change a shard's header, and rename the file to match it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = change(content[8 : 8 + length])
    number = path.name.split("-")[1]
    new = path.with_name(f"shard-{number}-{hashlib.sha256(text).hexdigest()[:16]}.safetensors")
    path.unlink()
    new.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return new


def tokens_of(content: Any) -> Any:
    return content["manifest"]["outputs"]["patch_tokens"]


def in_metadata(change: Any) -> Any:
    """A function that changes the JSON in a header's metadata."""

    def changed(text: bytes) -> bytes:
        header = json.loads(text)
        content = json.loads(header["__metadata__"]["patchbank"])
        change(content)
        header["__metadata__"]["patchbank"] = json.dumps(content)
        return json.dumps(header).encode()

    return changed


def test_images_lie_in_their_order_a_shard_for_every_so_many(bank: Path) -> None:
    shards = [read_part(path) for path in parts_in(bank)]
    assert [shard.number for shard in shards] == [0, 1, 2]
    assert [[entry.key for entry in shard.features] for shard in shards] == [
        KEYS[0:4],
        [KEYS[4], KEYS[6], KEYS[7]],
        KEYS[8:],
    ]
    assert [entry.key for entry in shards[1].failures] == [KEYS[5]]
    assert sorted(contents(bank)) == [shard.path.name for shard in shards]  # and nothing else


def test_reading_back(bank: Path) -> None:
    opened = open_bank(bank)
    assert list(opened) == [key for key in KEYS if key != KEYS[5]]
    assert opened.failures == {KEYS[5]: "missing"}
    for key in opened:
        assert torch.equal(opened[key], tokens(key))
        assert torch.equal(opened.cls(key), cls(key))
        assert opened.transform(key) == ImageTransform(640, 480, "center-crop", (32, 32), 8)
        opened.check(key)
    assert opened.bytes_on_disk() == sum(path.stat().st_size for path in bank.glob("shard-*"))
    with pytest.raises(KeyError, match="could not be extracted: missing"):
        opened.cls(KEYS[5])


def test_what_is_read_is_the_readers_own(bank: Path) -> None:
    """EZ-HOI's reader divides tokens in place; the mapped file must not change."""
    opened = open_bank(bank)
    opened[KEYS[0]].div_(2)
    opened.cls(KEYS[0]).div_(2)
    assert torch.equal(opened[KEYS[0]], tokens(KEYS[0]))
    assert torch.equal(opened.cls(KEYS[0]), cls(KEYS[0]))
    assert opened[KEYS[0]].untyped_storage().nbytes() == 16 * 32 * 4


def test_threads_and_processes_share_a_bank(bank: Path) -> None:
    opened = open_bank(bank)
    keys = list(opened) * 20
    with ThreadPoolExecutor(8) as threads:
        for key, found in zip(keys, threads.map(opened.__getitem__, keys), strict=True):
            assert torch.equal(found, tokens(key))
    for method in ("fork", "spawn"):  # a forked worker has its parent's mappings; a spawned one maps again
        with multiprocessing.get_context(method).Pool(2) as pool:
            for key, found in zip(keys[:9], pool.map(opened.get, keys[:9]), strict=True):
                assert torch.equal(found, tokens(key))
    copy = pickle.loads(pickle.dumps(opened))
    assert torch.equal(copy[KEYS[8]], tokens(KEYS[8]))
    assert len(pickle.dumps(opened)) < 8000  # no mapped numbers in it


def test_any_reader_of_safetensors_can_read_it(bank: Path) -> None:
    for path in parts_in(bank):
        tensors = safetensors.torch.load_file(path)
        for row, entry in enumerate(read_part(path).features):
            assert torch.equal(tensors["patch_tokens"][row], tokens(entry.key))
            assert torch.equal(tensors["cls"][row], cls(entry.key))


def small(dtype: str, dim: int) -> Manifest:
    """A manifest of two patches that depends on no library's version."""
    made = tiny_manifest("shards", dtype)
    shapes = {"cls": (dim,), "patch_tokens": (2, dim)}
    outputs = {name: replace(each, shape=shapes[name]) for name, each in made.outputs.items()}
    wide = replace(made.input, size=(8, 16))
    return replace(made, outputs=outputs, input=wide, versions={"patchbank": "0.2.0"})


def test_golden_bytes() -> None:
    """The format, byte for byte: a change here changes the format, and its version."""
    entries = (Entry("a.jpg", (640, 480), "ab" * 32), Entry("b/ü.png", None, "cd" * 32, revision=1))
    failures = (Entry("c.jpg", failure='a "reason"'),)
    part = Part(Path(), replace(small("float32", 2), part_size=4), 3, entries, failures, 0, 0)
    header, name = name_part(payload_of(Path(), "shards"), part)
    assert hashlib.sha256(header).hexdigest() == "45ee8c2e0c158bd8d41d8d3bd742ad601e6a31e9f022346568925a652efc4e3b"
    assert name == "shard-00003-ea6faf23ebe32279.safetensors"
    assert len(header) % 8 == 0
    text = json.loads(header[8:])
    assert list(text) == ["__metadata__", "cls", "patch_tokens"]
    assert text["cls"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert text["patch_tokens"] == {"dtype": "F32", "shape": [2, 2, 2], "data_offsets": [16, 48]}
    document = json.loads(text["__metadata__"]["patchbank"])
    beside, name = name_part(
        payload_of(Path(), "ezhoi"), replace(part, manifest=replace(part.manifest, layout="ezhoi"))
    )
    document["manifest"]["layout"] = "ezhoi"
    assert json.loads(beside) == document  # the same document, beside the pickles
    assert name == f"index-00003-{hashlib.sha256(beside).hexdigest()[:16]}.json"


@pytest.mark.parametrize(
    ("dtype", "name", "sha256"),
    [
        ("float32", "0cde4a675c3f9a74", "86c54bf98d14a18af6219ddb7777f91a080994d8180d28a6ed7a7ff45838ab61"),
        ("float16", "7215a417678a9bcb", "dfda489c2ae37fdf317a27b01de2c7d23604a1b8761767303a066864bada244d"),
        ("bfloat16", "8356dc38365d98c9", "4becf73dcf7738cf31e00fc49d5251c7827d273fe539c72c7fa1944635825409"),
        ("int8", "34e5d49c3f441f4e", "0f363b58e89ed577ebb599374a228e9285034d292c4bd0f3aada0172138b7146"),
    ],
)
def test_golden_files(tmp_path: Path, dtype: str, name: str, sha256: str) -> None:
    """A whole shard of each dtype, as docs/reference/bank-format.md describes it."""
    every = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.1, -3.0], [0.0, 0.0, 0.0]])
    with BankWriter(tmp_path, small(dtype, 3), ["a.jpg", "b.jpg", "c.jpg"]) as bank:
        bank.add(
            [
                Feature("a.jpg", {"patch_tokens": every[1:], "cls": every[0]}, (640, 480)),
                Feature("c.jpg", {"patch_tokens": -every[1:], "cls": every[0]}, (3, 500)),
            ],
            [Failure("b.jpg", "the file is empty")],
        )
    [path] = tmp_path.iterdir()
    assert path.name == f"shard-00000-{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    program = "import sys; from tests.bank.test_shards import *; write(Path(sys.argv[1]), KEYS[:7], KEYS[7:])"
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True, cwd=REPOSITORY)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- damaged shards, and shards of other versions


@pytest.mark.parametrize("read", [open_bank, patchbank_reader.open_bank])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_shard_is_never_trusted(
    bank: Path, tmp_path_factory: pytest.TempPathFactory, read: Any, data: Any
) -> None:
    """Bytes of the header are changed, removed or inserted; with and without a name that matches the damage."""
    copy = shutil.copytree(bank, tmp_path_factory.mktemp("damaged") / "bank")
    path = data.draw(st.sampled_from(parts_in(copy)))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    position = data.draw(st.integers(0, 7 + length))
    inserted = data.draw(st.binary(max_size=8))
    damaged = content[:position] + inserted + content[position + data.draw(st.integers(0, 8)) :]
    path.write_bytes(damaged)
    if data.draw(st.booleans()) and position >= 8:
        (length,) = struct.unpack("<Q", damaged[:8])
        new = hashlib.sha256(damaged[8 : 8 + length]).hexdigest()[:16]
        path = path.rename(path.with_name(f"{path.name[:12]}{new}.safetensors"))
    try:
        opened = read(copy)
    except (BankError, patchbank_reader.BankError) as error:
        assert str(copy) in str(error)
        return
    for key in opened:  # nothing was damaged, or nothing that this reader needs
        assert opened[key].shape == (16, 32)
        assert opened.output(key, "cls").shape == (32,)


@pytest.mark.parametrize("kept", [0, 100, 3000, -1])
def test_a_truncated_shard_is_reported_as_damaged(bank: Path, kept: int) -> None:
    path = parts_in(bank)[1]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PartDamagedError):
        read_part(path)
    with pytest.raises(BankError, match=r"damaged.*patchbank repair"):
        open_bank(bank)


def test_a_shard_with_trailing_bytes_is_reported_as_damaged(bank: Path) -> None:
    path = parts_in(bank)[1]
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(PartDamagedError, match="and its header says"):
        read_part(path)


def test_damaged_numbers_are_found_by_their_checksum(bank: Path) -> None:
    path = parts_in(bank)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = open_bank(bank)
    for key in opened:
        if key == KEYS[7]:
            with pytest.raises(BankError, match="is not what was written"):
                opened.check(key)
        else:
            opened.check(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(version=1), r"format version 1;.*patchbank import"),
        (lambda content: content.update(version=3), "format version 3;.*Use the version of patchbank that wrote it"),
        (lambda content: content.update(format="zarr"), "its format is 'zarr'"),
        (lambda content: content["samples"]["keys"].__setitem__(0, "../a.jpg"), "would lead out of the bank"),
        (lambda content: content["samples"]["sizes"].pop(), "damaged.*differ in length"),
        (lambda content: content["samples"]["sizes"].__setitem__(0, [0, 480]), "damaged.*sizes"),
        (lambda content: content["samples"]["sizes"].__setitem__(0, [1, 2, 3]), "damaged.*sizes"),
        (lambda content: content["samples"]["sizes"].__setitem__(0, [10**30, 2]), "damaged.*sizes"),
        (lambda content: content["samples"]["sha256"].__setitem__(0, "../x"), "damaged.*sha256"),
        (lambda content: content["samples"].update(resized=[]), "differ in length"),
        (lambda content: content.update(number=7), "its number is 7"),
        (lambda content: content.update(number=-1), "damaged.*number"),
        (lambda content: tokens_of(content).update(shape=[16, 31]), "its tensors are not those"),
        (lambda content: tokens_of(content).update(shape=[15, 32]), "no grid of 15 tokens"),
        (lambda content: tokens_of(content).update(shape=[-16, 32]), "has the shape"),
        (lambda content: tokens_of(content).update(dtype="float8"), "damaged.*dtype"),
        (lambda content: content["manifest"].pop("identity"), "identity"),
        (lambda content: content["manifest"]["identity"].update(model=7), "damaged.*identity"),
        (lambda content: content["manifest"]["input"].update(size=[32, -32]), "no grid"),
        (lambda content: content["manifest"]["input"].update(size=[32]), "damaged.*size"),
        (lambda content: content["manifest"]["input"].update(patch=float("nan")), "damaged"),
        (lambda content: content["manifest"].update(part_size=2.5), "damaged.*part_size"),
        (lambda content: content["manifest"].update(dataset=["x"]), "damaged.*dataset"),
        (lambda content: content["manifest"].update(layout="ezhoi"), "the layout ezhoi does not store the outputs cls"),
    ],
)
def test_what_does_not_fit_is_refused(bank: Path, change: Any, words: str) -> None:
    rewrite(parts_in(bank)[0], in_metadata(change))
    with pytest.raises(BankError, match=words):
        open_bank(bank)


def test_shards_of_two_banks_are_refused(bank: Path) -> None:
    rewrite(parts_in(bank)[2], in_metadata(lambda content: content["manifest"]["identity"].update(precision="bf16")))
    with pytest.raises(BankError, match=r"parts of two banks.*precision fp32.*has bf16"):
        open_bank(bank)
    with pytest.raises(BankError, match="parts of two banks"):
        write(bank, KEYS)


def test_other_files_beside_shards_stay(bank: Path) -> None:
    (bank / "model.safetensors").write_bytes(b"weights")
    (bank / "shard-1.safetensors").write_bytes(b"whatever")
    assert len(open_bank(bank)) == 9
    remove_bank(bank)
    assert sorted(path.name for path in bank.iterdir()) == ["index", "model.safetensors", "shard-1.safetensors"]
    assert not any((bank / "index").iterdir())


def test_two_layouts_in_one_directory_are_refused(bank: Path, tmp_path: Path) -> None:
    write(tmp_path / "pickles", KEYS[:1], manifest=tiny_manifest())
    shutil.copytree(tmp_path / "pickles", bank, dirs_exist_ok=True)
    with pytest.raises(BankError, match="holds two banks"):
        open_bank(bank)


# --- runs that complete each other


def test_a_damaged_shard_is_in_quarantine_and_made_again(bank: Path, tmp_path: Path) -> None:
    whole = contents(bank)
    path = parts_in(bank)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with BankWriter(bank, MANIFEST, KEYS) as writer:
        assert writer.done == {*KEYS[4:]} - {KEYS[5]}
        assert path.name in writer.notes[0]
        writer.add([feature(key) for key in KEYS[:4]], [])
    quarantined = bank / f"{path.name}.damaged"
    assert quarantined.exists()
    quarantined.unlink()
    assert contents(bank) == whole


@pytest.mark.parametrize(
    "runs", [[KEYS[:3], KEYS[3:6], KEYS[6:]], [KEYS[7:], KEYS[:7]], [[key] for key in reversed(KEYS)]]
)
def test_runs_in_parts_leave_no_trace(tmp_path: Path, runs: list[list[str]]) -> None:
    for keys in runs:
        write(tmp_path / "parts", keys)
        assert no_leftovers(tmp_path / "parts")
    write(tmp_path / "whole", KEYS)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_writers_at_once_that_share_shards_lose_nothing(tmp_path: Path) -> None:
    with BankWriter(tmp_path / "both", MANIFEST, KEYS) as one, BankWriter(tmp_path / "both", MANIFEST, KEYS) as two:
        one.add([feature(key) for key in KEYS[0::2]], [])
        two.add([feature(key) for key in KEYS[1::2]], [])
    write(tmp_path / "whole", KEYS)
    assert contents(tmp_path / "both") == contents(tmp_path / "whole")


def test_an_open_bank_finds_the_shard_that_replaced_another(tmp_path: Path) -> None:
    write(tmp_path / "bank", KEYS[:2])
    opened = open_bank(tmp_path / "bank")
    assert torch.equal(opened[KEYS[0]], tokens(KEYS[0]))
    other = open_bank(tmp_path / "bank")  # has not mapped anything yet
    write(tmp_path / "bank", KEYS[2:])
    for each in (opened, other):
        assert torch.equal(each[KEYS[1]], tokens(KEYS[1]))
        assert list(each) == KEYS[:2]
    for path in parts_in(tmp_path / "bank"):
        path.unlink()
    with pytest.raises(BankError, match="is gone"):
        pickle.loads(pickle.dumps(other))[KEYS[1]]


def test_a_run_with_other_settings_deletes_nothing_of_a_bank_that_came_meanwhile(bank: Path, tmp_path: Path) -> None:
    """When it began, there was no bank to compare with."""
    other = replace(MANIFEST, identity={**MANIFEST.identity, "weights": "1" * 64})
    for manifest in (other, replace(tiny_manifest("shards", "float16"), part_size=4)):
        directory = tmp_path / manifest.dtype
        with (
            pytest.raises(BankError, match="created with a different configuration"),
            BankWriter(directory, manifest, KEYS) as late,
        ):
            shutil.copytree(bank, directory, dirs_exist_ok=True)
            late.add([feature(key) for key in KEYS], [])
        assert contents(directory) == contents(bank)


def test_of_two_features_of_one_image_one_counts_with_its_own_numbers(tmp_path: Path) -> None:
    """Two machines compute different last bits. Whichever counts, its checksum matches its numbers."""
    first, second = feature(KEYS[0]), feature(KEYS[1])
    with BankWriter(tmp_path, MANIFEST, KEYS) as late:
        with BankWriter(tmp_path, MANIFEST, KEYS) as early:
            early.add([first, second], [])
        late.add([second._replace(key=first.key), first._replace(key=second.key)], [])
    opened = open_bank(tmp_path)
    for key in KEYS[:2]:
        opened.check(key)
    assert torch.equal(opened[KEYS[0]], opened[KEYS[1]])  # the greater checksum counts, of either image


def test_parts_of_one_shard_become_one(tmp_path: Path) -> None:
    """Two processes that commit a part of the same shard in the same instant leave two; the next run joins them."""
    for name, keys in (("one", KEYS[0:2]), ("two", KEYS[2:4])):
        write(tmp_path / name, keys)
    shutil.copytree(tmp_path / "one", tmp_path / "both")
    shutil.copytree(tmp_path / "two", tmp_path / "both", dirs_exist_ok=True)
    assert len(parts_in(tmp_path / "both")) == 2
    assert list(open_bank(tmp_path / "both")) == KEYS[:4]
    with BankWriter(tmp_path / "both", MANIFEST, KEYS):
        pass
    write(tmp_path / "whole", KEYS[:4])
    assert contents(tmp_path / "both") == contents(tmp_path / "whole")


def test_a_shard_that_is_replaced_while_it_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bank", KEYS[:1])
    original, meanwhile = Shards.columns, [KEYS[1:2]]

    def mapping(*arguments: Any, **options: Any) -> Any:
        if meanwhile:
            write(tmp_path / "bank", meanwhile.pop())
        return original(*arguments, **options)

    with BankWriter(tmp_path / "bank", MANIFEST, KEYS) as writer:
        monkeypatch.setattr(Shards, "columns", mapping)
        writer.add([feature(key) for key in KEYS[2:4]], [])
    write(tmp_path / "whole", KEYS[:4])
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")


def test_shards_of_a_set_that_has_grown_stay_as_they_are(tmp_path: Path) -> None:
    """Old images have other positions now: their shards hold samples of two numbers, and belong to neither."""
    write(tmp_path / "bank", KEYS[:8])
    before = contents(tmp_path / "bank")
    grown = ["a.jpg", "b.jpg", *KEYS]
    with BankWriter(tmp_path / "bank", MANIFEST, grown) as writer:
        assert writer.done == {*KEYS[:8]}
        new = [Feature(key, feature(KEYS[9]).outputs, None) for key in grown[:2]]
        writer.add([*new, feature(KEYS[8]), feature(KEYS[9])], [])
    after = contents(tmp_path / "bank")
    assert before.items() <= after.items()
    opened = open_bank(tmp_path / "bank")
    assert list(opened) == sorted(grown)
    for key in KEYS:
        assert torch.equal(opened[key], tokens(key))
        opened.check(key)


def test_a_new_reason_counts_and_not_the_old_one(tmp_path: Path) -> None:
    for reason in ("zzz", "aaa", "mmm"):
        with BankWriter(tmp_path, MANIFEST, KEYS) as writer:
            writer.add([], [Failure(KEYS[0], reason)])
        assert open_bank(tmp_path).failures == {KEYS[0]: reason}


def test_what_is_revoked_leaves_the_others_where_they_are(bank: Path, tmp_path: Path) -> None:
    payload = payload_of(bank, "shards")
    revoke(payload, read_parts(payload), {KEYS[0]: "damaged", KEYS[6]: "damaged"}, tmp_path)
    opened = open_bank(bank)
    assert opened.failures == {KEYS[0]: "damaged", KEYS[5]: "missing", KEYS[6]: "damaged"}
    for key in opened:
        assert torch.equal(opened[key], tokens(key))
        assert torch.equal(opened.cls(key), cls(key))
        opened.check(key)
    for key in (KEYS[0], KEYS[6]):  # ... and are written again
        write(bank, [key])
        assert torch.equal(open_bank(bank)[key], tokens(key))


def test_a_reader_raises_when_its_bank_was_replaced(bank: Path) -> None:
    opened = open_bank(bank)
    manifest = replace(MANIFEST, identity={**MANIFEST.identity, "precision": "bf16"})
    with BankWriter(bank, manifest, KEYS, overwrite=True) as writer:
        writer.add([feature(key) for key in KEYS[:4]], [])
    assert open_bank(bank).manifest == MANIFEST
    assert not writer.replace(KEYS[:4])
    with pytest.raises(BankError, match="was replaced since it was opened"):
        opened[KEYS[0]]
    with BankWriter(bank, MANIFEST, KEYS, overwrite=True) as writer:
        writer.add([feature(key) for key in KEYS[:4]], [])
    assert not writer.replace(KEYS[:4])
    assert torch.equal(opened[KEYS[0]], tokens(KEYS[0]))
    with pytest.raises(BankError, match="and has none now"):
        opened[KEYS[8]]


def test_threads_that_share_a_reader_never_mix_two_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread maps a shard while another notices that the bank has changed."""
    write(tmp_path / "bank", KEYS[4:8])
    write(tmp_path / "bank", KEYS[8:9])
    opened = open_bank(tmp_path / "bank")
    original, meanwhile = Shards.columns, [True]

    def mapping(*arguments: Any, **options: Any) -> Any:
        mapped = original(*arguments, **options)
        if meanwhile:
            meanwhile.pop()
            write(tmp_path / "bank", [*KEYS[:4], KEYS[9]])  # a shard comes in front, another is replaced
            with ThreadPoolExecutor(1) as other:
                assert torch.equal(other.submit(opened.__getitem__, KEYS[8]).result(), tokens(KEYS[8]))
        return mapped

    monkeypatch.setattr(Shards, "columns", mapping)
    for _ in range(2):
        for key in KEYS[4:9]:
            assert torch.equal(opened[key], tokens(key))


def test_a_fixed_image_replaces_its_failure(bank: Path, tmp_path: Path) -> None:
    write(bank, [KEYS[5]])
    write(tmp_path / "whole", KEYS)
    assert contents(bank) == contents(tmp_path / "whole")


def test_features_that_are_not_finite_are_failures(tmp_path: Path) -> None:
    outputs = {"patch_tokens": torch.full((16, 32), torch.nan), "cls": torch.zeros(32)}
    bad = Feature(KEYS[1], outputs, (640, 480))
    with BankWriter(tmp_path, MANIFEST, KEYS) as bank:
        [refused] = bank.add([feature(KEYS[0]), bad], [])
    assert refused.key == KEYS[1]
    assert "not finite" in open_bank(tmp_path).failures[KEYS[1]]
    assert list(open_bank(tmp_path)) == [KEYS[0]]


def test_images_that_all_failed_make_a_bank_too(tmp_path: Path) -> None:
    write(tmp_path, [], KEYS)
    opened = open_bank(tmp_path)
    assert len(opened) == 0
    assert opened.failures == dict.fromkeys(KEYS, "missing")
    write(tmp_path, KEYS)
    assert len(open_bank(tmp_path)) == 10


# --- durability


def test_a_shard_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc shows a descriptor's file")
    log: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def logged_fsync(descriptor: int) -> None:
        log.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", f"{source} -> {target}"))
        rename(source, target)

    def logged_unlink(path: Path, **options: Any) -> None:
        log.append(("unlink", str(path)))
        unlink(path, **options)

    write(tmp_path / "bank", KEYS[:2])
    [old] = parts_in(tmp_path / "bank")
    with BankWriter(tmp_path / "bank", MANIFEST, KEYS) as bank:
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "rename", logged_rename)
        monkeypatch.setattr(os, "unlink", logged_unlink)
        bank.add([feature(key) for key in KEYS[2:5]], [])
        monkeypatch.undo()
    [new] = [path for path in parts_in(tmp_path / "bank") if path.name.startswith("shard-00000")]
    steps = [(what, path.rpartition("/")[2]) for what, path in log]
    assert steps == [("fsync", new.name), ("rename", new.name), ("fsync", "bank"), ("unlink", old.name)]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_disk_is_one_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    write(tmp_path / "whole", KEYS)
    write(tmp_path / "bank", KEYS[:2])
    count = 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    writer = BankWriter(tmp_path / "bank", MANIFEST, KEYS)
    with pytest.raises(BankError, match="The disk is full"), writer:
        if call == "write":
            original: Any = writing.write_and_sync
            monkeypatch.setattr(writing, "write_and_sync", failing)
        else:
            original = getattr(os, call)
            monkeypatch.setattr(os, call, failing)
        writer.add([feature(key) for key in KEYS[2:]], [])
    monkeypatch.undo()
    assert no_leftovers(tmp_path / "bank")
    assert {*KEYS[:2]} <= set(open_bank(tmp_path / "bank"))
    for key in open_bank(tmp_path / "bank"):
        open_bank(tmp_path / "bank").check(key)
    write(tmp_path / "bank", KEYS[2:])
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")


# --- through `extract`


def test_a_folder_becomes_shards_and_goes_on_as_such(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 7)
    shutil.copy(tmp_path / "images/photo_0000.jpg", tmp_path / "images/frame.0001.jpg")
    shutil.copy(tmp_path / "images/photo_0001.jpg", tmp_path / "images/frame.0002.jpg")  # one name, as pickles go
    config = replace(tiny_config, layout=None, shard_size=3 * 2176)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "bank", replace(config, limit=4))
    summary = extract(dataset, tmp_path / "bank", replace(config, shard_size=256_000_000))
    assert any("3 images a shard" in note for note in summary.notes)
    opened = open_bank(tmp_path / "bank")
    assert opened.manifest.layout == "shards"
    assert len(opened) == 9
    assert len(parts_in(tmp_path / "bank")) == 3


def test_both_layouts_hold_the_same_numbers(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 5)
    dataset = load_dataset("folder", tmp_path / "images")
    for layout in ("ezhoi", "shards"):
        extract(dataset, tmp_path / layout, replace(tiny_config, layout=layout))
    pickles, shards = open_bank(tmp_path / "ezhoi"), open_bank(tmp_path / "shards")
    assert list(pickles) == list(shards)
    assert all(torch.equal(pickles[key], shards[key]) for key in pickles)
    with pytest.raises(BankError, match="does not store the output 'cls'"):
        pickles.cls("photo_0000.jpg")


def test_a_resumed_bank_keeps_its_layout(tiny_config: ExtractConfig, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 3)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "bank", replace(tiny_config, layout="ezhoi", limit=1))
    extract(dataset, tmp_path / "bank", replace(tiny_config, layout=None))
    assert open_bank(tmp_path / "bank").manifest.layout == "ezhoi"
    with pytest.raises(BankError, match="layout: the bank has ezhoi, this run shards"):
        extract(dataset, tmp_path / "bank", replace(tiny_config, layout="shards"))


def test_a_shard_gets_its_name_by_a_rename_and_is_durable_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy would be visible half written, and could be lost with the directory's entry."""
    synced: list[Path] = []
    monkeypatch.setattr(storage, "fsync_directory", synced.append)
    place = storage.Storage(tmp_path / "bank")
    with place.scratch() as scratch:
        temporary = scratch / "made"
        temporary.write_bytes(b"a shard")
        inode = temporary.stat().st_ino
        place.commit(temporary, "shard")
        assert (tmp_path / "bank" / "shard").stat().st_ino == inode
        assert synced == [tmp_path / "bank"] and not temporary.exists()
