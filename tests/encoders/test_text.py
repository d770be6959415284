"""Texts against OpenAI's own package, and the errors if they cannot be encoded."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import clip
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from patchbank.encoders import text
from patchbank.encoders.openai.untrained import is_untrained, untrained_state
from patchbank.errors import ConfigError, WeightsError
from tests.support import TINY, TINY_VOCABULARY, relative_error

TEXTS = ["a person riding a bicycle", "Two CATS, don't you see?", "naïve café, 東京", "x"]


def encode_texts(path: Path, texts: list[str], activation: str = "quickgelu") -> Tensor:
    """As OpenAI's family does."""
    return text.encode_texts(path, texts, settings=text.settings_of(path, activation))


def test_texts_are_encoded_as_by_openais_package(full_size_weights: Path) -> None:
    found = encode_texts(full_size_weights, TEXTS)
    model, _ = clip.load(str(full_size_weights), device="cpu", jit=False)
    with torch.inference_mode():
        expected = model.float().encode_text(clip.tokenize(TEXTS))
    assert found.shape == (len(TEXTS), 512) and found.dtype == torch.float32
    assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(found, expected, strict=True))
    assert relative_error(found[0], expected[1]) > 1e-2


def test_the_activation_is_the_checkpoints(full_size_weights: Path) -> None:
    quick, erf = (encode_texts(full_size_weights, TEXTS, each) for each in ("quickgelu", "gelu"))
    model, _ = clip.load(str(full_size_weights), device="cpu", jit=False)
    for block in model.transformer.resblocks:
        block.mlp.gelu = torch.nn.GELU()
    with torch.inference_mode():
        expected = model.float().encode_text(clip.tokenize(TEXTS))
    assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(erf, expected, strict=True))
    assert all(relative_error(mine, theirs) > 1e-4 for mine, theirs in zip(quick, expected, strict=True))


def test_texts_that_cannot_be_encoded(
    full_size_weights: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = full_size_weights
    with pytest.raises(ConfigError, match="empty"):
        encode_texts(full, ["a dog", " "])
    with pytest.raises(ConfigError, match="90 tokens long, and the text tower takes 75"):
        encode_texts(full, ["dog " * 90])
    visual = {
        name: value for name, value in untrained_state(TINY, vocabulary=TINY_VOCABULARY).items() if "visual" in name
    }
    torch.save(visual, tmp_path / "visual.pt")
    with pytest.raises(WeightsError, match="no text tower"):
        encode_texts(tmp_path / "visual.pt", ["a dog"])
    with pytest.raises(WeightsError, match=rf"vocabulary of {TINY_VOCABULARY:,} tokens, and CLIP's has 49,408"):
        encode_texts(tiny_weights, ["a dog"])
    state = untrained_state(TINY)
    wrong = {"text_projection": torch.ones(3, 5), "ln_final.bias": torch.full((64,), torch.nan)}
    for (name, value), word in zip(wrong.items(), ("no usable text tower", "NaN or Inf"), strict=True):
        torch.save(state | {name: value}, tmp_path / "state.pt")
        with pytest.raises(WeightsError, match=word):
            encode_texts(tmp_path / "state.pt", ["a dog"])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"patchbank\[text\]"):
        encode_texts(full, ["a dog"])


@pytest.mark.parametrize("arch", ["ViT-B-32", "EVA02-B-16"])
def test_open_clips_own_texts(tmp_path: Path, arch: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of both of its classes, from the file of a whole model; nothing is said on the terminal."""
    torch.manual_seed(0)
    small = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
    model = open_clip.create_model(arch, vision_cfg=small).eval()
    state = {f"module.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    capfd.readouterr()
    found = text.encode_texts(tmp_path / "model.safetensors", TEXTS, arch)
    assert capfd.readouterr() == ("", "")
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(arch)(TEXTS))
    assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(found, expected, strict=True))


def test_a_tokenizer_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_file({"visual.a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="open_clip cannot make the text tower of roberta-ViT-B-32"):
        text.encode_texts(tmp_path / "model.safetensors", TEXTS, "roberta-ViT-B-32")


def test_untrained_weights_say_so(tiny_weights: Path, tmp_path: Path) -> None:
    assert is_untrained(tiny_weights)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "text").write_text("no archive")
    assert not any(map(is_untrained, (tmp_path / "other.pt", tmp_path / "text", tmp_path / "none")))
    with zipfile.ZipFile(tmp_path / "huge.pt", "w") as archive:
        for number in range(150):
            archive.writestr(f"x/{number:065000}", b"")  # a directory of 10 MB
        archive.writestr("x/extra/patchbank-untrained", b"")
    assert not is_untrained(tmp_path / "huge.pt")
