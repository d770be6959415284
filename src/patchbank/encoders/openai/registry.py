"""The CLIP models patchbank knows: their shapes, official files and checksums. Imports no torch.

Shapes and file names are those of OpenAI's release (https://github.com/openai/CLIP, ``clip/clip.py``).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from patchbank.errors import ConfigError

# The mean and standard deviation of CLIP's training images, of RGB scaled to 0..1 (OpenAI's ``_transform``).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEAD = 64  # the width of every CLIP's attention heads: OpenAI's code derives their number from it


@dataclass(frozen=True)
class Model:
    """One CLIP vision transformer.

    Attributes:
        name: OpenAI's name.
        bank_prefix: its name in EZ-HOI's directories (``clipbase``, ``clip336``), or a similar one.
        file_name: the official checkpoint's name in a checkpoint directory.
        sha256: the official checkpoint's SHA-256; empty if there is no official file.
        input_size: the side of the square input, in pixels.
        patch_size: the side of a patch, in pixels.
        width, layers: the transformer's.
        output_dim: D, the dimension of the joint image-text space.
        url: of the official file; empty if it cannot be downloaded.
    """

    name: str
    bank_prefix: str
    file_name: str
    sha256: str
    input_size: int
    patch_size: int
    width: int
    layers: int
    output_dim: int
    url: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw): rows and columns of patches."""
        side = self.input_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """N: patch tokens per image, without [CLS]."""
        return self.grid[0] * self.grid[1]

    @property
    def heads(self) -> int:
        """Attention heads of each layer."""
        return self.width // HEAD


def _openai(name: str, prefix: str, sha256: str, size: int, patch: int, width: int, layers: int, out: int) -> Model:
    file_name = name.replace("/", "-").replace("@", "-") + ".pt"
    # OpenAI's server keeps each file under its checksum.
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file_name}"
    return Model(name, prefix, file_name, sha256, size, patch, width, layers, out, url)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _openai(
            "ViT-B/32",
            "clipb32",
            "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            *(224, 32, 768, 12, 512),
        ),
        _openai(
            "ViT-B/16",
            "clipbase",
            "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
            *(224, 16, 768, 12, 512),
        ),
        _openai(
            "ViT-L/14",
            "clipl14",
            "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
            *(224, 14, 1024, 24, 768),
        ),
        _openai(
            "ViT-L/14@336px",
            "clip336",
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
            *(336, 14, 1024, 24, 768),
        ),
    )
}


def get_model(name: str) -> Model:
    """The model of this name, in any case and with any signs between: ``vit-b-16``.

    Raises ConfigError, which lists all models, if it is unknown.
    """
    if name in MODELS:
        return MODELS[name]
    plain = {_letters(each): model for each, model in MODELS.items()}
    if (model := plain.get(_letters(name))) is not None:
        return model
    near = difflib.get_close_matches(_letters(name), plain, 1)
    guess = f"Did you mean {plain[near[0]].name}? " if near else ""
    raise ConfigError(f"There is no model {name!r}. {guess}Choose from: {', '.join(MODELS)}.")


def _letters(name: str) -> str:
    return "".join(each for each in name.casefold() if each.isalnum())
