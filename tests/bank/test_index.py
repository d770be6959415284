"""The index: joining has no order, nothing committed is lost, and its bytes depend only on its content."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbank import open_bank
from patchbank.bank.check import verify
from patchbank.bank.index import Entry, join
from patchbank.bank.parts import name_part, payload_of, read_parts
from patchbank.bank.payload import Feature
from patchbank.bank.removal import removable
from patchbank.bank.repair import repair
from patchbank.bank.writer import BankWriter
from patchbank.datasets.samples import Failure
from patchbank.errors import BankError
from patchbank.files import all_plain, is_plain
from tests.support import contents, parts_in, read_part, tiny_manifest

MANIFEST = replace(tiny_manifest(), part_size=5)
KEYS = [f"key{number:03}" for number in range(12)]


def feature(key: str, value: float = 1.0) -> Feature:
    return Feature(key, {"patch_tokens": torch.full((16, 32), value)}, (640, 480))


def write(bank: Path, keys: Iterable[str], failed: Iterable[str] = (), reason: str = "missing") -> None:
    with BankWriter(bank, MANIFEST, KEYS) as writer:
        writer.add([feature(key) for key in keys], [Failure(key, reason) for key in failed])


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


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    """Of a file that other code wrote, or changed: its features are missing, and nothing ends."""
    names = ["a" * 300, "/".join(["b" * 200] * 30), "\ud800"]
    write(tmp_path, [KEYS[0]])
    [part] = parts_in(tmp_path)
    found = read_part(part)
    listed = tuple(found.features[0]._replace(key=name) for name in [*names, KEYS[0]])
    start, name = name_part(payload_of(tmp_path, "ezhoi"), replace(found, features=listed))
    part.unlink()
    part.with_name(name).write_bytes(start)
    assert {finding.name: finding.kind for finding in verify(tmp_path).findings} == dict.fromkeys(names, "missing")
    assert open_bank(tmp_path).bytes_on_disk() == (tmp_path / f"{KEYS[0]}_clip.pkl").stat().st_size
    for name in names:
        with pytest.raises(BankError, match="cannot be read"):
            open_bank(tmp_path)[name]
    assert removable(tmp_path) == [tmp_path / f"{KEYS[0]}_clip.pkl"]
    assert {finding.name for finding in repair(tmp_path).to_extract} == {*names}
    assert [*open_bank(tmp_path)] == [KEYS[0]]


@given(st.lists(st.lists(entries, max_size=5), max_size=5), st.randoms())
def test_joining_has_no_order(lists: list[list[Entry]], random: Random) -> None:
    """Two processes that merge at once must get the same result; otherwise each deletes the other's."""
    first: dict[str, Entry] = {}
    for some in lists:
        join(first, some)
    random.shuffle(lists)
    second: dict[str, Entry] = {}
    for some in [*lists, *lists]:
        random.shuffle(some)
        join(second, some)
    assert first == second


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(12)), st.integers(1, 5), st.integers(1, 3))
def test_the_order_of_commits_leaves_no_trace(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], size: int, writers: int
) -> None:
    bank = tmp_path_factory.mktemp("bank")
    open_writers = [BankWriter(bank, MANIFEST, KEYS).__enter__() for _ in range(writers)]
    for turn, start in enumerate(range(0, len(order), size)):
        open_writers[turn % writers].add([feature(KEYS[number]) for number in order[start : start + size]], [])
    for writer in open_writers:
        writer.__exit__(None, None, None)
    plain = tmp_path_factory.mktemp("plain")
    write(plain, KEYS)
    assert contents(bank) == contents(plain)
    assert len(parts_in(bank)) == 3


def test_of_two_sizes_the_greater_counts_in_any_order() -> None:
    one, other = (Entry("a", size, "0" * 64) for size in ((1, 2), (2, 1)))
    for order in ([one, other], [other, one]):
        entries: dict[str, Entry] = {}
        join(entries, order)
        assert entries["a"] == other


def test_names_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    keys = ["b", "ümlaut/\udcff.jpg"]
    with BankWriter(tmp_path, MANIFEST, keys) as writer:
        writer.add([feature(key) for key in keys], [])
    assert set(open_bank(tmp_path)) == set(keys)


