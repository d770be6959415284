"""Disks that fill up, fail, or go away while a run needs them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import pytest

from patchbank import extract, load_dataset, open_bank
from patchbank.datasets import Sample
from patchbank.datasets.sources import Directory
from patchbank.errors import BankError, DatasetError
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute, load_runner
from tests.faults.conftest import BROKEN, Extraction, Short, in_shards
from tests.faults.processes import Calls, Run, run
from tests.faults.soundness import sound_keys
from tests.support import contents, no_leftovers


class FillingDisk:
    """A disk that takes so many writes, flushes, new names and directories, and then no more.

    Attributes:
        left: how many it still takes.
        full: whether it has refused one.
    """

    def __init__(self, left: int) -> None:
        self.left = left
        self.full = False
        self._lock = threading.Lock()  # several threads write

    def take(self) -> None:
        """Take one more. Raises OSError where the disk is full."""
        with self._lock:
            self.left -= 1
            if self.left < 0:
                self.full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """While entered, this process writes to it."""

        def taking(call: Callable[..., Any]) -> Callable[..., Any]:
            def taken(*arguments: Any, **options: Any) -> Any:
                self.take()
                return call(*arguments, **options)

            return taken

        def opened(path: Path, mode: str = "r", **options: Any) -> Any:
            file = open(path, mode, **options)  # noqa: SIM115  # the caller closes it
            return _Filling(file, self) if "w" in mode else file

        with ExitStack() as stack:
            for name in ("fsync", "rename", "link", "mkdir"):
                stack.enter_context(mock.patch.object(os, name, taking(getattr(os, name))))
            stack.enter_context(mock.patch("patchbank.files.open", opened, create=True))
            yield


class _Filling:
    """A file on such a disk, open for writing: the write that fills it gets half of its bytes there."""

    def __init__(self, file: Any, disk: FillingDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, content: memoryview) -> int:
        try:
            self._disk.take()
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        written: int = self._file.write(content)
        return written

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number

    def __enter__(self) -> _Filling:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def test_a_disk_that_is_full_at_any_write(short: Short, tmp_path: Path) -> None:
    """Full at the first write, the second, and so on to none: one error that says so, nothing partial, and the same
    call goes on to the same bytes."""
    dataset = load_dataset("folder", short.images)
    plan = make_plan(dataset, tmp_path / "bank", short.config)
    runner = load_runner(plan)
    for count in range(1000):
        bank = tmp_path / f"bank{count}"
        disk = FillingDisk(count)
        try:
            with disk.mounted():
                summary = execute(replace(plan, out=bank), runner)
        except BankError as error:
            assert "The disk is full" in str(error)
            assert "run the same command again" in str(error)
        else:
            if not disk.full:
                break
            # The features are complete; only the run log is missing, and a note says so.
            assert any("run log" in note and "could not be written" in note for note in summary.notes)
            assert contents(bank) == short.expected
        assert disk.full
        assert not bank.exists() or no_leftovers(bank)
        sound_keys(bank, short.expected, {"photo_0003a.jpg"})
        execute(replace(plan, out=bank), runner)
        assert contents(bank) == short.expected
        shutil.rmtree(bank)
    assert not disk.full
    assert count > 15, "it was not the disk that was written to"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cpu:0,1", marks=pytest.mark.full)])
def test_a_file_that_may_not_grow(device: str, extraction: Extraction, tmp_path: Path) -> None:
    """A limit that the kernel keeps stands in for the disk: the index outgrows it, a shard at once.

    The index of one device grows through the run; those of two have a unit each, and outgrow it when they are joined.
    """
    bank, output = tmp_path / "bank", tmp_path / "printed"
    printed = run(output, *extraction.to(bank), "--device", device, check=2, limits={resource.RLIMIT_FSIZE: 6_000})
    assert "The disk is full" in printed
    assert "run the same command again" in printed
    assert no_leftovers(bank)
    kept = sound_keys(bank, extraction.expected, BROKEN)
    if extraction.layout == "shards":
        assert not kept
    elif device == "cpu":
        assert 0 < len(kept) < extraction.count
    else:
        assert len(kept) == extraction.count
    run(output, *extraction.to(bank), "--device", device, check=1)
    assert contents(bank) == extraction.expected


@in_shards
def test_images_that_disappear_and_come_back(extraction: Extraction, tmp_path: Path) -> None:
    """Exit code 2 and the directory's name; no image is said to have failed; the same command goes on afterwards."""
    images, bank, output = tmp_path / "images", tmp_path / "bank", tmp_path / "printed"
    shutil.copytree(extraction.images, images)
    command = tuple(images if each == str(extraction.images) else each for each in extraction.to(bank))
    # When the 20th image is opened: those behind are not decoded ahead then, however slow the disk is.
    process = Run(output, *command, pause_after=Calls(20, Directory, "content")).paused()
    images.rename(tmp_path / "elsewhere")
    process.send(signal.SIGCONT)
    assert process.wait() == 2, process.printed
    assert str(images) in "".join(process.printed.split())
    assert no_leftovers(bank)
    assert 0 < len(sound_keys(bank, extraction.expected, BROKEN)) < extraction.count
    (tmp_path / "elsewhere").rename(images)
    assert "already there" in run(output, *command, check=1)
    assert contents(bank) == extraction.expected


