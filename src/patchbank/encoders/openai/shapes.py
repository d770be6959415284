"""The names, shapes and stored dtypes of a CLIP's parameters, as in OpenAI's package. Imports no torch."""

from __future__ import annotations

from patchbank.encoders.clip import Shape
from patchbank.encoders.openai.registry import Model


def shape_of(model: Model) -> Shape:
    """A model's image tower."""
    width = model.width
    return Shape(blocks=model.layers, width=width, heads=model.heads, hidden=4 * width, dim=model.output_dim)


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The image tower's parameters, under OpenAI's names without ``visual.``, and their shapes."""
    return shape_of(model).parameters(model.patch_size, model.tokens)


def is_half(name: str) -> bool:
    """Whether OpenAI's ``convert_weights`` stores this parameter as float16: all but norms and embeddings."""
    return not (".ln_" in f".{name}" or name.endswith(("_embedding", "token_embedding.weight", "logit_scale")))
