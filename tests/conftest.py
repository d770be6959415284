"""Fixtures: the tiny model and its weights, and full-size untrained ones in OpenAI's format."""

from __future__ import annotations

import signal
from pathlib import Path

import hypothesis
import pytest

from patchbank.config import ExtractConfig
from patchbank.encoders.openai.registry import MODELS
from patchbank.encoders.openai.untrained import write_untrained
from tests.support import TINY, TINY_VOCABULARY

hypothesis.settings.register_profile("patchbank", deadline=None, database=None)  # no test depends on time
hypothesis.settings.load_profile("patchbank")


# A job in the background of a shell starts with Ctrl-C ignored, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _register_tiny() -> None:
    MODELS[TINY.name] = TINY


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's untrained weights, as a TorchScript archive."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-weights.pt"
    write_untrained(TINY, path, seed=1, vocabulary=TINY_VOCABULARY)
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_weights: Path) -> ExtractConfig:
    """The tiny model in batches of four, into pickles."""
    return ExtractConfig(model="tiny", weights=tiny_weights, batch_size=4, layout="ezhoi")


@pytest.fixture(scope="session")
def full_size_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViT-B/16's untrained weights, in OpenAI's archive format and size."""
    path = tmp_path_factory.mktemp("full") / "ViT-B-16.pt"
    write_untrained(MODELS["ViT-B/16"], path)
    return path
