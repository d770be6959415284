"""What must hold for a bank after any fault, before anything fixes it."""

from __future__ import annotations

from pathlib import Path

from patchbank import open_bank
from patchbank.bank.check import verify
from patchbank.bank.parts import find_payload
from tests.support import contents


def sound_keys(bank: Path, expected: dict[str, str], broken: set[str]) -> set[str]:
    """Assert that a bank is a sound part of the one expected; the keys of its features.

    No partial file has a final name: every pickle has the bytes of the uninterrupted run, and so has every shard of
    the same name; any other shard is whole, and its features have their checksums. The index lists no missing feature.
    Only images that fail in an uninterrupted run have failed.

    Args:
        expected: the uninterrupted bank's `contents`.
        broken: keys of images that cannot be read.
    """
    for name, sha256 in contents(bank).items():
        if name in expected:
            assert sha256 == expected[name], f"{name} is partial"
        else:
            assert name.startswith((".patchbank-tmp-", "index/", "shard-")), f"{name} is unknown"
    payload = find_payload(bank)
    if payload is None:
        return set()
    allowed = {"failed", "unlisted"} | ({"missing"} if payload.layout == "shards" else set())  # shards not written yet
    wrong = [finding for finding in verify(bank).findings if finding.kind not in allowed]
    assert wrong == []
    opened = open_bank(bank)
    assert set(opened.failures) <= broken
    return set(opened)
