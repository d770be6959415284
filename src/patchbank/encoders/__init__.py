"""Encoders: frozen vision transformers.

A model's name leads to the family that knows it; a family is imported on demand.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from patchbank.config import ExtractConfig
from patchbank.encoders.base import EncoderSpec
from patchbank.features import Identity

# The part of a model's name before its first slash -> the module with the family's `spec`. Every other name is
# OpenAI's.
FAMILIES: dict[str, str] = {}
_OPENAI = "patchbank.encoders.openai"


def find(config: ExtractConfig, root: Path | None = None, *, rounding: bool = False) -> EncoderSpec:
    """The encoder that a configuration asks for, with its weights looked up but not loaded.

    Args:
        config: its model, weights, checkpoints, activation, precision and round_weights.
        root: the EZ-HOI checkout whose checkpoints are looked in.
        rounding: round float32 weights as ``clip.load`` does, though the configuration does not ask for it.

    Raises:
        ConfigError: there is no such model.
        WeightsError: its weights are missing, damaged or another model's.
    """
    family = import_module(FAMILIES.get(config.model.partition("/")[0], _OPENAI))
    found: EncoderSpec = family.spec(config, root, rounding=rounding or config.round_weights)
    return found


def check_model(name: str) -> None:
    """Raise ConfigError on a name that no family can know; whether a family has the model, `find` says."""
    from patchbank.encoders.openai.registry import get_model

    if name.partition("/")[0] not in FAMILIES:
        get_model(name)


def bank_prefix(name: str) -> str:
    """What the default names of a model's banks begin with: EZ-HOI's word for OpenAI's, else the model's own name.

    Raises ConfigError as `check_model` does.
    """
    from patchbank.encoders.openai.registry import get_model

    if name.partition("/")[0] not in FAMILIES:
        return get_model(name).bank_prefix
    return re.sub(r"[^\w.-]+", "-", name)


def official_weights(identity: Identity) -> str | None:
    """Whose official weights these are (``OpenAI's``); None where they are not known to be official."""
    if identity.get("family") != "openai":
        return None
    from patchbank.encoders.openai.registry import MODELS

    return "OpenAI's" if identity.get("weights") in {model.sha256 for model in MODELS.values()} else None
