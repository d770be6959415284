"""The family of transformers' vision models: ``transformers/ORG/NAME``, a repository of the Hugging Face hub.

Its config.json says what the model is, and its preprocessor_config.json how images become the input. Both are data: the
classes are those of the installed library, and no code of a repository runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbank.config import ExtractConfig
from patchbank.encoders.base import Description
from patchbank.encoders.outputs import chosen, sized
from patchbank.encoders.specs import RANDOM, FilesSpec
from patchbank.encoders.transformers.configuration import PREFIX, checked, class_of, installed, reading
from patchbank.encoders.transformers.place import Place
from patchbank.encoders.transformers.processor import input_of
from patchbank.encoders.transformers.tower import Tower, TransformersEncoder, facts
from patchbank.encoders.weights import as_float32, read_state
from patchbank.errors import ConfigError, WeightsError, first_line
from patchbank.features import POOLED
from patchbank.files import sha256_of_chunks

PACKAGES = ("transformers",)
_TEXTS = ("clip", "siglip")
# What tests build at its real size: name -> the input's side, the patch's, a token's width, tokens before, text tower.
TESTED = {
    "facebook/dinov2-base": (224, 14, 768, 1, False),
    "facebook/dinov2-with-registers-base": (224, 14, 768, 5, False),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (224, 16, 384, 5, False),
    "google/siglip-base-patch16-224": (224, 16, 768, 0, True),
    "openai/clip-vit-base-patch16": (224, 16, 512, 1, True),
}


def spec(config: ExtractConfig, root: Path | None, *, rounding: bool) -> TransformersSpec:  # noqa: ARG001
    """The encoder of a configuration. Raises ConfigError and WeightsError as `encoders.find` does."""
    found = random(config)
    return found.of(*found.place.weights())


def random(config: ExtractConfig) -> TransformersSpec:
    """A model with random weights, of which only the config.json is needed. Raises as `encoders.random` does."""
    name = config.model
    with installed() as library:
        place = Place.of(config)
        data = checked(name, place.read("config.json"))
        with reading("config.json", name), torch.device("meta"):
            model_class, built = class_of(library, data)
            tower = Tower.of(model_class(built).eval())
        own, cover = input_of(library, name, place, tower.patch)
        made = sized(config, name, own, own.size[0] / cover[0])
        if made.size == own.size and cover != own.size:
            made = replace(made, cover=cover)
        architecture, products = facts(name, tower, made, own.size)
    said = json.dumps({key: value for key, value in data.items() if key != "text_config"}, sort_keys=True)
    identity = {
        **{"family": "transformers", "model": name, "weights": RANDOM},
        # Heads, activation, epsilon and others decide numbers, and the weights do not show them.
        **{"config": sha256_of_chunks([said.encode()]), "precision": config.precision},
    }
    outputs = chosen(config, name, architecture, made)
    return TransformersSpec(
        name=name,
        place=place,
        config=data,
        made=architecture,
        input=made,
        outputs=outputs,
        identity=identity,
        products=products,
    )


def names() -> Sequence[str]:
    """The tested models: nothing lists the hub's repositories without a network."""
    with installed():
        pass
    return [PREFIX + name for name in TESTED]


def describe(name: str) -> Description | None:
    """A tested model, or another one by its config.json. Raises ConfigError and WeightsError as `spec` does."""
    if (known := TESTED.get(name.removeprefix(PREFIX))) is not None:
        size, patch, dim, prefix, text = known
        return Description(name, (size, size), (size // patch, size // patch), dim, prefix, text)
    found = random(ExtractConfig(model=name))
    return found.description(text=found.config["model_type"] in _TEXTS)


def encode_texts(spec: TransformersSpec, texts: Sequence[str]) -> Tensor:
    """Texts as ``get_text_features`` gives them, by the repository's tokenizer. Raises as `encoders.encode_texts` does.

    SigLIP's lie in the space of its ``pooled`` output, not of its patch tokens.
    """
    if spec.config["model_type"] not in _TEXTS:
        raise ConfigError(f"--text needs a model with a text tower, such as ViT-B/16: {spec.name} has none.")
    found = spec.obtain()
    with installed() as library:
        model = _loaded(library, found)
        longest = model.config.text_config.max_position_embeddings
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(
                found.place.tokenizer(), local_files_only=True, trust_remote_code=False
            )
            tokens = tokenizer(list(texts), padding="max_length", max_length=longest, return_tensors="pt")
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise WeightsError(f"{found.name} has no usable tokenizer: {first_line(error)}") from error
        if (count := tokens["input_ids"].shape[1]) > longest:
            raise ConfigError(f"--text is {count} tokens long, and {found.name}'s text tower takes {longest}.")
        with torch.inference_mode():
            features = model.get_text_features(**tokens)
    encoded: Tensor = getattr(features, "pooler_output", features).clone()
    return encoded


@dataclass(frozen=True, kw_only=True)
class TransformersSpec(FilesSpec):
    """A model of a repository: ``transformers/ORG/NAME``.

    Attributes:
        place: where its files are.
        config: its config.json, checked.
    """

    place: Place
    config: Mapping[str, Any]

    def load(self, device: torch.device, batch_size: int) -> TransformersEncoder:
        """Load the weights. Raises WeightsError if they are damaged or another model's."""
        found = self.obtain()
        with installed() as library:
            return TransformersEncoder(found, found.made, _loaded(library, found), device, batch_size)


def _loaded(library: Any, spec: TransformersSpec) -> Any:
    """The whole model with its weights, in float32 on the CPU. Raises WeightsError."""
    with reading("config.json", spec.name):
        model_class, config = class_of(library, spec.config)
        if spec.untrained:
            return model_class(config).eval()
    state: dict[str, Tensor] = {}
    for path in spec.paths:
        assert path is not None
        values = read_state(path)
        # Numbers of positions are the model's own; quantised weights are missed below.
        state |= {name: as_float32(path, name, value) for name, value in values.items() if value.is_floating_point()}
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation=config._attn_implementation,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise WeightsError(f"{spec.sources[0]} cannot be loaded as {spec.name}: {first_line(error)}") from error
    tower = Tower.of(model)
    parts = [tower.module, *([tower.projection] if tower.projection is not None else [])]
    used = {id(each) for part in parts for each in part.parameters()}
    if POOLED not in spec.outputs and tower.pooler_name:  # often missing, and then not needed
        used -= {id(each) for each in getattr(tower.module, tower.pooler_name).parameters()}
    needed = {name for name, each in model.named_parameters() if id(each) in used and not name.endswith("mask_token")}
    other = {
        name: f"has the shape {tuple(found)}, expected {tuple(shape)}" for name, found, shape in info["mismatched_keys"]
    }
    wrong = {**dict.fromkeys(info["missing_keys"], "is missing"), **other}
    if lacking := sorted(needed & wrong.keys()):
        raise WeightsError(
            f"{spec.sources[0]} does not hold the weights of {spec.name}: {lacking[0]} {wrong[lacking[0]]} "
            f"({len(lacking)} of {len(needed)} parameters are missing or of another shape)."
        )
    return model.eval()
