"""The shell's completion of an image's key: quickly, and without a word of its own."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import typer

_MOST, _SECONDS = 200, 0.5  # keys that are proposed, and for how long parts of the index are read


def keys_beginning_with(ctx: typer.Context, incomplete: str) -> list[str]:
    """Some keys of the bank in the same line, in order; none of a bank in an object store, which answers slowly."""
    keys: list[str] = []
    with suppress(Exception):  # there is nobody to tell
        _add_keys(keys, Path(ctx.params["bank"]), incomplete)
    return keys[:_MOST]


def _add_keys(keys: list[str], bank: Path, start: str) -> None:
    from patchbank.bank.parts import find_payload, part_names, read_part
    from patchbank.errors import printable

    if (payload := find_payload(bank)) is None:
        return
    ends = time.monotonic() + _SECONDS
    for name in part_names(payload):
        found = [entry.key for entry in read_part(payload, name).features]
        keys += [key for key in found if key.startswith(start) and printable(key) == key]
        if len(keys) >= _MOST or time.monotonic() > ends:
            return
