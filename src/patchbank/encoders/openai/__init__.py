"""The family of OpenAI's four CLIP models, and of other checkpoints of their architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.config import Activation, ExtractConfig, Precision
from patchbank.encoders.base import Description, Product, Progress
from patchbank.encoders.clip import Shape
from patchbank.encoders.openai.registry import MEAN, MODELS, STD, Model, get_model
from patchbank.encoders.openai.shapes import shape_of
from patchbank.encoders.outputs import chosen, sized
from patchbank.errors import ConfigError, WeightsError
from patchbank.features import Identity, Input, Output

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from patchbank.encoders.openai.checkpoints import Checkpoint
    from patchbank.encoders.tower import TowerEncoder


def spec(config: ExtractConfig, root: Path | None, *, rounding: bool) -> OpenAISpec:
    """The encoder of a configuration. Raises ConfigError and WeightsError as `encoders.find` does."""
    from patchbank.encoders.openai.checkpoints import (
        CHECKPOINTS,
        find_checkpoint,
        holds_halves,
        load_visual,
        resolve_activation,
    )

    model = get_model(config.model)
    if config.weights is None and config.activation not in (None, "quickgelu"):
        raise ConfigError(
            f"--activation {config.activation} does not fit: OpenAI's own {model.name} needs QuickGELU. Leave it out, "
            "or give the checkpoint that was trained with it (--weights)."
        )
    _ = OpenAISpec(model, request=config).outputs  # checked before the search for weights
    here = CHECKPOINTS if CHECKPOINTS.is_dir() else None  # in an EZ-HOI checkout
    checkpoints = config.checkpoints or (here if root is None else root / CHECKPOINTS)
    checkpoint = find_checkpoint(model, config.weights, checkpoints)
    if checkpoint is not None:
        checkpoint = replace(checkpoint, path=checkpoint.path.absolute())
    found = OpenAISpec(model, config.precision, checkpoint, checkpoints, rounding=rounding, request=config)
    if checkpoint is None or config.weights is None:
        return found  # official: QuickGELU, and exact in float16
    if checkpoint.sha256 == model.sha256 and config.activation is None:
        return found
    # Read now, to refuse a wrong file before the run begins.
    parameters = load_visual(model, checkpoint, rounding=rounding)
    halves = rounding or holds_halves(parameters)
    return replace(found, activation=resolve_activation(checkpoint, config.activation), halves=halves)


def random(config: ExtractConfig) -> RandomSpec:
    """A model with random weights. Raises ConfigError if it is unknown."""
    return RandomSpec(get_model(config.model), config.precision, request=config)


def encode_texts(spec: OpenAISpec, texts: Sequence[str]) -> Tensor:
    """Texts in the joint space. Raises as `encoders.encode_texts` does."""
    from patchbank.encoders import text

    found = spec.obtain()
    assert found.checkpoint is not None
    path = found.checkpoint.path
    return text.encode_texts(path, texts, settings=text.settings_of(path, found.activation))


def names() -> Sequence[str]:
    """The four."""
    return list(MODELS)


def describe(name: str) -> Description:
    """One of them. Raises ConfigError if it is unknown."""
    model = get_model(name)
    side = model.input_size
    return Description(model.name, (side, side), model.grid, model.output_dim, prefix=1, text=True)


@dataclass(frozen=True)
class OpenAISpec:
    """One of the models, before its weights are loaded.

    Attributes:
        model: which one.
        precision: what it computes in.
        checkpoint: the file with its weights; None if the official one has to be downloaded.
        checkpoints: the directory for the download.
        activation: of its MLPs.
        rounding: whether to round float32 weights to float16.
        halves: whether the weights are exact in float16, rounded or not.
        request: the configuration; its output, input_size and pool_grid count.
    """

    model: Model
    precision: Precision = "fp32"
    checkpoint: Checkpoint | None = None
    checkpoints: Path | None = None
    activation: Activation = "quickgelu"
    rounding: bool = False
    halves: bool = True
    request: ExtractConfig = field(default_factory=ExtractConfig)

    @property
    def name(self) -> str:
        """OpenAI's."""
        return self.model.name

    @property
    def shape(self) -> Shape:
        """Of the image tower."""
        return shape_of(self.model)

    @cached_property
    def input(self) -> Input:
        """CLIP's: bicubic, centre crop, CLIP's mean and std. Raises ConfigError if a size does not fit."""
        n = self.model.input_size
        own = Input(size=(n, n), patch=self.model.patch_size, mean=MEAN, std=STD)
        return sized(self.request, self.name, own)

    @cached_property
    def outputs(self) -> Mapping[str, Output]:
        """Those requested, or [CLS] as ``encode_image`` returns it and patch tokens. Raises ConfigError."""
        return chosen(self.request, self.name, self.shape.architecture, self.input)

    @property
    def identity(self) -> Identity:
        """Model, weights, activation, rounding of the weights, precision."""
        return {
            "family": "openai",
            "model": self.model.name,
            "weights": self.checkpoint.sha256 if self.checkpoint else self.model.sha256,
            "activation": self.activation,
            "rounding": "float16" if self.halves else "none",
            "precision": self.precision,
        }

    @property
    def weights(self) -> str | None:
        """The checkpoint's path."""
        return str(self.checkpoint.path) if self.checkpoint else None

    @property
    def sources(self) -> Sequence[str]:
        """The checkpoint's path, or those of the official file and its URL."""
        from patchbank.encoders.openai.checkpoints import places

        if self.checkpoint is not None:
            return [str(self.checkpoint.path)]
        return [*map(str, places(self.model, self.checkpoints)), *filter(None, [self.model.url])]

    @property
    def untrained(self) -> bool:
        """Whether the checkpoint says that its weights are random numbers."""
        from patchbank.encoders.openai.untrained import is_untrained

        return self.checkpoint is not None and is_untrained(self.checkpoint.path)

    @property
    def products(self) -> Sequence[Product]:
        """Every matrix product of one image."""
        return self.shape.products(self.input)

    @property
    def sample_bytes(self) -> int:
        """Memory for one image."""
        return self.shape.sample_bytes(self.input, self.precision)

    def obtain(self, progress: Progress | None = None) -> OpenAISpec:
        """Download the official file if there is no checkpoint. Raises WeightsError."""
        from patchbank.encoders.openai.checkpoints import is_there, obtain_checkpoint

        if self.checkpoint is not None and is_there(self.checkpoint):
            return self
        found = obtain_checkpoint(self.model, self.checkpoints, progress)
        if self.checkpoint is not None and found.sha256 != self.checkpoint.sha256:
            raise WeightsError(f"{found.path} holds other weights than {self.checkpoint.path}, which is missing.")
        return replace(self, checkpoint=found)

    def load(self, device: torch.device, batch_size: int) -> TowerEncoder:
        """Load the checkpoint. Raises WeightsError if it is damaged or another model's."""
        from patchbank.encoders.tower import TowerEncoder

        found = self.obtain()
        heads, activation = self.model.heads, self.activation
        return TowerEncoder(found, found.parameters(), device, batch_size, heads=heads, activation=activation)

    def parameters(self) -> Mapping[str, Tensor]:
        """The image tower's, under OpenAI's names without ``visual.``. Raises WeightsError."""
        from patchbank.encoders.openai.checkpoints import load_visual

        assert self.checkpoint is not None
        return load_visual(self.model, self.checkpoint, rounding=self.rounding)


@dataclass(frozen=True)
class RandomSpec(OpenAISpec):
    """One of the models, with the same random numbers in every layer."""

    @property
    def identity(self) -> Identity:
        """The model's, with other weights."""
        return {**super().identity, "weights": "random numbers"}

    @property
    def untrained(self) -> bool:
        """Always."""
        return True

    def obtain(self, progress: Progress | None = None) -> RandomSpec:
        """The same: `parameters` makes the weights."""
        return self

    def parameters(self) -> Mapping[str, Tensor]:
        """Random numbers."""
        import torch

        from patchbank.encoders.openai.shapes import expected_shapes

        values: dict[str, Tensor] = {}
        for name, shape in expected_shapes(self.model).items():
            one = re.sub(r"resblocks\.\d+\.", "resblocks.0.", name)
            values[name] = values[one] if one in values else 0.02 * torch.randn(shape)
        return values
