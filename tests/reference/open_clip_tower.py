"""open_clip's image tower in the shape of one of the models. Its parameters have OpenAI's names."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from torch import nn

from patchbank.encoders.openai.registry import Model


def open_clip_tower(model: Model, act_layer: type[nn.Module], size: tuple[int, int] | None = None) -> VisionTransformer:
    """A tower with open_clip's own random weights. `act_layer`: the activation of its MLPs; `size`: of its input."""
    return VisionTransformer(
        image_size=size or model.input_size,
        patch_size=model.patch_size,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        mlp_ratio=4,
        output_dim=model.output_dim,
        act_layer=act_layer,
    )
