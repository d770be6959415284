"""Untrained weights in OpenAI's archive format and size, for the demo and the tests. Their features mean nothing."""

from __future__ import annotations

import math
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from patchbank.encoders.clip import transformer_shapes
from patchbank.encoders.openai.registry import Model
from patchbank.encoders.openai.shapes import expected_shapes, is_half
from patchbank.files import scratch_directory
from patchbank.torch_files import Bounded
from patchbank.unpickling import PickleError, refusals

_MARK = "patchbank-untrained"  # the file in the archive that marks it
_CONTEXT, _VOCABULARY, _TEXT_LAYERS = 77, 49408, 12  # the text tower of every official model


def untrained_state(model: Model, seed: int = 0, *, vocabulary: int = _VOCABULARY) -> dict[str, Tensor]:
    """A whole CLIP's parameters under OpenAI's names, normally distributed, in the dtypes of the official files."""
    generator = torch.Generator().manual_seed(seed)
    text_width = max(64, 64 * (model.output_dim // 64))
    shapes = {f"visual.{name}": shape for name, shape in expected_shapes(model).items()}
    shapes |= {
        **transformer_shapes(text_width, min(model.layers, _TEXT_LAYERS), 4 * text_width),
        "positional_embedding": (_CONTEXT, text_width),
        "token_embedding.weight": (vocabulary, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "text_projection": (text_width, model.output_dim),
    }
    state = {name: _values(name, shape, generator) for name, shape in shapes.items()}
    return state | {"logit_scale": torch.tensor(math.log(1 / 0.07))}


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values as large as trained ones, so that activations neither vanish nor overflow float16."""
    noise = torch.randn(shape, generator=generator)
    if ".ln_" in f".{name}":
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if name.endswith(("bias", "embedding", "embedding.weight")):
        value = 0.02 * noise
    else:
        fan_in = math.prod(shape[1:]) if name.endswith("weight") else shape[0]
        value = noise / math.sqrt(fan_in)
    return value.half() if is_half(name) else value


def write_untrained(model: Model, path: Path, seed: int = 0, *, vocabulary: int = _VOCABULARY) -> None:
    """Write an untrained CLIP as a TorchScript archive, in the format of OpenAI's files. `clip.load` opens it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = untrained_state(model, seed, vocabulary=vocabulary)
    facts = {"input_resolution": model.input_size, "context_length": _CONTEXT, "vocab_size": vocabulary}
    root = nn.Module()
    for name, value in state.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(last, nn.Parameter(value, requires_grad=False))
    for name, fact in facts.items():
        root.register_buffer(name, torch.tensor(fact))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")  # deprecated, but the files' format
        # The archive contains its own file's name, so only its directory is temporary.
        with scratch_directory(path.parent) as scratch:
            torch.jit.save(torch.jit.script(root), str(scratch / path.name), _extra_files={_MARK: "random numbers"})
            (scratch / path.name).rename(path)


def is_untrained(path: Path) -> bool:
    """Whether a checkpoint says that its weights are random numbers."""
    try:
        with refusals(), Bounded(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith(f"/extra/{_MARK}") for name in archive.namelist())
    except (OSError, PickleError):
        return False
