"""Encoders: frozen vision transformers.

A model's name selects its family; families other than OpenAI's are imported on demand.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from patchbank.config import ExtractConfig
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.openai.registry import MODELS, get_model
from patchbank.features import Identity

# The prefix of a model's name, up to the first slash -> the module with the family's `spec`. Names without such a
# prefix are OpenAI's.
FAMILIES: dict[str, str] = {}


def find(config: ExtractConfig, root: Path | None = None, *, rounding: bool = False) -> EncoderSpec:
    """The encoder of a configuration; its weights are found, but not loaded.

    Args:
        config: its model, weights, checkpoints, activation, precision and round_weights.
        root: the EZ-HOI checkout, which may hold checkpoints.
        rounding: round float32 weights as ``clip.load`` does, whatever the configuration says.

    Raises:
        ConfigError: the model is unknown.
        WeightsError: its weights are missing, damaged or another model's.
    """
    family = import_module(FAMILIES.get(config.model.partition("/")[0], "patchbank.encoders.openai"))
    found: EncoderSpec = family.spec(config, root, rounding=rounding or config.round_weights)
    return found


def check_model(name: str) -> None:
    """Raise ConfigError if a name has no family. Whether a family has the model, only `find` checks."""
    if name.partition("/")[0] not in FAMILIES:
        get_model(name)


def bank_prefix(name: str) -> str:
    """How the default names of a model's banks begin: EZ-HOI's word for OpenAI's models, else the model's own name.

    Raises ConfigError as `check_model` does.
    """
    if name.partition("/")[0] not in FAMILIES:
        return get_model(name).bank_prefix
    return re.sub(r"[^\w.-]+", "-", name)


def models_with(shape: tuple[int, ...]) -> list[str]:
    """The known models whose patch tokens have this shape, (N, D)."""
    return [name for name, model in MODELS.items() if (model.tokens, model.output_dim) == shape]


def official_weights(identity: Identity) -> str | None:
    """The publisher of official weights (``OpenAI's``); None if the weights are not known to be official."""
    return "OpenAI's" if identity.get("weights") in {model.sha256 for model in MODELS.values()} else None
