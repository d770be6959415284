"""`verify` names every defect of third-party pickles and of banks, and runs nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from patchbank import ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.check import KINDS, Report, compare_with_pixels, tolerance, verify
from patchbank.bank.convert import import_pickles
from patchbank.config import StoredDtype
from patchbank.errors import BankError
from patchbank.features import Output
from tests.support import contents, parts_in, patchbank, photographs, tiny_manifest
from tests.third_party import DEFECTS, Call, unreadable, write_bank

KEYS = [f"photo_{number:02}.jpg" for number in range(len(DEFECTS) + 4)]
DEFECT_OF = dict(zip(KEYS, DEFECTS, strict=False))


def tokens_of(keys: list[str]) -> dict[str, Tensor]:
    return {key: torch.randn(17, 32, generator=torch.Generator().manual_seed(KEYS.index(key))) for key in keys}


def kinds(report: Report) -> dict[str, str]:
    """Each name's finding, except for files that an earlier repair quarantined."""
    return {finding.name: finding.kind for finding in report.findings if finding.kind != "quarantine"}


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pickles with every defect, three sound ones, one of no listed image; the last listed one is missing."""
    monkeypatch.chdir(tmp_path)  # where a hostile pickle would leave its trace
    write_bank(tmp_path / "bank", tokens_of(KEYS[:-1]), DEFECT_OF)
    (tmp_path / "bank/other_clip.pkl").write_bytes(pickle.dumps(torch.randn(16, 32)))
    return tmp_path / "bank"


def test_every_defect_is_named(third_party: Path) -> None:
    before = contents(third_party)
    report = verify(third_party, KEYS)
    assert kinds(report) == {**DEFECT_OF, KEYS[-1]: "missing", "other_clip.pkl": "extra"}
    assert [finding.kind for finding in report.findings] == [kind for kind in KINDS if kind in kinds(report).values()]
    assert len(report.problems) == len(DEFECTS) + 1
    assert (report.looked_at, report.listed) == (len(KEYS), len(KEYS))
    assert report.shape == (16, 32)
    assert contents(third_party) == before
    assert not (third_party.parent / "patchbank-was-run").exists()
    details = {finding.kind: finding.detail for finding in report.findings}
    assert "stock `clip`" in details["shape"]
    assert details["cuda"] == "cuda:0"
    assert details["view"] == "2,176 bytes for a tensor of 2,048"
    assert details["zero"] == "1 of 16 tokens"


def test_without_a_list_nothing_is_missing_or_extra(third_party: Path) -> None:
    found = kinds(verify(third_party))
    assert set(found.values()) == set(DEFECTS)
    assert "photo_00_clip.pkl" in found  # by its file's name


def test_the_reason_of_a_junk_pickle_is_words(tmp_path: Path) -> None:
    for name, content in (("a", b"h\x05."), ("b", b"\x80\x04R.")):
        (tmp_path / f"{name}_clip.pkl").write_bytes(content)
    details = [finding.detail for finding in verify(tmp_path).findings]
    assert details == ["it takes a value that it has not kept", "it takes a value that is not there"]


def test_a_slice_of_a_batch_is_a_view(tmp_path: Path) -> None:
    batch = torch.randn(8, 17, 32)
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(batch[:, 1:][3]))
    (tmp_path / "b_clip.pkl").write_bytes(pickle.dumps(torch.randn(32, 16).T))
    assert kinds(verify(tmp_path)) == {"a_clip.pkl": "view", "b_clip.pkl": "view"}


def test_several_defects_of_one_file_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(torch.randn(4, 17, 32).half()[2].requires_grad_()))
    assert {finding.kind for finding in verify(tmp_path).findings} == {"cls", "dtype", "view", "gradient"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(torch.randn(16, 32), protocol=protocol))
    assert verify(tmp_path).findings == []


def test_a_full_size_pickle_cut_anywhere_is_unreadable(tmp_path: Path) -> None:
    whole = pickle.dumps(torch.randn(196, 512))
    for length in range(0, len(whole), 4096):
        (tmp_path / f"cut{length}_clip.pkl").write_bytes(whole[:length])
    report = verify(tmp_path)
    assert len(report.findings) == len(range(0, len(whole), 4096))
    assert set(kinds(report).values()) == {"unreadable"}


def test_most_shapes_decide_unless_one_is_expected(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 1)):
        for number in range(count):
            shape = (196, 512) if name == "a" else (576, 768)
            (tmp_path / f"{name}{number}_clip.pkl").write_bytes(pickle.dumps(torch.randn(shape)))
    assert kinds(verify(tmp_path)) == {"b0_clip.pkl": "shape"}
    assert kinds(verify(tmp_path, expected=(576, 768))) == {"a0_clip.pkl": "shape", "a1_clip.pkl": "shape"}


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="nothing to verify"):
        verify(tmp_path)
    with pytest.raises(BankError, match="There is no directory"):
        verify(tmp_path / "nowhere")


# --- banks


@pytest.fixture(params=["ezhoi", "shards"])
def bank(tmp_path: Path, tiny_config: ExtractConfig, request: pytest.FixtureRequest) -> Path:
    photographs(tmp_path / "images", 7)
    (tmp_path / "images/broken.jpg").write_bytes(b"")
    config = replace(tiny_config, layout=request.param, shard_size=3 * 2176)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    return tmp_path / "bank"


def test_a_sound_bank(bank: Path) -> None:
    (bank.parent / "images/broken.jpg").unlink()
    report = verify(bank, ["broken.jpg", *(f"photo_000{number}.jpg" for number in range(7))])
    assert kinds(report) == {"broken.jpg": "failed"}
    assert report.looked_at == len(report.sound) == 7
    assert kinds(verify(bank, [*report.sound, "more.jpg"])) == {"more.jpg": "missing", "broken.jpg": "extra"}
    assert kinds(verify(bank, report.sound[1:]))["photo_0000.jpg"] == "extra"


def damage_numbers(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-300] ^= 0x40
    path.write_bytes(content)


def test_a_changed_bit_is_found(bank: Path) -> None:
    opened = open_bank(bank)
    damage_numbers(opened.file("photo_0006.jpg"))
    found = {name: kind for name, kind in kinds(verify(bank)).items() if kind != "failed"}
    assert list(found.values()) == ["checksum"]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "unreadable"),
        (lambda path: path.write_bytes(b""), "unreadable"),
        (lambda path: path.write_bytes(pickle.dumps(torch.randn(16, 32))), "checksum"),
        (lambda path: path.write_bytes(pickle.dumps(torch.randn(17, 32))), "checksum"),
        (lambda path: path.write_bytes(pickle.dumps(torch.ones(511))), "shape"),
        (lambda path: path.write_bytes(DEFECTS["cuda"](torch.randn(17, 32))), "checksum"),
        (lambda path: path.write_bytes(DEFECTS["unsafe"](torch.empty(0))), "unsafe"),
    ],
)
def test_what_happens_to_a_pickle_is_found(
    tmp_path: Path, tiny_config: ExtractConfig, damage: Callable[[Path], object], kind: str
) -> None:
    photographs(tmp_path / "images", 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    assert verify(tmp_path / "bank").findings == []
    damage(tmp_path / "bank/photo_0001_clip.pkl")
    assert kinds(verify(tmp_path / "bank")) == {"photo_0001.jpg": kind}


def test_pickles_that_no_index_lists_are_a_problem(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    """Whether the index lists others, is empty, or is gone; with a list of images, those of none are harmless."""
    names, bank = photographs(tmp_path / "images", 6), tmp_path / "bank"
    extract(load_dataset("folder", tmp_path / "images"), bank, tiny_config)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "half", replace(tiny_config, limit=3))
    pickles = {name: name.replace(".jpg", "_clip.pkl") for name in names}
    [part], [half] = parts_in(bank), parts_in(tmp_path / "half")
    part.unlink()
    shutil.copy(half, part.with_name(half.name))
    (tmp_path / "images").rename(tmp_path / "moved")  # the command would find them, and know their names
    assert kinds(verify(bank)) == dict.fromkeys([pickles[name] for name in names[3:]], "unlisted")
    assert kinds(verify(bank, names[:4])) == {
        names[3]: "missing", pickles[names[4]]: "extra", pickles[names[5]]: "extra",
    }  # fmt: skip
    done = patchbank("verify", bank, check=1)
    assert "that no index lists" in done.stdout and f"patchbank repair {bank} --extract" in done.stdout
    shutil.copytree(tmp_path / "half", bank / "sub/half")  # another bank, with its own index
    nested = [f"sub/half/{pickles[name]}" for name in names[:3]]
    assert {name: kind for name, kind in kinds(verify(bank)).items() if "/" in name} == dict.fromkeys(nested, "extra")
    shutil.rmtree(bank / "sub")
    part.with_name(half.name).unlink()
    for _ in range(2):
        assert kinds(verify(bank)) == dict.fromkeys(pickles.values(), "unlisted")
        done = patchbank("verify", bank, check=1)
        assert "index is missing" in done.stdout and f"patchbank import {bank}" in done.stdout
        shutil.rmtree(bank / "index", ignore_errors=True)
    imported = import_pickles(bank, tmp_path / "new", open_bank(tmp_path / "half").manifest, names)
    assert imported.left_out == []
    assert kinds(verify(tmp_path / "new")) == {}


def test_a_shard_that_is_missing_is_noticed_without_a_list(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 7)
    config = replace(tiny_config, layout="shards", shard_size=3 * 2176)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    parts_in(tmp_path / "bank")[1].unlink()
    assert kinds(verify(tmp_path / "bank")) == {"shard-00001-*": "missing"}
    lost = verify(tmp_path / "bank", [f"photo_000{number}.jpg" for number in range(7)])
    assert kinds(lost) == {f"photo_000{number}.jpg": "missing" for number in (3, 4, 5)}


def test_a_number_in_a_name_costs_nothing(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", replace(tiny_config, layout="shards"))
    name = "shard-99999999999-0123456789abcdef.safetensors"
    (tmp_path / "bank" / name).write_bytes(b"")
    found = kinds(verify(tmp_path / "bank"))
    assert found == {name: "damaged-part", "shard-00001-* to shard-99999999998-*": "missing"}


def test_what_can_never_be_read_does_not_hang(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    for layout in ("ezhoi", "shards"):
        config = replace(tiny_config, layout=layout)  # type: ignore[arg-type]
        extract(load_dataset("folder", tmp_path / "images"), tmp_path / layout, config)
    (tmp_path / "shards/shard-00007-0123456789abcdef.safetensors").symlink_to("nowhere")
    (tmp_path / "shards/loop").symlink_to("loop")
    os.mkfifo(tmp_path / "shards/shard-00008-0123456789abcdef.safetensors")
    (tmp_path / "ezhoi/index/index-00003-0123456789abcdef.json").symlink_to("nowhere")
    (tmp_path / "ezhoi/link_clip.pkl").symlink_to("nowhere")
    (tmp_path / "ezhoi/loop_clip.pkl").symlink_to("loop_clip.pkl")
    os.mkfifo(tmp_path / "ezhoi/pipe_clip.pkl")
    for layout in ("ezhoi", "shards"):
        assert len(open_bank(tmp_path / layout)) == 2
        assert verify(tmp_path / layout).findings == []


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_pickle_does_not_hang(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    names = photographs(tmp_path / "images", 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    path = tmp_path / "bank/photo_0001_clip.pkl"
    path.unlink()
    os.mkfifo(path)
    assert kinds(verify(tmp_path / "bank")) == {names[1]: "unread"}
    with pytest.raises(BankError, match="not a regular file"):
        open_bank(tmp_path / "bank")[names[1]]


def sparse(path: Path) -> None:
    with open(path, "ab") as file:
        file.truncate(1 << 36)  # more than a machine's memory


def test_long_files_are_not_read(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    names = photographs(tmp_path / "images", 2)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    sparse(tmp_path / "bank/photo_0001_clip.pkl")
    tracemalloc.start()
    assert kinds(verify(tmp_path / "bank")) == {names[1]: "unreadable"}
    with pytest.raises(BankError, match="more than 256 MB"):
        open_bank(tmp_path / "bank")[names[1]]
    [part] = parts_in(tmp_path / "bank")
    sparse(part)
    assert kinds(verify(tmp_path / "bank")) == {part.name: "damaged-part"}
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [("patch_tokens", (16, 1 << 30), "float32", "more than 67,108,864"), ("cls", (32,), "int8", "a vector of int8")],
)
def test_a_manifest_that_no_bank_has(name: str, shape: tuple[int, ...], dtype: StoredDtype, reason: str) -> None:
    manifest = tiny_manifest("shards")
    outputs = {**manifest.outputs, name: Output(shape=shape, dtype=dtype, block=1)}
    with pytest.raises(ValueError, match=reason):
        replace(manifest, outputs=outputs).check()


def test_a_manifest_with_a_filter_that_nobody_has_is_damaged(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    """Else no image could be extracted again to compare with."""
    photographs(tmp_path / "images", 1)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    [part] = parts_in(tmp_path / "bank")
    changed = part.read_bytes().replace(b'"bicubic"', b'"evil"')
    part.unlink()
    name = f"index-00000-{hashlib.sha256(changed).hexdigest()[:16]}.json"
    part.with_name(name).write_bytes(changed)
    [finding] = [each for each in verify(tmp_path / "bank").findings if each.kind == "damaged-part"]
    assert finding.name == name and "interpolation" in finding.detail


def test_a_file_that_cannot_be_read_just_now_is_not_called_damaged(
    third_party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable(monkeypatch, "photo_12_clip.pkl")
    assert kinds(verify(third_party, KEYS))["photo_12.jpg"] == "unread"


def test_other_data_than_a_tensor_is_not_called_hostile(tmp_path: Path) -> None:
    values = [numpy.ones((2, 3)), {"a": torch.ones(2, 3)}, [1], torch.ones(16, 32).to(torch.uint8), "text", 7]
    for number, value in enumerate(values):
        (tmp_path / f"{number}_clip.pkl").write_bytes(pickle.dumps(value))
    (tmp_path / "5_protocol_clip.pkl").write_bytes(pickle.dumps(numpy.ones((2, 3)), 5))
    torch.save(torch.ones(16, 32), tmp_path / "saved_clip.pkl")
    (tmp_path / "evil_clip.pkl").write_bytes(pickle.dumps({"a": Call(os.mkdir, "patchbank-was-run")}))
    report = verify(tmp_path)
    found = kinds(report)
    assert found.pop("evil_clip.pkl") == "unsafe"
    assert set(found.values()) == {"unreadable"}
    assert len(found) == len(values) + 2
    assert any("archive of torch.save" in finding.detail for finding in report.findings)


def test_a_parameter_is_a_tensor_that_asks_for_gradients(tmp_path: Path) -> None:
    (tmp_path / "a_clip.pkl").write_bytes(pickle.dumps(torch.nn.Parameter(torch.randn(16, 32))))
    assert kinds(verify(tmp_path)) == {"a_clip.pkl": "gradient"}


def test_a_damaged_part_of_pickles_is_found(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    config = replace(tiny_config, batch_size=1)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    [part] = parts_in(tmp_path / "bank")
    part.write_bytes(part.read_bytes()[:-1])
    assert kinds(verify(tmp_path / "bank")) == {part.name: "damaged-part"}


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_damaged_shard_is_found(tmp_path: Path, tiny_config: ExtractConfig, which: str) -> None:
    photographs(tmp_path / "images", 7)
    config = replace(tiny_config, layout="shards", shard_size=3 * 2176)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    shards = parts_in(tmp_path / "bank")[: 1 if which == "one" else None]
    for path in shards:
        path.write_bytes(path.read_bytes()[:-1])
    report = verify(tmp_path / "bank")
    assert kinds(report) == {path.name: "damaged-part" for path in shards}
    assert report.looked_at == (4 if which == "one" else 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_banks_of_every_dtype_are_sound(tmp_path: Path, tiny_config: ExtractConfig, dtype: str) -> None:
    photographs(tmp_path / "images", 3)
    dataset = load_dataset("folder", tmp_path / "images")
    layouts = ["shards"] if dtype == "int8" else ["ezhoi", "shards"]
    for layout in layouts:
        extract(dataset, tmp_path / layout, replace(tiny_config, layout=layout, dtype=dtype))  # type: ignore[arg-type]
        assert verify(tmp_path / layout).findings == []


# --- against pixels


def test_features_of_other_pixels_are_found(bank: Path) -> None:
    opened = open_bank(bank)
    stored = {key: {name: opened.output(key, name) for name in opened.manifest.outputs} for key in opened}
    report = verify(bank)
    compare_with_pixels(report, [*stored, "broken.jpg"], 4, stored.__getitem__)
    assert len(report.sample) == 4
    assert set(report.sample.values()) == {0.0}
    asked: list[str] = []

    def other(key: str) -> dict[str, Tensor]:
        asked.append(key)
        return stored["photo_0000.jpg" if key != "photo_0000.jpg" else "photo_0001.jpg"]

    compare_with_pixels(report, list(stored), 100, other)
    assert sorted(asked) == sorted(stored)
    assert {name for name, kind in kinds(report).items() if kind == "pixels"} == set(stored)
    assert report.sound == []


def test_a_difference_that_is_no_number_is_one(bank: Path) -> None:
    report = verify(bank)
    assert report.manifest is not None
    compare_with_pixels(
        report,
        report.sound,
        1,
        lambda _: {name: torch.full(each.shape, torch.nan) for name, each in report.manifest.outputs.items()},
    )
    assert "pixels" in kinds(report).values()


def test_tolerances_follow_what_the_bank_says() -> None:
    def allowed(precision: str, dtype: str, *rounded: str, imported: str = "") -> float:
        manifest = tiny_manifest("shards", dtype)
        identity = {**manifest.identity, "precision": precision}
        return tolerance(replace(manifest, identity=identity, rounded=rounded, imported=imported))  # type: ignore[arg-type]

    assert allowed("fp32", "float32") == 2e-5
    assert allowed("fp32", "float16") == allowed("fp32", "float32", "float16") > 5e-4
    assert allowed("fp32", "float16", "int8") > allowed("fp32", "int8")
    assert 5e-3 < allowed("fp32", "int8") < 5e-2  # int8 rounds by about a hundredth
    assert allowed("bf16", "float32") == 3e-2
    assert allowed("unknown", "float32", imported="by hand") == tolerance(None) == 2e-2
