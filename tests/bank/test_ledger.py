"""The ledger: nothing committed is ever lost, whoever tidies up when, and its bytes depend on its content alone."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbank.bank.ledger import Entry, Ledger, parse_lines, read_ledger
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


def test_a_feature_wins_over_a_failure_and_a_later_reason_over_an_earlier(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.append([Entry("a", failure="missing"), Entry("b", failure="missing"), done("c")])
    ledger = open_ledger(tmp_path)
    ledger.append([done("a"), Entry("b", failure="the file is empty"), Entry("c", failure="missing")])
    ledger.compact()
    assert read_ledger(tmp_path) == {
        "a": done("a"),
        "b": Entry("b", failure="the file is empty"),
        "c": done("c"),
    }


def test_more_entries_than_one_growing_file_holds(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    keys = [f"{number:05}" for number in range(3300)]
    for start in range(0, len(keys), 300):
        ledger.append([done(key) for key in keys[start : start + 300]])
        assert sorted(read_ledger(tmp_path)) == keys[: start + 300]
    assert 2 < len(list(tmp_path.glob("index-*"))) < 6  # neither one that is written anew each time, nor eleven
    ledger.compact()
    assert sorted(read_ledger(tmp_path)) == keys
    assert len(list(tmp_path.glob("index-*"))) == 1


def test_keys_can_be_forgotten(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.append([done("a"), done("b")])
    ledger = open_ledger(tmp_path)
    ledger.compact(forget=["a"])
    assert set(read_ledger(tmp_path)) == {"b"}


def test_a_damaged_file_is_an_error_to_a_reader_and_is_made_anew_by_a_writer(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.append([done("a"), done("b")])
    [path] = tmp_path.glob("index-*.jsonl")
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
    assert len(list(tmp_path.glob("index-*"))) == 1
