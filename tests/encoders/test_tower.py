"""The tower against open_clip on the same weights: both activations, every output, other input sizes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from patchbank.config import Activation, ExtractConfig
from patchbank.encoders.openai import OpenAISpec
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual, resolve_activation
from patchbank.encoders.openai.registry import MEAN, MODELS, STD, Model
from patchbank.encoders.openai.untrained import untrained_state
from patchbank.errors import ConfigError
from patchbank.preprocess import preprocess
from tests.reference.open_clip_tower import open_clip_tower
from tests.support import (
    TINY,
    TINY_VOCABULARY,
    all_tokens,
    hico_root,
    patchbank,
    photographs,
    relative_error,
    tower_of,
)

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


def normalised(pixels: Tensor) -> Tensor:
    """(B, h, w, 3) uint8 -> (B, 3, h, w)."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def peer_tokens(visual: VisionTransformer, pixels: Tensor) -> Tensor:
    """Every token after ``ln_post`` and ``proj``."""
    with torch.no_grad():
        return visual.ln_post(visual.transformer(visual._embeds(normalised(pixels)))) @ visual.proj


def tiny_parameters(model: Model = TINY) -> dict[str, Tensor]:
    state = untrained_state(model, vocabulary=TINY_VOCABULARY)
    return {name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")}


@pytest.mark.parametrize(
    ("model", "activation", "act_layer"),
    [
        pytest.param(TINY, "gelu", nn.GELU, id="tiny-gelu"),
        pytest.param(TINY, "quickgelu", open_clip.transformer.QuickGELU, id="tiny-quickgelu"),
        pytest.param(MODELS["ViT-B/16"], "gelu", nn.GELU, id="full-gelu", marks=pytest.mark.full),
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
        with torch.no_grad():
            found[each] = all_tokens(tower_of(model, parameters, each).pack(2)(pixels))
    assert resolve_activation(checkpoint, None) == activation
    for mine, theirs in zip(found[activation], expected, strict=True):
        assert relative_error(mine, theirs) <= BOUND
    assert relative_error(found["gelu"], found["quickgelu"]) > 1e-3


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_packed_and_unpacked_layers_compute_the_same_activation(tmp_path: Path, activation: Activation) -> None:
    parameters = tiny_parameters()
    pixels = photograph_pixels(tmp_path / "images", TINY, 2)
    plain, packed = tower_of(TINY, parameters, activation), tower_of(TINY, parameters, activation).pack(2)
    with torch.no_grad():
        assert relative_error(all_tokens(packed(pixels)), all_tokens(plain(pixels))) <= BOUND


def test_every_output_is_of_one_pass(tmp_path: Path) -> None:
    """Each equals open_clip's, whatever else is asked for; in the order asked."""
    parameters, pixels = tiny_parameters(), photograph_pixels(tmp_path / "images", TINY, 2)
    visual = peer(TINY, open_clip.transformer.QuickGELU).eval()
    visual.load_state_dict(parameters)
    images = normalised(pixels)
    with torch.no_grad():
        raw, normed = (
            visual.forward_intermediates(images, normalize_intermediates=norm, output_fmt="NLC")["image_intermediates"]
            for norm in (False, True)
        )
        expected = {
            "block:2": normed[1],
            "pooled": visual(images),
            "block:1:raw": raw[0],
            "patch_tokens": normed[1] @ visual.proj,
            "block:2:raw": raw[1],
            "cls": visual(images),
            "block:1": normed[0],
        }
        found = tower_of(TINY, parameters, request=ExtractConfig(output=tuple(expected)))(pixels)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert relative_error(found[name], value) <= BOUND, name
            alone = tower_of(TINY, parameters, request=ExtractConfig(output=(name,)))
            assert len(alone.blocks) == (1 if "1" in name else 2)
            assert torch.equal(alone(pixels)[name], found[name]), name


@pytest.mark.parametrize("size", [(64, 64), (48, 32), (16, 80), (8, 128)])
def test_positions_at_another_size_are_interpolated_as_by_open_clip(size: tuple[int, int]) -> None:
    """(8, 128) has as many patches as the model's own grid."""
    parameters = tiny_parameters()
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    visual = open_clip_tower(TINY, open_clip.transformer.QuickGELU, size).eval()
    state = {f"visual.{name}": value for name, value in parameters.items()}
    if size != (8, 128):  # which open_clip would leave as they are
        open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=visual))
    else:
        square = parameters["positional_embedding"][1:].t().view(1, -1, 4, 4)
        wide = nn.functional.interpolate(square, (1, 16), mode="bicubic", antialias=True)[0, :, 0].t()
        state["visual.positional_embedding"] = torch.cat([parameters["positional_embedding"][:1], wide])
    visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    with torch.no_grad():
        found = all_tokens(tower_of(TINY, parameters, request=ExtractConfig(input_size=size))(pixels))
    assert relative_error(found, peer_tokens(visual, pixels)) <= BOUND


def test_what_a_model_has_not() -> None:
    for name, reason in (
        ("block:3", "has 2 blocks"),
        ("registers", "no such output. It has patch_tokens, cls, pooled,"),
    ):
        with pytest.raises(ConfigError, match=reason):
            _ = OpenAISpec(TINY, request=ExtractConfig(output=(name,))).outputs
    with pytest.raises(ConfigError, match="such as 40x32"):
        _ = OpenAISpec(TINY, request=ExtractConfig(input_size=(39, 33))).input
    with pytest.raises(ConfigError, match="input_size 24x24"):
        _ = OpenAISpec(TINY, request=ExtractConfig(pool_grid=3)).outputs


def test_pickles_hold_patch_tokens_alone(tmp_path: Path, tiny_weights: Path) -> None:
    root = hico_root(tmp_path)
    asked = ["extract", "hicodet", "--root", root, "--model", "tiny", "--weights", tiny_weights, "--split", "train"]
    refused = patchbank(*asked, "--output", "patch_tokens", "--output", "block:1", check=2)
    assert "--output block:1: a pickle holds the patch_tokens alone. Add --layout shards." in " ".join(
        refused.stderr.split()
    )
    patchbank(*asked, "--output", "patch_tokens", check=0)
