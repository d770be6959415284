"""Files of weights that no model's are, for every family that takes one."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from patchbank import encoders
from patchbank.config import ExtractConfig
from patchbank.encoders.weights import _sha256_of_version, first_wrong, opened, sha256_of_weights
from patchbank.errors import WeightsError

MODELS = ("ViT-B/32", "timm/vit_tiny_patch16_224", "open_clip/ViT-B-32")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_without_tensors_is_refused(model: str, suffix: str, tmp_path: Path) -> None:
    """timm would take the hub's weights in their place."""
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({1: torch.ones(1)}, path)
    else:
        save_file({}, path)
    with pytest.raises(WeightsError, match="holds no tensors"):
        encoders.find(ExtractConfig(model=model, weights=path, activation=None if "/vit" in model else "gelu"))


def test_shapes_and_names_that_no_tensor_has(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for name, shape in (("a", [0, 2**62, 2**62]), ("a\nb", [0])):
        head = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head)
        with pytest.raises(WeightsError, match=r"is damaged: it has a tensor a(\\nb)? of the shape"), opened(path):
            pass


def test_a_suffix_in_capitals(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "W.SAFETENSORS")
    with opened(tmp_path / "W.SAFETENSORS") as (shapes, tensor):
        assert shapes == {"a": (2,)} and tensor("a").tolist() == [1, 1]


def test_the_first_wrong_parameter() -> None:
    expected = {"a": (1,), "b": (2, 3)}
    assert first_wrong(expected, expected) == ""
    assert first_wrong(expected, {"a": (1,)}, "visual.") == "visual.b is missing"
    assert first_wrong(expected, {**expected, "a": (2,)}) == "a has the shape (2,), expected (1,)"
    assert first_wrong(expected, {**expected, "d": (), "c": ()}) == "it has 2 more parameters, such as c"


def test_a_file_is_hashed_once_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.pt").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    before = _sha256_of_version.cache_info().misses
    assert sha256_of_weights(Path("state.pt")) == sha256_of_weights(tmp_path / "state.pt")
    assert sha256_of_weights(tmp_path / "state.pt") == hashlib.sha256(b"weights").hexdigest()
    assert _sha256_of_version.cache_info().misses == before + 1
