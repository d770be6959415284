"""The names, shapes and stored dtypes of a CLIP's parameters, as in OpenAI's package. Imports no torch."""

from __future__ import annotations

from patchbank.encoders.openai.registry import Model


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The image tower's parameters, under OpenAI's names without ``visual.``, and their shapes."""
    width, patch = model.width, model.patch_size
    return {
        "class_embedding": (width,),
        "positional_embedding": (model.tokens + 1, width),
        "proj": (width, model.output_dim),
        "conv1.weight": (width, 3, patch, patch),
        **_norm("ln_pre", width),
        **transformer_shapes(width, model.layers),
        **_norm("ln_post", width),
    }


def transformer_shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The parameters of a tower's residual blocks and their shapes; the text tower uses the same names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            **_norm(f"{block}.ln_1", width),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
            **_norm(f"{block}.ln_2", width),
        }
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def is_half(name: str) -> bool:
    """Whether OpenAI's ``convert_weights`` stores this parameter as float16: all but norms and embeddings."""
    return not (".ln_" in f".{name}" or name.endswith(("_embedding", "token_embedding.weight", "logit_scale")))
