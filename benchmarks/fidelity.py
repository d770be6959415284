"""How far are patchbank's features from the original scripts'? On every kind of picture, with untrained weights.

    python -m benchmarks.fidelity [--model ViT-L/14@336px] [--device cuda]

Each mode of computing, against OpenAI's package in float32 on the CPU, one image at a time: the relative error of an
image, ||a - b|| / ||b||, its median over the pictures and the largest; and the least cosine between a patch token and
the original's. Then the float32 error of every picture; and of flat pictures, the distances from float64 too. Ends in
one JSON line.
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

from benchmarks.common import finish, parser, print_table, spec_of, untrained
from patchbank import Runner
from patchbank.config import Decode, Precision
from patchbank.encoders.device import resolve_device
from patchbank.encoders.openai.registry import Model, get_model
from patchbank.errors import ConfigError
from patchbank.features import GRID
from patchbank.preprocess import preprocess

Mode = Callable[[Image.Image], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="ViT-B/16")
    command.add_argument("--device", default="cpu")
    command.add_argument("--without-compiled", action="store_true", help="leave the compiled encoder out")
    options = command.parse_args(arguments)
    model = get_model(options.model)
    with tempfile.TemporaryDirectory() as directory:
        images = Path(directory, "images")
        names = every_kind(images)
        weights = untrained(model, Path(directory))
        original = Original(weights)
        expected = {name: original(images / name) for name in names}
        errors: dict[str, dict[str, float]] = {}
        rows: list[list[object]] = []
        flat: list[list[object]] = []
        for mode, encode in _modes(model, weights, options.device, compiled=not options.without_compiled).items():
            least = 1.0
            errors[mode] = {}
            for name in names:
                with Image.open(images / name) as image:
                    found = encode(image)
                errors[mode][name] = relative_error(found, expected[name])
                least = min(least, float(F.cosine_similarity(found.double(), expected[name].double(), dim=-1).min()))
            each = errors[mode].values()
            if mode == "fp32":
                flat = [_flat(images / name, encode, original) for name in flat_pictures(images, model.input_size)]
            rows.append([mode, f"{statistics.median(each):.1e}", f"{max(each):.1e}", f"{least:.6f}"])
    print_table(["mode", "relative error, median", "largest", "least cosine of a token"], rows)
    print()
    print_table(["picture", "fp32"], [[name, f"{errors['fp32'][name]:.1e}"] for name in names])
    print()
    print_table(["flat picture", "fp32", "fp32 from float64", "the original from float64"], flat)
    finish(
        "fidelity",
        *("pillow", "clip-anytorch"),
        device=resolve_device(options.device, "fp32"),
        model=options.model,
        largest_relative_error={mode: max(each.values()) for mode, each in errors.items()},
        flat=flat,
        modes={row[0]: row[1:] for row in rows},  # type: ignore[misc]
    )


def _flat(path: Path, encode: Mode, original: Original) -> list[object]:
    with Image.open(path) as image:
        found, expected, exact = encode(image), original(path), original.exact(path)
    pairs = ((found, expected), (found.double(), exact), (expected.double(), exact))
    return [path.name, *(f"{relative_error(*pair):.1e}" for pair in pairs)]


def _modes(model: Model, weights: Path, device: str, *, compiled: bool) -> dict[str, Mode]:
    """Every way that this device can compute in; made one after the other as they are asked for."""
    modes: dict[str, Mode] = {}
    for precision in get_args(Precision):
        try:
            place = resolve_device(device, precision)
        except ConfigError:
            continue
        for is_compiled in (False, True) if compiled else (False,):
            runner = Runner(spec_of(model, weights, precision), place, batch_size=1, compiled=is_compiled)
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
