"""Durability: what is flushed to the disk, and in which order; and what a failing disk leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

from patchbank import open_bank
from patchbank.bank import pickles, writer
from patchbank.bank.check import verify
from patchbank.bank.manifest import Manifest
from patchbank.bank.payload import Feature
from patchbank.bank.pickling import to_pickle
from patchbank.bank.writer import BankWriter
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from tests.support import no_leftovers, tiny_manifest

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
    fsync, rename, link = os.fsync, os.rename, os.link

    def logged_fsync(descriptor: int) -> None:
        log.append(("fsync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", f"{source} -> {target}"))
        rename(source, target)

    def logged_link(source: Path, target: Path) -> None:
        log.append(("rename", f"{source} -> {target}"))
        link(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc shows a descriptor's file")
    with BankWriter(tmp_path / "bank", manifest, KEYS) as bank:
        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "rename", logged_rename)
        monkeypatch.setattr(os, "link", logged_link)
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


@pytest.mark.parametrize(("call", "at"), [*product(["write", "fsync", "link"], range(3)), ("rename", 0)])
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
        abandoned = bank / ".patchbank-tmp-abandoned"
        abandoned.mkdir()
        (abandoned / "0.part").write_bytes(b"half a file")
        with BankWriter(bank, manifest, KEYS):
            assert live.exists()
            assert not abandoned.exists()
        first.add(features("a.jpg"), [])
    assert no_leftovers(bank)


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


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("leftover", [False, True])
@pytest.mark.parametrize("values", [(2.0, 3.0), (3.0, 2.0)])
def test_runs_at_once_of_other_last_bits(
    tmp_path: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    killed: bool,
    leftover: bool,
    values: Sequence[float],
) -> None:
    """One run commits a feature at any instant of another's commit, which may be killed then: the index is true."""
    first, second, third = values[0], values[1], 4.0

    def of(value: float) -> list[Feature]:
        return [Feature("a.jpg", {"patch_tokens": torch.full((16, 32), value) + torch.arange(32)}, (640, 480))]

    calls = {name: getattr(os, name) for name in ("link", "rename", "fsync", "unlink")}
    for instant in range(100):
        bank, left = tmp_path / f"{instant}", instant
        one, other = BankWriter(bank, manifest, KEYS), BankWriter(bank, manifest, KEYS)

        def step(name: str, *arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == -1:
                other.add(of(second), [])  # noqa: B023
                other.__exit__(None, None, None)  # noqa: B023
                if killed:
                    raise KeyboardInterrupt
            return calls[name](*arguments, **options)

        with suppress(KeyboardInterrupt), one:
            other.__enter__()
            if leftover:
                (bank / "a_clip.pkl").write_bytes(b"".join(to_pickle(of(third)[0].outputs["patch_tokens"])))
            with monkeypatch.context() as patch:
                for name in calls:
                    patch.setattr(os, name, partial(step, name))
                one.add(of(first), [])
        if left >= 0:
            other.__exit__(None, None, None)
        assert {*verify(bank).by_kind()} <= {"missing", "failed"}, instant
        with BankWriter(bank, manifest, KEYS) as again:
            if "a.jpg" not in again.done:
                again.add(of(first), [])
        assert not verify(bank).problems, instant
        if left >= 0:
            break
    assert instant > 3
