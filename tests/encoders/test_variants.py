"""Dense variants of CLIP's last block against plain lines, on open_clip's modules with the same weights."""

from __future__ import annotations

from dataclasses import replace

import open_clip
import pytest
import torch
from torch import Tensor, nn

from patchbank import Runner
from patchbank.config import Activation, ExtractConfig
from patchbank.encoders.openai import OpenAISpec, RandomSpec
from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.encoders.outputs import VARIANTS
from tests.encoders.test_tower import BOUND, normalised, tiny_parameters
from tests.reference import variants
from tests.reference.open_clip_tower import open_clip_tower
from tests.support import TINY, relative_error, tower_of

WIDE = replace(TINY, width=128)  # two heads
EVERY = ("cls", "sclip", "patch_tokens", "naclip", "block:1", "maskclip", "clearclip")


def peer(model: Model, parameters: dict[str, Tensor], activation: Activation, size: tuple[int, int]) -> nn.Module:
    act_layer = nn.GELU if activation == "gelu" else open_clip.transformer.QuickGELU
    visual = open_clip_tower(model, act_layer, size).eval()
    visual.load_state_dict(parameters)
    return visual


@pytest.mark.parametrize(("size", "activation"), [((32, 32), "quickgelu"), ((24, 56), "quickgelu"), ((32, 32), "gelu")])
def test_each_equals_plain_lines(size: tuple[int, int], activation: Activation) -> None:
    """Beside other outputs, in grids that are not square too."""
    grid = size[0] // 8, size[1] // 8
    torch.manual_seed(0)
    parameters = tiny_parameters(WIDE)
    parameters["positional_embedding"] = torch.randn(1 + grid[0] * grid[1], 128)
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    request = ExtractConfig(output=EVERY, input_size=size)
    visual = peer(WIDE, parameters, activation, size)
    with torch.no_grad():
        x = visual.transformer.resblocks[0](visual._embeds(normalised(pixels)))
        unchanged = visual.ln_post(visual.transformer.resblocks[1](x)) @ visual.proj
        if grid[0] != grid[1]:  # a tower takes positions of square grids
            parameters["positional_embedding"] = torch.zeros(17, 128)
        tower = tower_of(WIDE, parameters, activation, request=request)
        if grid[0] != grid[1]:
            tower.positions += visual.positional_embedding
        found = tower(pixels)
        assert list(found) == list(EVERY)
        for name in VARIANTS:
            last = visual.transformer.resblocks[1]
            for tokens, image in zip(found[name], x, strict=True):
                expected = visual.ln_post(variants.patch_tokens(name, last, image, grid)) @ visual.proj
                assert relative_error(tokens, expected) <= BOUND, name
            assert relative_error(found[name], found["patch_tokens"]) > 0.05, name
    assert relative_error(found["cls"], unchanged[:, 0]) <= BOUND
    assert relative_error(found["patch_tokens"], unchanged[:, 1:]) <= BOUND


def test_a_variant_changes_no_other_output() -> None:
    parameters = tiny_parameters(WIDE)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        alone = tower_of(WIDE, parameters)(pixels)
        beside = tower_of(WIDE, parameters, request=ExtractConfig(output=EVERY))(pixels)
    assert all(torch.equal(beside[name], value) for name, value in alone.items())


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_near(name: str) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    exact = tower_of(WIDE, tiny_parameters(WIDE), request=ExtractConfig(output=(name,)))
    rounded = tower_of(WIDE, tiny_parameters(WIDE), dtype=torch.bfloat16, request=ExtractConfig(output=(name,)))
    with torch.no_grad():
        assert relative_error(rounded(pixels)[name].float(), exact(pixels)[name]) < 0.03


def test_their_facts_are_stored() -> None:
    outputs = OpenAISpec(MODELS["ViT-B/16"], request=ExtractConfig(output=("naclip", "patch_tokens"))).outputs
    made = outputs["naclip"]
    assert (made.shape, made.block, made.norm, made.projection, made.variant) == (
        (196, 512), 12, "ln_post", "proj", "naclip",
    )  # fmt: skip
    assert outputs["patch_tokens"].variant == ""


@pytest.mark.full
def test_a_compiled_encoder_has_them() -> None:
    spec = RandomSpec(WIDE, request=ExtractConfig(output=EVERY))
    torch.manual_seed(0)
    plain = Runner(spec, torch.device("cpu"), batch_size=2)
    torch.manual_seed(0)
    compiled = Runner(spec, torch.device("cpu"), batch_size=2, compiled=True)
    assert compiled.compiled, compiled.notes
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    one, other = plain(pixels), compiled(pixels)
    assert all(relative_error(other[name], value) <= BOUND for name, value in one.items())
