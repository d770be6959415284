"""Texts in CLIP's joint space, by the text tower of a checkpoint. Tokenizer and tower are open_clip's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchbank.encoders.openai.checkpoints import load_state
from patchbank.errors import ConfigError, WeightsError

INSTALL = 'pip install "patchbank[text]"'


def encode_texts(path: Path, texts: Sequence[str], activation: str = "quickgelu") -> Tensor:
    """The texts' features, as OpenAI's ``encode_text`` computes them on the CPU.

    Args:
        activation: of the checkpoint's MLPs, in both towers.

    Returns:
        (T, D) float32 on the CPU, not normalised to unit length.

    Raises:
        ConfigError: open_clip is not installed; a text is empty, or longer than the tower takes.
        WeightsError: the checkpoint cannot be read, or has no text tower.
    """
    try:
        from open_clip.model import build_model_from_openai_state_dict
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise ConfigError(f"Encoding texts needs open_clip: {INSTALL}") from None
    state = load_state(path)
    needed = ("text_projection", "positional_embedding", "token_embedding.weight")
    if lacking := [name for name in needed if name not in state or state[name].ndim != 2]:
        raise WeightsError(f"{path} holds no text tower: it has no matrix {lacking[0]}.")
    longest = len(state["positional_embedding"])
    tokenizer = SimpleTokenizer(context_length=longest)
    if (words := len(state["token_embedding.weight"])) < tokenizer.vocab_size:
        raise WeightsError(
            f"{path} has no usable text tower: it has a vocabulary of {words:,} tokens, and CLIP's has "
            f"{tokenizer.vocab_size:,}."
        )
    for text in texts:
        count = len(tokenizer.encode(text))
        if not count:
            raise ConfigError("--text is empty: give it a phrase, such as 'a person riding a bicycle'.")
        if count > longest - 2:  # two tokens mark the beginning and the end
            raise ConfigError(
                f"--text {text[:40]!r}... is {count} tokens long, and the text tower takes {longest - 2}."
            )
    try:
        model = build_model_from_openai_state_dict(state, activation == "quickgelu", torch.float32).float()
        with torch.inference_mode():
            features: Tensor = model.encode_text(tokenizer(list(texts)))
    except Exception as error:  # open_clip takes shapes and names from the file
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{path} has no usable text tower: {reason}") from error
    if not features.isfinite().all():
        raise WeightsError(f"{path} gives texts features of NaN or Inf. Use another checkpoint.")
    return features.clone()