def test_the_later_outcome_counts(tmp_path: Path) -> None:
    """A later run's outcome replaces the known one; an image that succeeds leaves no trace of its failure."""
    write(tmp_path / "bank", KEYS[2:5], KEYS[:2])
    with BankWriter(tmp_path / "bank", MANIFEST, KEYS) as writer:
        changed = [feature(KEYS[0]), feature(KEYS[3], 2.0), feature(KEYS[4])]
        writer.add(changed, [Failure(KEYS[1], "empty"), Failure(KEYS[2], "missing")])
    opened = open_bank(tmp_path / "bank")
    assert opened.failures == {KEYS[1]: "empty", KEYS[2]: "missing"}
    assert opened[KEYS[3]][0, 0] == 2
    [part] = read_parts(payload_of(tmp_path / "bank", "ezhoi"))
    assert {entry.key: entry.revision for entry in part.entries} == dict(zip(KEYS, [0, 1, 1, 1, 0], strict=False))
    write(tmp_path / "once", [KEYS[0], KEYS[4]])
    write(tmp_path / "twice", [KEYS[4]], [KEYS[0]])
    write(tmp_path / "twice", [KEYS[0]])
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_a_damaged_part_is_an_error_to_a_reader_and_quarantined_by_a_writer(tmp_path: Path) -> None:
    write(tmp_path, KEYS)
    path = parts_in(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BankError, match=r"damaged.*patchbank repair"):
        open_bank(tmp_path)
    with BankWriter(tmp_path, MANIFEST, KEYS) as writer:
        assert writer.done == {*KEYS} - {*KEYS[5:10]}
        assert path.name in writer.notes[0]
    assert path.with_name(f"{path.name}.damaged").exists()


def _write(bank: Path, name: str, count: int) -> None:
    keys = [f"{each}-{number:02}" for number in range(count) for each in "abcd"]
    for start in range(0, count, 12):
        with BankWriter(bank, MANIFEST, keys) as writer:
            for number in range(start, min(start + 12, count)):
                writer.add([feature(f"{name}-{number:02}")], [])


def test_processes_that_write_and_merge_at_once_lose_nothing(tmp_path: Path) -> None:
    """They share each part; at its end, each run merges what the others wrote."""
    context = multiprocessing.get_context("spawn")
    count = 48
    _write(tmp_path / "bank", "a", 1)
    writers = [context.Process(target=_write, args=(tmp_path / "bank", name, count)) for name in "abcd"]
    for writer in writers:
        writer.start()
    seen: set[str] = set()
    while any(writer.is_alive() for writer in writers):
        now = set(open_bank(tmp_path / "bank"))
        assert seen <= now, "a reader saw an entry vanish"
        seen = now
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    keys = [f"{each}-{number:02}" for number in range(count) for each in "abcd"]
    assert set(open_bank(tmp_path / "bank")) == set(keys)
    with BankWriter(tmp_path / "whole", MANIFEST, keys) as writer:
        writer.add([feature(key) for key in keys], [])
    with BankWriter(tmp_path / "bank", MANIFEST, keys):
        pass
    assert contents(tmp_path / "bank") == contents(tmp_path / "whole")


@pytest.mark.parametrize("sha256", ["A" * 64, "0" * 63, "0" * 63 + " ", "0" * 65])
def test_checksums_have_one_form(tmp_path: Path, sha256: str) -> None:
    write(tmp_path, [KEYS[0]])
    found = read_part(parts_in(tmp_path)[0])
    listed = (found.features[0]._replace(sha256=sha256),)
    start, name = name_part(payload_of(tmp_path, "ezhoi"), replace(found, features=listed))
    parts_in(tmp_path)[0].unlink()
    (tmp_path / "index" / name).write_bytes(start)
    with pytest.raises(BankError, match="sha256 are not 64 hexadecimal digits"):
        open_bank(tmp_path)


@pytest.mark.parametrize(
    "key", ["a.jpg", "a/b.jpg", "..a/.b", "a..", "", "/a", "a/", "a//b", ".", "a/./b", "..", "a/..", "../a", "a\0"]
)
def test_names_are_judged_together_as_they_are_alone(key: str) -> None:
    assert all_plain(["x", key, "y"]) == all_plain([key]) == is_plain(key)
