"""The image tower of a model of transformers, and what of it has a name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from functools import partial
from math import prod
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patchbank.encoders.base import EncoderSpec, Product
from patchbank.encoders.modules import LibraryEncoder
from patchbank.encoders.outputs import Architecture, block_of
from patchbank.encoders.specs import products_of
from patchbank.errors import ConfigError, first_line
from patchbank.features import Input

# Names of layers in the towers.
_NORMS = ("post_layernorm", "layernorm", "norm", "rms_norm")
_POOLERS = ("head", "pooler")
_CLS = re.compile(r"(cls|class)_(token|embedding)$")
_MLPS = (
    *(("fc1", "activation_fn", "fc2"), ("fc1", "activation", "fc2"), ("gate_proj", "act_fn", "down_proj")),
    *(("up_proj", "act_fn", "down_proj"), ("dense", "intermediate_act_fn", "dense")),
)


class Tower(NamedTuple):
    """The image tower of a model, and what of it has a name.

    Attributes:
        module: the tower.
        blocks: its blocks.
        norm: the layer after the last one; an identity if there is none.
        pooler: the names of norm and pooling layers.
        projection: from the pooled output into the space of images and texts.
        patch: the side of a patch in pixels.
        options: of its call, but for pixels.
    """

    module: Any
    blocks: nn.ModuleList
    norm_name: str
    pooler_name: str
    projection: nn.Module | None
    patch: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> Tower:
        """Raises ValueError if the model has no blocks, or its patches are no squares."""
        tower = model
        while hasattr(tower, "vision_model"):
            tower = tower.vision_model
        count, patch = tower.config.num_hidden_layers, tower.config.patch_size
        lists = (each for each in tower.modules() if isinstance(each, nn.ModuleList) and len(each) == count)
        blocks = next(lists, None)
        sides = set(patch) if isinstance(patch, list | tuple) else {patch}
        if not blocks or len(sides) != 1:
            raise ValueError("it has no blocks, or patches that are no squares")
        layers = dict(tower.named_children())
        norm, pooler = (next((each for each in known if each in layers), "") for known in (_NORMS, _POOLERS))
        parameters = inspect.signature(tower.forward).parameters
        return cls(
            tower,
            blocks,
            "" if isinstance(layers.get(norm), nn.Identity) else norm,
            "" if layers.get(pooler) is None else pooler,
            getattr(model, "visual_projection", None),
            sides.pop(),
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {},
        )

    def __call__(self, x: Tensor) -> Any:
        """The library's output of a batch (B, 3, h, w)."""
        own = self.module.config.image_size
        own = list(own) if isinstance(own, list | tuple) else [own, own]
        options = dict(self.options) if list(x.shape[2:]) != own else {}  # it fails at one that is not square
        if hasattr(self.module.config, "mask_ratio"):  # ViTMAE shuffles patches by this noise: in their order
            tokens = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
            options["noise"] = torch.arange(tokens, device=x.device).expand(len(x), -1)
        return self.module(pixel_values=x, **options)

    def norm(self, x: Tensor) -> Tensor:
        """Tokens after the last norm."""
        return getattr(self.module, self.norm_name)(x) if self.norm_name else x