def emptied(images: Path) -> None:
    """What is left where a disk was mounted."""
    images.rename(images.with_name("elsewhere"))
    images.mkdir()


def replaced(images: Path) -> None:
    """A directory that nothing can be looked up in."""
    images.rename(images.with_name("elsewhere"))
    images.write_bytes(b"")


@pytest.mark.parametrize("take_away", [emptied, replaced, lambda images: images.rename(images.with_name("elsewhere"))])
def test_images_whose_disk_is_unmounted(short: Short, tmp_path: Path, take_away: Callable[[Path], object]) -> None:
    """An empty mount point in the place of the images is no set of missing images."""
    images, bank = tmp_path / "images", tmp_path / "bank"
    shutil.copytree(short.images, images)
    taken = False

    def take(*_: object) -> None:
        nonlocal taken
        if not taken:
            taken = True
            take_away(images)

    # The second batch waits until the first has been committed, so that its images are never reached.
    content, first = Directory.content, sorted(path.name for path in images.iterdir())[:4]
    gone = threading.Event()

    def waiting(source: Directory, sample: Sample) -> Path | BinaryIO:
        if sample.key not in first and not gone.is_set():
            take()
            gone.set()
        return content(source, sample)

    with mock.patch.object(Directory, "content", waiting), pytest.raises(DatasetError, match="is gone") as raised:
        extract(load_dataset("folder", images), bank, short.config)
    assert str(images) in str(raised.value)
    assert taken
    sound_keys(bank, short.expected, {"photo_0003a.jpg"})
    shutil.rmtree(images, ignore_errors=True)
    images.unlink(missing_ok=True)
    (tmp_path / "elsewhere").rename(images)
    assert not extract(load_dataset("folder", images), bank, short.config).remaining
    assert contents(bank) == short.expected


class FailingFile(BytesIO):
    """A file that can be opened and identified, and whose second half the disk cannot read."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or self.tell() + size > len(self.getvalue()) // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_image_that_cannot_be_read_just_now(short: Short, tmp_path: Path, number: int) -> None:
    """At its first byte or in the middle, it fails with the disk's reason, and all others succeed; the next run
    extracts it, and the bank ends as if it had never failed."""
    dataset, bank = load_dataset("folder", short.images), tmp_path / "bank"
    content = Directory.content

    def failing(source: Directory, sample: Sample) -> Path | BinaryIO:
        if sample.key == "photo_0001.jpg":
            raise OSError(number, os.strerror(number))
        if sample.key == "photo_0004.jpg":
            return FailingFile(sample.path.read_bytes())
        return content(source, sample)

    with mock.patch.object(Directory, "content", failing):
        summary = extract(dataset, bank, short.config)
    reasons = {"photo_0001.jpg": os.strerror(number), "photo_0004.jpg": os.strerror(errno.EIO)}
    assert summary.failures == reasons | {"photo_0003a.jpg": "the file is empty"}
    assert open_bank(bank).failures == summary.failures
    assert len(open_bank(bank)) == 4
    assert extract(dataset, bank, short.config).images == 2
    assert contents(bank) == short.expected
