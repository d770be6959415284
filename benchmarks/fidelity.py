"""How far are patchbank's features from the original scripts'? On every kind of picture, with untrained weights.

    python -m benchmarks.fidelity [--model ViT-L/14@336px] [--device cuda]

Prints a table, a picture a line, and ends in one JSON line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tests.reference.original import Original
from tests.support import every_kind, relative_error

from benchmarks.common import finish, parser, untrained
from patchbank import PatchEncoder
from patchbank.encoder.encoder import resolve_device
from patchbank.models import get_model


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="ViT-B/16")
    command.add_argument("--device", default="cpu")
    options = command.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        images = Path(directory, "images")
        weights = untrained(get_model(options.model), Path(directory))
        original = Original(weights)
        encoders = {
            precision: PatchEncoder.load(options.model, weights=weights, precision=precision, device=options.device)
            for precision in ("fp32", "bf16")
        }
        errors: dict[str, dict[str, float]] = {precision: {} for precision in encoders}
        print(f"{'picture':24}{'fp32':>12}{'bf16':>12}")
        for name in every_kind(images):
            expected = original(images / name)
            for precision, encoder in encoders.items():
                with Image.open(images / name) as image:
                    errors[precision][name] = relative_error(encoder.encode([image])[0], expected)
            print(f"{name:24}{errors['fp32'][name]:12.1e}{errors['bf16'][name]:12.1e}")
    finish(
        "fidelity",
        *("pillow", "clip-anytorch"),
        device=resolve_device(options.device, "fp32"),
        model=options.model,
        largest_relative_error={precision: max(values.values()) for precision, values in errors.items()},
    )


if __name__ == "__main__":
    main()
