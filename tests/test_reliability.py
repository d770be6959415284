"""docs/why/reliability.md names tests that are there."""

from __future__ import annotations

import re

import pytest

from tests.support import REPOSITORY

ROWS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", (REPOSITORY / "docs/why/reliability.md").read_text())


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_every_row_has_its_test(path: str, name: str) -> None:
    assert len(ROWS) > 20
    assert f"\ndef {name}(" in (REPOSITORY / path).read_text()
