"""Features made again, for comparison: with the configuration that the bank was made with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patchbank import ExtractConfig
from patchbank.extraction.recompute import config_of
from tests.support import tiny_manifest


@pytest.mark.parametrize(("rounding", "rounds"), [("none", False), ("float16", True)])
def test_features_are_made_again_with_weights_rounded_as_before(rounding: str, rounds: bool) -> None:
    bank = replace(tiny_manifest(), identity={"rounding": rounding})
    assert config_of(bank, ExtractConfig()).round_weights is rounds
