"""Durability: what is flushed to the disk, and in which order; and what a failing disk leaves."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from patchbank import open_bank
from patchbank.bank import pickles, writer
from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.files import live_scratches
from tests.support import abandoned_scratch, contents, no_leftovers, tiny_manifest

KEYS = ["a.jpg", "sub/b.jpg", "b.jpg", "c.jpg", "before.jpg"]


@pytest.fixture
def manifest() -> Manifest:
    return tiny_manifest()


def features(*keys: str) -> list[Feature]:
    return [Feature(key, {"patch_tokens": torch.full((16, 32), float(len(key)))}, (640, 480)) for key in keys]


def test_a_feature_is_on_the_disk_before_its_name_and_its_name_before_the_index(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", f"{source} -> {target}"))
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc shows a descriptor's file")
    with BankWriter(tmp_path / "bank", manifest, KEYS) as bank:
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "rename", logged_rename)
        bank.add(features("a.jpg", "sub/b.jpg"), [Failure("c.jpg", "missing")])
        monkeypatch.undo()

    def position(kind: str, text: str) -> int:
        return next(number for number, (what, path) in enumerate(log) if what == kind and text in path)

    directory = str(tmp_path / "bank")
    part = position("rename", f"-> {directory}/index/")
    for name in ("a_clip.pkl", "sub/b_clip.pkl"):
        named = position("rename", f"-> {directory}/{name}")
        temporary = log[named][1].split(" -> ")[0]
        assert position("fsync", temporary) < named < part
    synced = [path for kind, path in log[:part] if kind == "fsync"]
    assert {directory, f"{directory}/sub"} <= set(synced)
    assert log[-1] == ("fsync", f"{directory}/index")  # the name of the part


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failing_disk_is_one_error_and_the_index_stays_true(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    """The k-th call of its kind fails within a commit: no feature is half written, and only whole ones are listed."""
    bank = BankWriter(tmp_path / "bank", manifest, KEYS)
    count = 0

    def failing(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    with pytest.raises(BankError, match="The disk is full"), bank:
        bank.add(features("before.jpg"), [])
        if call == "write":
            original = pickles.write_and_sync
            monkeypatch.setattr(pickles, "write_and_sync", failing)
            monkeypatch.setattr(writer, "write_and_sync", failing)
        else:
            original = getattr(os, call)
            monkeypatch.setattr(os, call, failing)
        bank.add(features("a.jpg", "b.jpg", "c.jpg"), [])
    monkeypatch.undo()
    assert no_leftovers(tmp_path / "bank")
    with BankWriter(tmp_path / "bank", manifest, KEYS) as bank:
        assert bank.done == {"before.jpg"}
    sizes = {path.stat().st_size for path in (tmp_path / "bank").glob("*_clip.pkl")}
    assert len(sizes) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_in_which_a_disk_is_full(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pickles, "write_and_sync", failing)
    with pytest.raises(BankError, match="The disk is full"), BankWriter(tmp_path, manifest, KEYS) as bank:
        bank.add(features("a.jpg"), [])


def test_another_bank_that_came_before_the_writer_was_entered(tmp_path: Path, manifest: Manifest) -> None:
    other = replace(manifest, identity={**manifest.identity, "weights": "1" * 64})
    late = BankWriter(tmp_path, other, KEYS)
    with BankWriter(tmp_path, manifest, KEYS) as bank:
        bank.add(features("a.jpg"), [])
    before = contents(tmp_path)
    with pytest.raises(BankError, match="weights"), late:
        pytest.fail("entered")
    assert contents(tmp_path) == before


def test_what_a_writer_has_committed_is_in_its_state(tmp_path: Path, manifest: Manifest) -> None:
    """A later outcome of the same sample counts over it."""
    with BankWriter(tmp_path, manifest, KEYS) as bank:
        bank.add([], [Failure("a.jpg", "z")])
        assert bank.state.failed == {"a.jpg": "z"}
        bank.add([], [Failure("a.jpg", "b")])
    assert open_bank(tmp_path).failures == {"a.jpg": "b"}


def test_a_disk_without_inodes_says_so(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    status = [*os.statvfs(tmp_path)]
    status[5:8] = 1000, 0, 0  # f_files, f_ffree, f_favail

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bank = BankWriter(tmp_path, manifest, KEYS)
    with pytest.raises(BankError, match="; no inodes free"), bank:
        monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(status))
        monkeypatch.setattr(pickles, "write_and_sync", full)
        bank.add(features("a.jpg"), [])


def test_live_scratch_stays_and_abandoned_scratch_is_removed(tmp_path: Path, manifest: Manifest) -> None:
    bank = tmp_path / "bank"
    with BankWriter(bank, manifest, KEYS) as first:
        [live] = bank.glob(".patchbank-tmp-*")
        abandoned = abandoned_scratch(bank)
        (abandoned / "0.part").write_bytes(b"half a file")
        with BankWriter(bank, manifest, KEYS):
            assert live.exists()
            assert not abandoned.exists()
        first.add(features("a.jpg"), [])
    assert no_leftovers(bank)


def test_only_this_hosts_own_scratch_is_removed(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link is not followed, a user's directory stays, and another host's lock is not visible on every file system."""
    bank, victim = tmp_path / "bank", tmp_path / "victim"
    victim.mkdir()
    named_alike = bank / ".patchbank-tmp-evil"
    named_alike.mkdir(parents=True)
    (named_alike / "mine").write_text("a user's")
    (bank / ".patchbank-tmp-link").symlink_to(victim)
    abandoned = abandoned_scratch(bank)
    link = bank / abandoned.name.replace(abandoned.name[-4:], "0000")
    link.symlink_to(victim)
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "another-host")
        with BankWriter(bank, manifest, KEYS):
            assert live_scratches(bank) == [""]
            assert abandoned.exists()
    with BankWriter(bank, manifest, KEYS):
        assert not abandoned.exists()
    assert (named_alike / "mine").exists()
    assert link.is_symlink() and not [*victim.iterdir()]


def test_a_write_that_fails_does_not_affect_the_writes_of_the_next_call(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads may still be writing for the call that failed."""
    real, opened, gate = pickles.write_and_sync, Event(), Event()

    def write(path: Path, parts: Sequence[bytes]) -> None:
        mark = float(torch.frombuffer(bytearray(parts[1][:4]), dtype=torch.float32))
        if mark == 1:
            opened.wait(10)
            raise OSError(errno.ENOSPC, "No space left on device")
        if mark == 2:  # a slow one of the same call
            with open(path, "wb") as file:
                opened.set()
                gate.wait(10)
                file.writelines(parts)
        else:
            real(path, parts)

    def of(key: str, mark: float) -> Feature:
        return Feature(key, {"patch_tokens": torch.full((16, 32), mark)}, (640, 480))

    monkeypatch.setattr(writer, "_THREADS", 4)
    monkeypatch.setattr(pickles, "write_and_sync", write)
    with BankWriter(tmp_path / "bank", manifest, KEYS) as bank:
        with pytest.raises(BankError, match="full"):
            bank.add([of("a.jpg", 1), of("b.jpg", 2)], [])
        later = Thread(target=bank.add, args=([of("sub/b.jpg", 3), of("c.jpg", 4)], []))
        later.start()
        later.join(10)
        gate.set()
    found = open_bank(tmp_path / "bank")
    for key, mark in (("sub/b.jpg", 3), ("c.jpg", 4)):
        found.check(key)
        assert (found[key] == mark).all()
