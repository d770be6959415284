"""`import_pickles` makes a bank of third-party pickles: each is checked, nothing runs, the source is not changed."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from patchbank import ImageTransform, encoders, open_bank
from patchbank.bank.check import verify
from patchbank.bank.convert import Imported, import_pickles
from patchbank.bank.manifest import Manifest
from patchbank.bank.pickles import pickle_name
from patchbank.errors import BankError
from patchbank.features import UNKNOWN
from tests.bank.test_check import KEYS, kinds, tokens_of
from tests.support import contents, no_leftovers, tiny_manifest
from tests.third_party import DEFECTS, FIXED_BY_IMPORT, unreadable, write_bank

TOKENS = tokens_of(KEYS)
DEFECT_OF = dict(zip(KEYS, DEFECTS, strict=False))
LEFT_OUT = [key for key, kind in DEFECT_OF.items() if kind not in FIXED_BY_IMPORT]


def wanted(layout: str = "ezhoi", dtype: str = "float32") -> object:
    made = tiny_manifest(layout, dtype)
    outputs = {"patch_tokens": made.outputs["patch_tokens"]}  # pickles have no [CLS]
    identity = {**made.identity, "weights": UNKNOWN}
    return replace(made, outputs=outputs, identity=identity, imported="from pickles", dataset="hicodet", split="test")


@pytest.fixture
def pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pickles with every defect and three sound ones; the last listed image has none."""
    monkeypatch.chdir(tmp_path)  # where a hostile pickle would leave its trace
    write_bank(tmp_path / "pickles", {key: TOKENS[key] for key in KEYS[:-1]}, DEFECT_OF)
    return tmp_path / "pickles"


def imported(source: Path, target: Path, layout: str = "ezhoi", **options: object) -> Imported:
    return import_pickles(source, target, wanted(layout), models_with=encoders.models_with, **options)  # type: ignore[arg-type]


def test_pickles_of_another_split_are_not_imported(pickles: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"None of the pickles .* belongs to the listed images, such as z\.jpg"):
        imported(pickles, tmp_path / "bank", listed=["z.jpg", "y.jpg"])
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
def test_pickles_become_a_bank(pickles: Path, tmp_path: Path, layout: str) -> None:
    before = contents(pickles)
    done = imported(pickles, tmp_path / "bank", layout, listed=KEYS, size_of=lambda _: (640, 480))
    assert contents(pickles) == before
    assert not Path("patchbank-was-run").exists()
    assert {finding.kind for finding in done.fixed} == set(FIXED_BY_IMPORT)
    assert {finding.name for finding in done.left_out} == {*LEFT_OUT, KEYS[-1]}
    opened = open_bank(tmp_path / "bank")
    assert list(opened) == [key for key in KEYS[:-1] if key not in LEFT_OUT]
    assert set(opened.failures) == {*LEFT_OUT, KEYS[-1]}
    assert "would run code when unpickled" in opened.failures[KEYS[list(DEFECTS).index("unsafe")]]
    for key in opened:
        expected = TOKENS[key][1:]
        assert torch.equal(opened[key], expected.half().float() if DEFECT_OF.get(key) == "dtype" else expected)
        assert opened.transform(key) == ImageTransform(640, 480, "center-crop", (32, 32), 8)
    assert opened.manifest.title == "hicodet test"
    assert opened.manifest.identity["weights"] == "unknown"
    assert no_leftovers(tmp_path / "bank")
    assert set(kinds(verify(tmp_path / "bank", KEYS)).values()) == {"failed"}
    # A second import changes nothing.
    bank = contents(tmp_path / "bank")
    again = imported(pickles, tmp_path / "bank", layout, listed=KEYS, size_of=lambda _: (640, 480))
    assert (again.written.features, again.written.already_done) == (0, len(opened))
    assert contents(tmp_path / "bank") == bank


def test_ezhois_reader_reads_an_imported_bank(pickles: Path, tmp_path: Path) -> None:
    imported(pickles, tmp_path / "bank", listed=KEYS)
    for key in open_bank(tmp_path / "bank"):
        with open(tmp_path / "bank" / f"{key.split('.')[0]}_clip.pkl", "rb") as file:
            tokens = pickle.load(file)
        assert tokens.dtype == torch.float32 and tokens.is_contiguous() and not tokens.requires_grad
        assert tokens.untyped_storage().nbytes() == tokens.nbytes


def test_without_a_list_keys_are_file_names(pickles: Path, tmp_path: Path) -> None:
    imported(pickles, tmp_path / "bank")
    opened = open_bank(tmp_path / "bank")
    assert "photo_11" in opened
    with pytest.raises(BankError, match="size of 'photo_11' is not known"):
        opened.transform("photo_11")


