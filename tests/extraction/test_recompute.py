"""Features made again, for comparison: with the configuration that the bank was made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from patchbank import ExtractConfig
from patchbank.encoders import trained
from patchbank.errors import WeightsError
from patchbank.extraction.recompute import config_of
from patchbank.files import sha256_of
from tests.support import tiny_manifest


@pytest.mark.parametrize(("rounding", "rounds"), [("none", False), ("float16", True)])
def test_features_are_made_again_with_weights_rounded_as_before(rounding: str, rounds: bool) -> None:
    bank = replace(tiny_manifest(), identity={"rounding": rounding})
    assert config_of(bank, ExtractConfig()).round_weights is rounds


def test_trained_weights_are_those_that_pip_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bank = replace(tiny_manifest(), identity={"model": trained.MODEL, "weights": trained.SHA256})
    with pytest.raises(WeightsError, match="is missing: `patchbank demo` fetches it"):
        config_of(bank, ExtractConfig())
    assert config_of(bank, ExtractConfig(weights=tmp_path / "own.pt")).weights == tmp_path / "own.pt"
    assert config_of(replace(bank, identity={"weights": "another"}), ExtractConfig()).weights is None
    cached = trained.PATH.expanduser()
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    monkeypatch.setattr(trained, "SHA256", sha256_of(cached))
    bank = replace(bank, identity={"model": trained.MODEL, "weights": trained.SHA256})
    assert config_of(bank, ExtractConfig()).weights == cached
