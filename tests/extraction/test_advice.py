"""A run advises something that is possible, and not done yet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patchbank import ExtractConfig
from patchbank.encoders import device as device_module
from patchbank.extraction import advice
from tests.support import tiny_manifest


@pytest.mark.parametrize(
    ("bound", "changes", "advised"),
    [
        ("decode", {"workers": 1}, "--workers 6"),
        ("decode", {}, "--decode fast (in a new bank)"),
        ("decode", {"workers": 6}, "--decode fast (in a new bank)"),
        ("decode", {"decode": "fast"}, "more cores, or --partition on several machines"),
        ("write", {}, "--dtype float16 --layout shards for half the bytes (in a new bank)"),
        (None, {}, None),
    ],
)
def test_advice(
    monkeypatch: pytest.MonkeyPatch, bound: str | None, changes: dict[str, object], advised: str | None
) -> None:
    monkeypatch.setattr(advice, "auto_workers", lambda: 6)
    config = ExtractConfig(model="tiny", **changes)  # type: ignore[arg-type]
    assert advice.advise(bound, tiny_manifest(), config) == advised


@pytest.mark.parametrize(
    ("device", "precision", "has", "advised"),
    [
        ("cpu", "fp32", True, "--precision bf16"),
        ("cpu", "fp32", False, "a GPU"),
        ("cpu", "bf16", True, "a GPU"),
        ("cuda", "fp32", True, "--precision fp16"),
        ("cuda", "fp16", True, "--compile on"),
    ],
)
def test_a_slow_encoder(monkeypatch: pytest.MonkeyPatch, device: str, precision: str, has: bool, advised: str) -> None:
    monkeypatch.setattr(device_module, "has_bfloat16", lambda: has)
    manifest = tiny_manifest()
    manifest = replace(manifest, device=device, identity={**manifest.identity, "precision": precision})
    found = advice.advise("encode", manifest, ExtractConfig(model="tiny"))
    assert found is not None and found.startswith(advised)
