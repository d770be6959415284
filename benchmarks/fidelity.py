"""How far are patchbank's features from the original scripts'? On every kind of picture, with untrained weights.

    python -m benchmarks.fidelity [--model ViT-L/14@336px] [--device cuda]

Prints a table, a picture a line, and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import PIL
import torch
from PIL import Image
from tests.reference.original import Original
from tests.support import every_kind, relative_error

from patchbank import PatchEncoder
from patchbank.encoder.untrained import write_untrained
from patchbank.models import get_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        weights, images = Path(directory, "untrained.pt"), Path(directory, "images")
        write_untrained(get_model(options.model), weights)
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
    result = {
        "benchmark": "fidelity",
        "weights": "untrained",
        "model": options.model,
        "device": options.device,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "largest_relative_error": {precision: max(values.values()) for precision, values in errors.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