def test_names_that_no_image_has_are_left_out(tmp_path: Path) -> None:
    """EZ-HOI cuts names at their first dot: it could never find these."""
    names = ["a_clip.pkl", "a.b_clip.pkl", "_clip.pkl", "sub/_clip.pkl", ".._clip.pkl"]
    (tmp_path / "pickles/sub").mkdir(parents=True)
    for number, name in enumerate(names):
        (tmp_path / "pickles" / name).write_bytes(pickle.dumps(torch.full((16, 32), float(number + 2))))
    assert kinds(verify(tmp_path / "pickles")) == dict.fromkeys(names[1:], "extra")
    imported(tmp_path / "pickles", tmp_path / "bank")
    opened = open_bank(tmp_path / "bank")
    assert list(opened) == ["a"]
    assert opened["a"][0, 0] == 2


def test_pickles_of_another_model_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "pickles").mkdir()
    for name, shape in (("a", (511,)), ("b", (196, 512)), ("c", (16, 32))):
        (tmp_path / f"pickles/{name}_clip.pkl").write_bytes(pickle.dumps(torch.randn(shape)))
    done = imported(tmp_path / "pickles", tmp_path / "bank")
    assert list(open_bank(tmp_path / "bank")) == ["c"]
    reasons = {finding.name: finding.reason for finding in done.left_out}
    assert "stock `clip`" in reasons["a"]
    assert "expected is (16, 32)" in reasons["b"]


def test_unusable_pickles_of_no_listed_image_are_not_recorded(pickles: Path, tmp_path: Path) -> None:
    """Nothing could ever make them: a bank that lists them as failed would never be complete."""
    (pickles / "junk_clip.pkl").write_bytes(b"junk")
    done = imported(pickles, tmp_path / "bank", listed=KEYS)
    assert "junk" in {finding.name for finding in done.left_out}
    assert set(open_bank(tmp_path / "bank").failures) == {*LEFT_OUT, KEYS[-1]}


@pytest.mark.parametrize("listed", [None, KEYS])
def test_pickles_of_which_none_is_usable_write_nothing(tmp_path: Path, listed: list[str] | None) -> None:
    """A bank without features would refuse the right model."""
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/photo_00_clip.pkl").write_bytes(b"junk")
    with pytest.raises(BankError, match=r"None of the pickles in .* is usable.* photo_00.*: cut short"):
        imported(tmp_path / "pickles", tmp_path / "bank", listed=listed)
    for number in range(3):
        (tmp_path / f"pickles/photo_0{number}_clip.pkl").write_bytes(pickle.dumps(torch.randn(576, 768)))
    cause = r"of shape \(576, 768\), and tiny's is \(16, 32\): give model ViT-L/14@336px"
    with pytest.raises(BankError, match=cause):
        imported(tmp_path / "pickles", tmp_path / "bank", listed=listed)
    assert not (tmp_path / "bank").exists()


def test_an_error_that_may_pass_writes_nothing(pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable(monkeypatch, "photo_12_clip.pkl")
    with pytest.raises(BankError, match=r"could not be read.*Nothing was written"):
        imported(pickles, tmp_path / "bank", listed=KEYS)
    assert not (tmp_path / "bank").exists()


def test_a_pickle_that_changes_after_the_check_is_examined_again(tmp_path: Path) -> None:
    source = tmp_path / "pickles"
    write_bank(source, tokens_of(KEYS[:2]), {})

    def confirm(_: object) -> Manifest:
        numbers = torch.ones(16, 32)
        numbers[0, 0] = 2
        numbers[3] = 0
        (source / pickle_name(KEYS[0])).write_bytes(pickle.dumps(numbers))
        return tiny_manifest()

    done = import_pickles(source, tmp_path / "bank", tiny_manifest(), KEYS[:2], confirm=confirm)
    assert "tokens" in done.written.damaged[KEYS[0]]
    assert set(open_bank(tmp_path / "bank")) == {KEYS[1]}


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
def test_a_stopped_import_continues_to_the_same_bytes(
    pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    imported(pickles, tmp_path / "whole", layout, listed=KEYS)
    monkeypatch.setattr("patchbank.bank.convert._AT_ONCE", 2)
    steps = 0
    while True:
        stop = Event()
        done = imported(
            pickles, tmp_path / "bank", layout, listed=KEYS, stop=stop, writing=lambda *_, stop=stop: stop.set()
        )
        steps += 1
        if not done.written.remaining:
            break
    assert steps > 3
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")


def test_sound_pickles_of_a_lost_index_need_no_fix(tmp_path: Path) -> None:
    write_bank(tmp_path / "pickles", {key: TOKENS[key] for key in KEYS[:3]}, {})
    (tmp_path / "pickles/index").mkdir()  # empty: what is there is no bank, and its pickles are unlisted
    done = imported(tmp_path / "pickles", tmp_path / "bank")
    assert (done.written.features, done.fixed, done.left_out) == (3, [], [])


def test_what_cannot_be_imported(pickles: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="is the source itself, or in it"):
        imported(pickles, pickles / "bank")
    imported(pickles, tmp_path / "bank", listed=KEYS)
    with pytest.raises(BankError, match=r"is a bank of patchbank already.*patchbank convert"):
        imported(tmp_path / "bank", tmp_path / "again")
    with pytest.raises(BankError, match="nothing to verify"):
        (tmp_path / "empty").mkdir()
        imported(tmp_path / "empty", tmp_path / "again")
