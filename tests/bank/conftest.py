"""What several files of tests about banks read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from patchbank import ExtractConfig, extract, load_dataset
from tests.support import photographs


@pytest.fixture(scope="module")
def banks(tiny_config: ExtractConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bank in each layout, of seven photographs and an unreadable picture."""
    root = tmp_path_factory.mktemp("banks")
    photographs(root / "images", 7)
    (root / "images/a.jpg").write_bytes(b"")
    for layout in ("ezhoi", "shards"):
        config = replace(tiny_config, layout=layout, shard_size=3 * 2176)  # type: ignore[arg-type]
        extract(load_dataset("folder", root / "images"), root / layout, config)
    return root
