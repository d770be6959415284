"""Third-party CLIP image towers with patchbank's weights, each giving every token after ``ln_post`` and projection.

A tower is a module of normalised (B, 3, n, n) pixels to (B, 1 + N, D) tokens. Each package's own code computes up to
the last block; the final norm and the projection are its own layers, applied to every token, which no package offers.
That each gives the original's tokens is checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import clip
import torch
from tests.reference.original import Original
from tests.support import relative_error
from torch import Tensor, nn

from benchmarks.common import skipped
from patchbank.encoders.device import DTYPES
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual
from patchbank.encoders.openai.registry import Model

EQUAL = 1e-4  # relative error in fp32 above which a peer computes something else
ROUNDED = 5e-2  # the same in the shorter formats
VERSIONS = ("transformers", "open_clip_torch", "clip-anytorch", "torchvision", "pillow")


class OriginalTower(nn.Module):
    """OpenAI's, as the original scripts run it."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        original = Original(weights)
        self.visual = original.visual
        self.preprocess = original.preprocess
        self._encode = original.encode_image

    def forward(self, images: Tensor) -> Tensor:
        return self._encode(images)


class OpenClipTower(nn.Module):
    """open_clip's."""

    def __init__(self, model: Model, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU
        from tests.reference.open_clip_tower import open_clip_tower

        self.visual = open_clip_tower(model, QuickGELU)
        self.visual.load_state_dict(dict(parameters))  # its names are OpenAI's

    def forward(self, images: Tensor) -> Tensor:
        visual = self.visual
        x = visual.transformer(visual._embeds(images.to(visual.proj.dtype)))
        return visual.ln_post(x) @ visual.proj


class TransformersTower(nn.Module):
    """transformers' ``CLIPVisionModel`` and its visual projection."""

    def __init__(self, model: Model, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(
            hidden_size=model.width,
            intermediate_size=4 * model.width,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            image_size=model.input_size,
            patch_size=model.patch_size,
            projection_dim=model.output_dim,
            hidden_act="quick_gelu",
        )
        self.tower = CLIPVisionModelWithProjection(config)
        self.tower.load_state_dict(transformers_names(parameters))

    def forward(self, images: Tensor) -> Tensor:
        vision = self.tower.vision_model
        x = vision(pixel_values=images.to(self.tower.dtype)).last_hidden_state
        return self.tower.visual_projection(vision.post_layernorm(x))


_RENAMED = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.": "pre_layrnorm.",  # transformers' spelling
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def transformers_names(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's parameters under transformers' names."""
    renamed: dict[str, Tensor] = {}
    for name, value in parameters.items():
        if name == "proj":
            renamed["visual_projection.weight"] = value.t().contiguous()
            continue
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        stem, joined, kind = name.partition(".attn.in_proj_")
        if joined:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"vision_model.{stem}.self_attn.{part}_proj.{kind}"] = third.contiguous()
        else:
            renamed[f"vision_model.{name}"] = value
    return renamed


def towers(model: Model, weights: Path) -> dict[str, nn.Module]:
    """The peers that are installed and give the original's tokens, in float32 on the CPU; the first is the original."""
    n = model.input_size
    sample = torch.randn(1, 3, n, n, generator=torch.Generator().manual_seed(0))
    parameters = load_visual(model, Checkpoint(weights, "untrained"), rounding=False)
    makers: dict[str, Callable[[], nn.Module]] = {
        "original": lambda: OriginalTower(weights),
        "open_clip": lambda: OpenClipTower(model, parameters),
        "transformers": lambda: TransformersTower(model, parameters),
    }
    made: dict[str, nn.Module] = {}
    expected: Tensor | None = None
    for name, make in makers.items():
        try:
            tower = make().eval().requires_grad_(False)
            tokens = tower(sample)
            expected = tokens if expected is None else expected
            check(name, relative_error(tokens, expected), "fp32")
        except Exception as error:  # not installed, or another version than this code knows
            if expected is None:
                raise
            skipped(name, error)
        else:
            made[name] = tower
    return made


def preprocessing(input_size: int) -> Any:
    """OpenAI's, of an opened image: its last step normalises."""
    return clip.clip._transform(input_size)


def check(name: str, error: float, precision: str) -> None:
    """Raise RuntimeError if a peer's tokens differ from the original's: times of another function mean nothing."""
    bound = EQUAL if precision == "fp32" else ROUNDED
    if not error <= bound:
        raise RuntimeError(f"{name} differs from the original by {error:.1e} in {precision}, more than {bound:.0e}.")


def cast(tower: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """The tower on a device, computing in a precision. OpenAI's norms compute in float32 whatever they are given."""
    tower = tower.to(device, DTYPES[precision])  # type: ignore[index]
    for module in tower.modules():
        if isinstance(module, clip.model.LayerNorm):
            module.float()
    return tower
