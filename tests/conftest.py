"""The two tiers, and fixtures: the tiny model and its weights, and full-size untrained ones in OpenAI's format."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

from patchbank.config import ExtractConfig
from patchbank.encoders import trained
from patchbank.encoders.openai.registry import MODELS
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.errors import PatchbankError
from tests.support import TINY, TINY_VOCABULARY

hypothesis.settings.register_profile("patchbank", deadline=None, database=None)  # no test depends on time
hypothesis.settings.load_profile("patchbank")


# A job in the background of a shell starts with Ctrl-C ignored, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="Run the full tier too: the tests marked `full`.")


_LEFT_OUT = pytest.StashKey[int]()
# Fixtures that put a test into the full tier: Chromium, an S3 server, a Ray cluster, large or trained weights.
_FULL = {"browser", "store", "cluster", "full_size_weights", "trained_weights"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the full tier, unless --all, -m or a test's own name asks for it."""
    for item in items:
        if _FULL & set(getattr(item, "fixturenames", ())):
            item.add_marker("full")
    named = any("::" in argument for argument in config.args)
    if config.option.all or "full" in config.option.markexpr or named:
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[_LEFT_OUT] = len(left_out)
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist's
        config.workeroutput["left_out"] = len(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each process of pytest-xdist's collects all tests."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} tests of the full tier left out: `pytest --all` runs them.")


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


@pytest.fixture(scope="session")
def trained_weights(request: pytest.FixtureRequest) -> Path:
    """A trained DINOv2 ViT-S/14 as timm's state dict, kept between runs."""
    path = request.config.cache.mkdir("trained") / trained.PATH.name
    try:
        with FileLock(path.with_suffix(".lock")):  # once, not in each process of pytest-xdist's
            return trained.obtain(path)
    except PatchbankError as error:
        pytest.skip(f"no trained weights: {error}")
