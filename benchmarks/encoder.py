"""How fast is the forward pass? patchbank's encoder against other towers and engines with the same weights.

    python -m benchmarks.encoder [--model ViT-B/16,ViT-L/14@336px] [--precision fp32,bf16] [--images 24] [--rounds 5]
        [--batch-size 8] [--device cuda] [--without NAME,NAME]

- original single, original: OpenAI's package, eager, one image at a time as in the scripts, and in batches;
- open_clip, transformers: eager, in batches, with the final norm and projection on every token;
- inductor frozen: patchbank's tower with plain layers, under `torch.compile` with its weights frozen into the graph;
- onnxruntime, openvino: open_clip's tower, exported by `torch.onnx.export` for this batch size;
- patchbank, patchbank compiled: as `patchbank extract` runs it, and with `--compile on`;
- patchbank undivided: a batch on all cores at once instead of in parts (CPU);

Images are 24 by default, and sixteen batches on CUDA. patchbank gets uint8 pixels and normalises them within the time;
the others get normalised pixels. Exporting, compiling and a first batch are not timed. Each one's tokens are compared
with the original's in fp32. Variants that are not installed, or lack a precision, are left out with the reason.

A second table has the attention of one layer: patchbank's and torch's `scaled_dot_product_attention`.

Variants run in turn within one process; medians over the rounds count. The limit is what the model's matrix products
alone take (`patchbank.bench.limit`). Ends in one JSON line.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tests.support import relative_error
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.common import (
    alternate,
    finish,
    hico_photographs,
    options_of,
    print_table,
    seconds_of,
    skipped,
    spec_of,
    untrained,
)
from patchbank.bench.limit import product_rate
from patchbank.budget import keep_freed_memory
from patchbank.encoders.attention import attention
from patchbank.encoders.defaults import auto_batch_size
from patchbank.encoders.device import DTYPES, float32_products, resolve_device
from patchbank.encoders.openai import OpenAISpec
from patchbank.encoders.openai.registry import Model, get_model
from patchbank.encoders.runner import Runner
from patchbank.encoders.tower import VisionTransformer
from patchbank.features import CLS, GRID
from patchbank.preprocess import preprocess

Forward = Callable[[Tensor], Tensor]  # a batch to its (B, 1 + N, D) tokens


def main(arguments: Sequence[str] | None = None) -> None:
    model = {"model": ["ViT-B/16"], "precision": ["fp32", "bf16"], "device": "cpu"}
    options = options_of(__doc__, arguments, **model, images=int, batch_size=int, rounds=5, without=[])
    keep_freed_memory()  # as the command line does
    options.device = resolve_device(options.device, "fp32")
    results: dict[str, Any] = {}
    for name in options.model:
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(options, get_model(name), Path(directory))
            for precision in options.precision:
                results[f"{name} {precision}"] = bench.measure(precision)
    finish(
        "encoder",
        *(*peers.VERSIONS, "onnx", "onnxruntime", "openvino"),
        device=options.device,
        rounds=options.rounds,
        results=results,
    )


class Bench:
    """One model: its pictures, the towers, and their measurements in a precision."""

    def __init__(self, options: Any, model: Model, place: Path) -> None:
        self.model, self.place, self.device = model, place, options.device
        self.rounds, self.without = options.rounds, options.without
        self.batch_size = options.batch_size or auto_batch_size(model.grid, self.device.type)
        count = options.images or (16 * self.batch_size if self.device.type == "cuda" else 24)
        count = -(-count // self.batch_size) * self.batch_size  # whole batches: exported graphs take nothing else
        self.weights = untrained(model, place)
        self.spec = spec_of(model, self.weights)
        paths = hico_photographs(place / "images", min(count, 64))
        pixels = []
        for path in paths:
            with Image.open(path) as image:
                pixels.append(preprocess(image, self.spec.input))
        stacked = torch.from_numpy(np.stack(pixels))
        self.pixels = stacked[torch.arange(count) % len(stacked)]
        self.images = self._normalised(self.pixels)
        with torch.no_grad():
            self.expected = peers.OriginalTower(self.weights)(self.images[: self.batch_size])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(B, n, n, 3) uint8 -> (B, 3, n, n) float32, as in OpenAI's preprocessing."""
        normalise = peers.preprocessing(self.model.input_size).transforms[-1]
        return normalise(pixels.permute(0, 3, 1, 2).float().div(255))

    def measure(self, precision: str) -> dict[str, Any]:
        """Measure every variant in one precision: print its table, and return its part of the JSON line."""
        with torch.no_grad():
            # Outside the next block: torch's exporter fails if the precision of products has been set.
            forwards = self._forwards(precision)
        with torch.no_grad(), float32_products(precision):
            errors: dict[str, float] = {}
            for name, (forward, inputs, _) in list(forwards.items()):
                try:
                    tokens = forward(inputs[: self.batch_size]).float().cpu()
                    errors[name] = relative_error(tokens, self.expected)
                    peers.check(name, errors[name], precision)
                except Exception as error:  # any error of a compiler or an engine
                    if name == "patchbank":
                        raise
                    skipped(f"{name}, {precision}", error)
                    del forwards[name]
            measures = {name: partial(self._timed, *variant) for name, variant in forwards.items()}
            seconds = alternate(measures, self.rounds)
            attention = self._attention(precision)
        limit = product_rate(self.spec, precision, self.device, self.batch_size)  # type: ignore[arg-type]
        rate = {name: len(self.pixels) / each for name, each in seconds.items()}
        of_limit = {name: each / limit.images_per_second for name, each in rate.items()}

        print_table(
            [f"{self.model.name}, {precision}, batches of {self.batch_size}", "images/s", "of the limit", "error"],
            [
                *([name, rate[name], of_limit[name], errors[name]] for name in rate),
                [f"the limit: {limit.flops_per_second / 1e9:,.0f} GFLOP/s", limit.images_per_second, 1, None],
            ],
        )
        print_table(["attention of a layer", "ms a batch"], [[name, 1000 * each] for name, each in attention.items()])
        return {
            "batch_size": self.batch_size,
            "limit_images_per_second": limit.images_per_second,
            "limit_flops_per_second": limit.flops_per_second,
            "peak_flops_per_second": limit.peak,
            "images_per_second": rate,
            "of_the_limit": of_limit,
            "relative_error": errors,
            "attention_seconds_a_batch": attention,
        }

    def _timed(self, forward: Forward, inputs: Tensor, batch_size: int) -> float:
        def run() -> None:
            for first in range(0, len(inputs), batch_size):
                forward(inputs[first : first + batch_size])

        return seconds_of(run, self.device)

    def _forwards(self, precision: str) -> dict[str, tuple[Forward, Tensor, int]]:
        """Every available variant: (forward, its inputs, images per call)."""
        towers = peers.towers(self.model, self.weights)
        pixels, images, size = self.pixels.to(self.device), self.images.to(self.device), self.batch_size
        wanted = {}
        plain = towers.get("open_clip")
        if plain is not None:
            wanted |= {
                "onnxruntime": partial(self._onnxruntime, plain, precision),
                "openvino": partial(self._openvino, plain, precision),
            }
        # Exported before the towers are moved to the device and rounded to the precision.
        engines = {name: self._made(f"{name}, {precision}", name, make) for name, make in wanted.items()}
        towers = {name: peers.cast(tower, precision, self.device) for name, tower in towers.items()}
        forwards: dict[str, tuple[Forward, Tensor, int]] = {}
        for name, tower in towers.items():
            if name == "original":
                forwards["original single"] = tower, images, 1
            forwards[name] = tower, images, size
        forwards |= {name: (engine, images, size) for name, engine in engines.items() if engine is not None}
        frozen = partial(self._frozen, precision, pixels[:size])
        if (forward := self._made(f"inductor frozen, {precision}", "inductor frozen", frozen)) is not None:
            forwards["inductor frozen"] = forward, pixels, size
        for name, compiled in (("patchbank", False), ("patchbank compiled", True)):
            if (forward := self._made(name, name, partial(self._patchbank, precision, compiled))) is not None:
                forwards[name] = forward, pixels, size
        name = "patchbank undivided"
        undivided = partial(self._patchbank, precision, False, undivided=True)
        if self.device.type == "cpu" and (forward := self._made(name, name, undivided)) is not None:
            forwards[name] = forward, pixels, size
        return {name: each for name, each in forwards.items() if name not in self.without}

    def _made(self, what: str, name: str, make: Callable[[], Forward]) -> Forward | None:
        """The result of `make`; None if it fails, with a line that says why."""
        if name in self.without:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of exporters and compilers
                return make()
        except Exception as error:  # not installed, or any error of an exporter
            skipped(what, error)
            return None

    def _frozen(self, precision: str, pixels: Tensor) -> Forward:
        """`torch.compile` with the weights as constants, which Inductor may then lay out as it likes."""
        import torch._inductor.config

        spec = self.spec
        assert isinstance(spec, OpenAISpec)
        dtype: torch.dtype = DTYPES[precision]  # type: ignore[index]
        tower = VisionTransformer(
            spec.parameters(), spec.input, spec.outputs, dtype, heads=self.model.heads, activation=spec.activation
        )
        compiled = torch.compile(tower.to(self.device))
        with torch._inductor.config.patch(freezing=True):
            compiled(pixels.to(self.device))
        return lambda pixels: _tokens(compiled(pixels))

    def _patchbank(self, precision: str, compiled: bool, undivided: bool = False) -> Forward:
        spec = spec_of(self.model, self.weights, precision)
        runner = Runner(spec, self.device, batch_size=self.batch_size, compiled=compiled)
        if compiled and not runner.compiled:
            raise RuntimeError(runner.notes[-1])
        if undivided:
            runner._threads = None

        return lambda pixels: _tokens(runner(pixels))

    def _export(self, tower: nn.Module) -> Path:
        path = self.place / "tower.onnx"
        if not path.exists():
            with contextlib.redirect_stdout(None):  # the exporter reports its steps
                torch.onnx.export(tower, (self.images[: self.batch_size],), path, input_names=["images"], dynamo=True)
        return path

    def _onnxruntime(self, tower: nn.Module, precision: str) -> Forward:
        import onnxruntime

        if precision != "fp32":
            raise NotImplementedError("its kernels for this processor and graph compute in float32 alone")
        provider = "CUDAExecutionProvider" if self.device.type == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise NotImplementedError(f"this build has no {provider}")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(self._export(tower)), settings, providers=[provider])
        name = session.get_inputs()[0].name
        return lambda images: torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])

    def _openvino(self, tower: nn.Module, precision: str) -> Forward:
        import openvino

        if self.device.type != "cpu":
            raise NotImplementedError("it computes on Intel's devices and on processors")
        settings = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = openvino.Core().compile_model(str(self._export(tower)), "CPU", settings)
        return lambda images: torch.from_numpy(compiled(images.numpy())[0])

    def _attention(self, precision: str) -> dict[str, float]:
        """Seconds per batch of one layer's attention, by implementation."""
        tokens, width, heads = self.model.tokens + 1, self.model.width, self.model.heads
        qkv = torch.randn(self.batch_size, tokens, 3 * width).to(self.device, DTYPES[precision])  # type: ignore[index]
        q, k, v = qkv.view(self.batch_size, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)

        def torchs() -> Tensor:
            x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            return x.transpose(1, 2).reshape(self.batch_size, tokens, width)

        ways: dict[str, Callable[[], Tensor]] = {
            "patchbank": lambda: attention(q, k, v),
            "scaled_dot_product_attention": torchs,
        }
        peers.check("the attention", relative_error(attention(q, k, v).float(), torchs().float()), precision)
        return alternate({name: partial(seconds_of, way, self.device) for name, way in ways.items()}, 5 * self.rounds)


def _tokens(outputs: dict[str, Tensor]) -> Tensor:
    """[CLS] and the patch tokens, (B, 1 + N, D)."""
    return torch.cat([outputs[CLS].unsqueeze(1), outputs[GRID]], dim=1)


if __name__ == "__main__":
    main()
