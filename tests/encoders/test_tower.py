"""The tower with LAION's and DataComp's activation, against open_clip on the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from patchbank.config import Activation
from patchbank.encoders.openai import OpenAISpec, tower
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual, resolve_activation
from patchbank.encoders.openai.registry import MEAN, MODELS, STD, Model
from patchbank.encoders.openai.untrained import untrained_state
from patchbank.preprocess import preprocess
from tests.reference.open_clip_tower import open_clip_tower
from tests.support import TINY, TINY_VOCABULARY, photographs, relative_error

BOUND = 2e-6


def photograph_pixels(directory: Path, model: Model, count: int) -> Tensor:
    """(count, n, n, 3) uint8."""
    images = [Image.open(directory / name) for name in photographs(directory, count)]
    return torch.stack([torch.from_numpy(preprocess(image, OpenAISpec(model).input).copy()) for image in images])


def peer(model: Model, act_layer: type[nn.Module]) -> VisionTransformer:
    """open_clip's image tower; ViT-B/16 by its name there, which means GELU."""
    if model.name == "ViT-B/16":
        return open_clip.create_model("ViT-B-16", pretrained=None).visual
    return open_clip_tower(model, act_layer)


def peer_tokens(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    """Every token after ``ln_post`` and ``proj``."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return visual.ln_post(visual.transformer(visual._embeds(images))) @ visual.proj


@pytest.mark.parametrize(
    ("model", "activation", "act_layer"),
    [
        pytest.param(TINY, "gelu", nn.GELU, id="tiny-gelu"),
        pytest.param(TINY, "quickgelu", open_clip.transformer.QuickGELU, id="tiny-quickgelu"),
        pytest.param(MODELS["ViT-B/16"], "gelu", nn.GELU, id="full-gelu"),
    ],
)
def test_both_activations_equal_open_clips(
    tmp_path: Path, model: Model, activation: Activation, act_layer: type[nn.Module]
) -> None:
    """From a checkpoint as open_clip's repositories hold it: float32 weights, and the config beside them."""
    state = untrained_state(model, seed=3, vocabulary=TINY_VOCABULARY)
    save_file({name: value.float() * 1.001 for name, value in state.items()}, tmp_path / "model.safetensors")
    config = {"model_cfg": {"quick_gelu": activation == "quickgelu", "vision_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path / "model.safetensors", "")
    parameters = load_visual(model, checkpoint, rounding=False)
    pixels = photograph_pixels(tmp_path / "images", model, 2)
    visual = peer(model, act_layer).eval()
    visual.load_state_dict(dict(parameters))
    expected = peer_tokens(visual, pixels)

    found: dict[Activation, Tensor] = {}
    for each in ("quickgelu", "gelu"):
        built = tower.VisionTransformer(model, parameters, each, torch.float32).pack(2)
        with torch.no_grad():
            found[each] = built(pixels)
    assert resolve_activation(checkpoint, None) == activation
    for mine, theirs in zip(found[activation], expected, strict=True):
        assert relative_error(mine, theirs) <= BOUND
    assert relative_error(found["gelu"], found["quickgelu"]) > 1e-3


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_packed_and_unpacked_layers_compute_the_same_activation(tmp_path: Path, activation: Activation) -> None:
    state = untrained_state(TINY, vocabulary=TINY_VOCABULARY)
    parameters = {
        name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")
    }
    pixels = photograph_pixels(tmp_path / "images", TINY, 2)
    plain = tower.VisionTransformer(TINY, parameters, activation, torch.float32)
    packed = tower.VisionTransformer(TINY, parameters, activation, torch.float32).pack(2)
    with torch.no_grad():
        assert relative_error(packed(pixels), plain(pixels)) <= BOUND
