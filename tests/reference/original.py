"""What the original extraction scripts compute, with OpenAI's own package, one image at a time.

EZ-HOI's fork of the package applies ``ln_post`` and ``proj`` to every token; stock OpenAI code is run here up to
there, module by module, and then those two.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import clip
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class Original:
    """``clip.load`` on the CPU, and the scripts' loop body; the model may be moved to another device or dtype."""

    def __init__(self, weights: Path) -> None:
        self._model, self.preprocess = clip.load(str(weights), device="cpu", jit=False)

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        return self._model.visual

    def __call__(self, path: Path) -> Tensor:
        """(N, D) float32: the tensor that the scripts pickle for one image."""
        with Image.open(path) as opened:
            image = self.preprocess(opened).unsqueeze(0)
        with torch.no_grad():
            return self.encode_image(image).squeeze(0)[1:]

    def exact(self, path: Path) -> Tensor:
        """(N, D) float64: the same of a picture in RGB of the model's size, with nothing rounded to float32 on the way.

        The mean and deviation are those that the scripts divide by, in float32.
        """
        wide = deepcopy(self)
        for layer in wide._model.double().modules():
            if isinstance(layer, nn.LayerNorm):  # OpenAI's computes in float32, whatever it is given
                layer.forward = partial(nn.LayerNorm.forward, layer)
        normalise = self.preprocess.transforms[-1]
        mean, std = (torch.tensor(each).double().view(3, 1, 1) for each in (normalise.mean, normalise.std))
        with Image.open(path) as image, torch.no_grad():
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
            return wide.encode_image(((pixels - mean) / std).unsqueeze(0)).squeeze(0)[1:]

    def encode_image(self, x: Tensor) -> Tensor:
        """(B, 3, n, n) -> (B, 1 + N, D), as the fork's ``encode_image``."""
        visual = self._model.visual
        x = visual.conv1(x.to(visual.conv1.weight.dtype))
        x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
        cls = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + visual.positional_embedding.to(x.dtype)
        x = visual.ln_pre(x).permute(1, 0, 2)
        x = visual.transformer(x).permute(1, 0, 2)
        return visual.ln_post(x) @ visual.proj


def pooled(original: Original, path: Path) -> Tensor:
    """Stock OpenAI's pooled feature of one image: the first token above must equal it."""
    with torch.no_grad(), Image.open(path) as opened:
        return original._model.encode_image(original.preprocess(opened).unsqueeze(0)).squeeze(0)
