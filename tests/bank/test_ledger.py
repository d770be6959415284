"""The ledger: nothing committed is ever lost, whoever tidies up when, and its bytes depend on its content alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import threading
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbank.bank.ledger import Entry, Ledger, join, parse_lines, read_ledger
from patchbank.errors import BankError
from tests.support import contents


def done(key: str) -> Entry:
    return Entry(key, (640, 480), "ab" * 32)


def open_ledger(directory: Path) -> Ledger:
    return Ledger(directory, Path(tempfile.mkdtemp(prefix=".scratch-", dir=directory)))


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.append([done("b"), Entry("a", failure="the file is empty")])
    ledger.append([done("ümlaut/\udcff.jpg")])
    assert read_ledger(tmp_path) == {
        "a": Entry("a", failure="the file is empty"),
        "b": done("b"),
        "ümlaut/\udcff.jpg": done("ümlaut/\udcff.jpg"),
    }


@given(st.permutations(range(12)), st.integers(1, 5), st.integers(1, 3))
def test_the_order_of_commits_leaves_no_trace(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], size: int, writers: int
) -> None:
    directory = tmp_path_factory.mktemp("ledger")
    ledgers = [open_ledger(directory) for _ in range(writers)]
    for turn, start in enumerate(range(0, len(order), size)):
        ledgers[turn % writers].append([done(f"key{number}") for number in order[start : start + size]])
    for ledger in ledgers:
        ledger.compact()
    plain = tmp_path_factory.mktemp("plain")
    single = open_ledger(plain)
    single.append([done(f"key{number}") for number in range(12)])
    single.compact()
    assert contents(directory) == contents(plain)
    assert len(contents(directory)) == 1


def test_the_later_word_counts(tmp_path: Path) -> None:
    """Whatever a later run finds out replaces what was known; a mended image leaves no trace of its failure."""
    ledger = open_ledger(tmp_path)
    ledger.append([Entry("a", failure="missing"), Entry("b", failure="missing"), done("c"), done("d"), done("e")])
    ledger = open_ledger(tmp_path)
    other = Entry("d", (1, 1), "cd" * 32)
    ledger.append([done("a"), Entry("b", failure="empty"), Entry("c", failure="missing"), other, done("e")])
    for step in range(2):
        found = read_ledger(tmp_path)
        assert found["a"] == done("a")
        assert found["b"].failure == "empty"
        assert found["c"].failure == "missing"
        assert found["d"].sha256 == "cd" * 32
        assert found["e"] == done("e")
        ledger.compact()
        assert len(list((tmp_path / "index").iterdir())) == 1 or step == 0


entries = st.builds(
    lambda key, failed, number, revision: (
        Entry(key, failure=f"reason {number}", revision=revision)
        if failed
        else Entry(key, (1, 1), f"{number}" * 64, revision=revision)
    ),
    st.sampled_from("abc"),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2),
)


@given(st.lists(st.lists(entries, max_size=5), max_size=5), st.randoms())
def test_joining_has_no_order(lists: list[list[Entry]], random: Random) -> None:
    """Two processes that tidy up at once must come to the same result, or each would delete the other's."""
    first: dict[str, Entry] = {}
    for some in lists:
        join(first, some)
    random.shuffle(lists)
    second: dict[str, Entry] = {}
    for some in [*lists, *lists]:
        random.shuffle(some)
        join(second, some)
    assert first == second


def test_two_that_tidy_up_what_the_other_wrote_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst interleaving: both read the same files, both write, and only then both delete."""
    seed = open_ledger(tmp_path)
    seed.append([done(f"k{number:03}") for number in range(100)] + [Entry("bad", failure="missing")])
    first = open_ledger(tmp_path)
    second = open_ledger(tmp_path)
    second.append([Entry("bad", failure="the file is empty"), done("of the second")])
    first.append([done("of the first")])
    meeting = threading.Barrier(2, timeout=5)
    write = Ledger._write

    def write_and_wait(self: Ledger, entries: dict[str, Entry]) -> Path:
        path = write(self, entries)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait()
        return path

    monkeypatch.setattr(Ledger, "_write", write_and_wait)
    threads = [threading.Thread(target=ledger.compact) for ledger in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    found = read_ledger(tmp_path)
    assert len(found) == 103
    assert found["bad"].failure == "the file is empty"


def test_more_entries_than_one_growing_file_holds(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    keys = [f"{number:05}" for number in range(3300)]
    for start in range(0, len(keys), 300):
        ledger.append([done(key) for key in keys[start : start + 300]])
        assert sorted(read_ledger(tmp_path)) == keys[: start + 300]
    assert 2 < len(list((tmp_path / "index").iterdir())) < 6  # neither one that is written anew each time, nor eleven
    ledger.compact()
    assert sorted(read_ledger(tmp_path)) == keys
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_a_damaged_file_is_an_error_to_a_reader_and_is_made_anew_by_a_writer(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.append([done("a"), done("b")])
    [path] = (tmp_path / "index").iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BankError, match="damaged"):
        read_ledger(tmp_path)
    assert read_ledger(tmp_path, damaged="skip") == {}
    assert path.exists()
    assert open_ledger(tmp_path).entries == {}
    assert not path.exists()


def test_a_key_cannot_lead_out_of_the_bank() -> None:
    with pytest.raises(ValueError, match="lead out"):
        parse_lines(b'{"key": "../other_bank/a.jpg", "size": [1, 1], "sha256": ""}')


def _write(directory: Path, name: str, count: int) -> None:
    ledger = open_ledger(directory)
    for number in range(count):
        ledger.append([done(f"{name}-{number}")])
        if number % 7 == 0:
            ledger.compact()
    ledger.compact()


def test_processes_that_write_and_tidy_up_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, name, 60)) for name in "abcd"]
    for writer in writers:
        writer.start()
    seen: set[str] = set()
    while any(writer.is_alive() for writer in writers):
        now = set(read_ledger(tmp_path))
        assert seen <= now, "a reader saw an entry vanish"
        seen = now
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    expected = {f"{name}-{number}" for name in "abcd" for number in range(60)}
    assert set(read_ledger(tmp_path)) == expected
    open_ledger(tmp_path).compact()
    assert len(list((tmp_path / "index").iterdir())) == 1