class TransformersEncoder(LibraryEncoder):
    """The image tower of one of transformers' models on a device."""

    def __init__(
        self, spec: EncoderSpec, made: Architecture, model: Any, device: torch.device, batch_size: int
    ) -> None:
        self._tower = tower = Tower.of(model)
        wanted = {(block_of(name) or (made.blocks, False))[0] for name in spec.outputs}
        del tower.blocks[max(wanted) :]
        self._passes: dict[int, dict[int | str, Any]] = {}  # thread -> what its forward pass leaves
        for number in wanted:
            tower.blocks[number - 1].register_forward_hook(partial(self._keep, number))
        modules = [(type(each).__name__, dict(each.named_children())) for each in tower.blocks[0].modules()]
        found = ((kind, next((mlp for mlp in _MLPS if {*mlp} <= {*children}), None)) for kind, children in modules)
        self.mlps = {kind: mlp for kind, mlp in found if mlp is not None}  # type: ignore[misc]  # of this model
        layers = {"tower": tower.module, **({"projection": tower.projection} if tower.projection else {})}
        super().__init__(spec, made, nn.ModuleDict(layers), device, batch_size)
        self._projection = dict(self.model.named_children()).get("projection", nn.Identity())

    def _keep(self, number: int, _module: nn.Module, _arguments: object, output: Any) -> None:
        self._pass()[number] = output[0] if isinstance(output, tuple) else output

    def _pass(self) -> dict[int | str, Any]:
        """What this thread's forward pass leaves; others may be under way."""
        return self._passes.setdefault(0 if torch.compiler.is_compiling() else get_ident(), {})

    def hidden(self, x: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
        """The library's own forward pass; blocks after the last one asked for are not there."""
        kept = self._pass()
        kept["pooled"] = getattr(self._tower(x), "pooler_output", None)
        return {number: kept.pop(number) for number in blocks}

    def norm(self, x: Tensor) -> Tensor:
        """By the layer that the library applies after the last block, or, as CLIP does, to its [CLS] alone."""
        return self._tower.norm(x)

    def project(self, x: Tensor) -> Tensor:
        """By CLIP's projection."""
        projected: Tensor = self._projection(x)
        return projected

    def pooled(self, x: Tensor) -> Tensor:
        """The library's ``pooler_output``, in the space of texts if the model has one, as of ``get_image_features``."""
        return self.project(self._pass().pop("pooled"))


def facts(name: str, tower: Tower, seen: Input, own: tuple[int, int]) -> tuple[Architecture, list[Product]]:
    """What a tower on the meta device computes of an input, where its own is of `own`, (h, w) pixels.

    Raises ConfigError if it does not.
    """
    size = seen.size
    try:
        with torch.no_grad():  # other tensors are not on the meta device: the library keeps some for later passes
            last, pooled = _blank(tower, torch.empty(1, 3, *size, device="meta"))
            if pooled is not None and tower.projection is not None:
                pooled = tower.projection(pooled)
    except Exception as error:
        pixels = f"{size[0]}x{size[1]} pixels"
        if size != own:
            raise ConfigError(
                f"transformers does not interpolate the positions of {name} to {pixels}: leave out --input-size."
            ) from error
        raise ConfigError(
            f"{name} cannot be used: transformers itself fails at its own size, {pixels} ({first_line(error)})."
        ) from error
    _, tokens, width = last.shape
    prefix = tokens - prod(seen.patches)
    embedded = (each for each, _ in tower.module.named_parameters() if not each.startswith(_POOLERS))
    cls = any(map(_CLS.search, embedded))
    if prefix < cls:
        raise ConfigError(f"{name} has no grid of {tower.patch} x {tower.patch} patches: it gives {tokens} tokens.")
    features = 0 if pooled is None else pooled.shape[-1]
    joint = tower.projection is not None and not tower.pooler_name  # which [CLS] and patches go through alike
    layers = (tower.norm_name, tower.pooler_name, "visual_projection" if tower.projection is not None else "")
    made = Architecture(
        blocks=len(tower.blocks),
        width=width,
        cls=cls,
        registers=prefix - cls,
        norm=tower.norm_name,
        projection="visual_projection" if joint else "",
        dim=features if joint else 0,
        pooled=features,
        pooling=", ".join(filter(None, layers)) if features else "",
    )
    linear = [(each.in_features, each.out_features) for each in tower.blocks.modules() if isinstance(each, nn.Linear)]
    heads = [tower.module.config.num_attention_heads] * made.blocks
    return made, products_of(seen, width, prefix, linear + [(width, features)] * joint, heads)


def _blank(tower: Tower, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The last tokens, and what is pooled of them."""
    try:
        output = tower(x)
    except RuntimeError:
        if not hasattr(tower.module, "rope_embeddings"):
            raise
        tokens = tower.module.embeddings(x)  # before version 5, DINOv3 cannot turn them on the meta device
        return tokens, tokens[:, 0]
    return output.last_hidden_state, getattr(output, "pooler_output", None)
