"""Texts in the space of a CLIP, by the text tower of a checkpoint. Tokenizer and tower are open_clip's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbank.encoders.clip_files import VISUAL, load_state
from patchbank.encoders.quiet import quiet
from patchbank.errors import ConfigError, WeightsError, first_line, install

_TEXTS = f"Encoding texts needs open_clip: {install('text')}"
# The image tower is not run: a small one takes its place.
_SMALL = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}


def open_clip(missing: str = _TEXTS) -> AbstractContextManager[Any]:
    """open_clip, without words on the terminal: its own are the root logger's. Raises ConfigError as `quiet` does."""
    return quiet("open_clip", missing, "", "timm", "transformers", "huggingface_hub")


def settings_of(path: Path, activation: str) -> dict[str, Any]:
    """open_clip's settings of OpenAI's architecture, by the shapes in a checkpoint.

    Raises WeightsError if it cannot be read, or has no text tower.
    """
    state = load_state(path, without=VISUAL)
    needed = ("text_projection", "positional_embedding", "token_embedding.weight")
    if lacking := [name for name in needed if name not in state or state[name].ndim != 2]:
        raise WeightsError(f"{path} holds no text tower: it has no matrix {lacking[0]}.")
    width, dim = state["text_projection"].shape
    text = {
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        **{"width": width, "heads": max(1, width // 64)},
        "layers": len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}),
    }
    return {"embed_dim": dim, "text_cfg": text, "quick_gelu": activation == "quickgelu"}


def encode_texts(
    path: Path, texts: Sequence[str], arch: str = "ViT-B-16", settings: Mapping[str, Any] | None = None
) -> Tensor:
    """The texts' features, as ``encode_text`` computes them on the CPU.

    Args:
        path: the file of the whole model.
        arch: open_clip's name of the architecture.
        settings: instead of the architecture's own, such as `settings_of`.

    Returns:
        (T, D) float32 on the CPU, not normalised to unit length.

    Raises:
        ConfigError: open_clip is not installed; a text is empty, or longer than the tower takes.
        WeightsError: the checkpoint cannot be read, or has no text tower.
    """
    with open_clip() as library:
        state = {name: value.float() for name, value in load_state(path, without=VISUAL).items()}
        try:
            model = library.create_model(
                arch, load_weights=False, pretrained_text=False, vision_cfg=dict(_SMALL), **(settings or {})
            ).eval()
            tokenizer = library.get_tokenizer(arch, context_length=model.context_length)
        except Exception as error:  # of a tokenizer's or a tower's files, which its library fetches
            raise WeightsError(f"open_clip cannot make the text tower of {arch}: {first_line(error)}") from error
        _check(path, texts, model, tokenizer)
        try:
            if hasattr(model, "text"):
                state = library.model.convert_to_custom_text_state_dict(state)
            found = model.load_state_dict(state, strict=False)
            if lacking := [name for name in found.missing_keys if not name.startswith((VISUAL, "logit_"))]:
                raise ValueError(f"it has no {lacking[0]}")
            with torch.inference_mode():
                features: Tensor = model.encode_text(tokenizer(list(texts)))
        except Exception as error:  # of shapes and names in the file
            raise WeightsError(f"{path} has no usable text tower: {first_line(error)}") from error
    if not features.isfinite().all():
        raise WeightsError(f"{path} gives texts features of NaN or Inf. Use another checkpoint.")
    return features.clone()


def _check(path: Path, texts: Sequence[str], model: Any, tokenizer: Any) -> None:
    """Raise WeightsError if the model lacks some of the tokenizer's words, ConfigError if a text does not fit."""
    of_clip = hasattr(tokenizer, "encode")
    if of_clip and model.vocab_size < tokenizer.vocab_size:
        raise WeightsError(
            f"{path} has no usable text tower: it has a vocabulary of {model.vocab_size:,} tokens, and CLIP's has "
            f"{tokenizer.vocab_size:,}."
        )
    longest = model.context_length - 2 * of_clip  # two tokens mark the beginning and the end
    for text in texts:
        if not text.strip():
            raise ConfigError("--text is empty: give it a phrase, such as 'a person riding a bicycle'.")
        count = len(tokenizer.encode(text) if of_clip else tokenizer.tokenizer(text)["input_ids"])
        if count > longest:
            raise ConfigError(f"--text {text[:40]!r}... is {count} tokens long, and the text tower takes {longest}.")
