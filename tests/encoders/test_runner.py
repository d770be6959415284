"""The runner, and an encoder's fast paths: each equals the original, and none is lost silently."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchbank import ExtractConfig, Runner, encoders, extract, load_dataset, load_encoder, open_bank
from patchbank.config import Partition, Precision
from patchbank.encoders import attention
from patchbank.encoders import runner as runner_module
from patchbank.encoders.base import flops
from patchbank.encoders.defaults import auto_batch_size, compiles
from patchbank.encoders.device import resolve_device, resolve_devices
from patchbank.encoders.openai import OpenAISpec
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual
from patchbank.encoders.openai.registry import MODELS
from patchbank.encoders.packed import Linear
from patchbank.errors import ConfigError, PatchbankError
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute, load_runner
from patchbank.features import CLS, GRID
from patchbank.files import sha256_of
from patchbank.preprocess import preprocess
from tests.reference.original import Original
from tests.support import REPOSITORY, TINY, contents, patchbank, photographs, relative_error, tower_of

BOUND = 2e-6
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], Tensor]:
    """Six photographs: their files, and the tiny model's input."""
    names = photographs(tmp_path / "images", 6)
    paths = [tmp_path / "images" / name for name in names]
    pixels = [torch.from_numpy(preprocess(Image.open(path), OpenAISpec(TINY).input).copy()) for path in paths]
    return paths, torch.stack(pixels)


@pytest.fixture
def spec(tiny_weights: Path) -> OpenAISpec:
    """The tiny model with its weights."""
    return OpenAISpec(TINY, checkpoint=Checkpoint(tiny_weights, sha256_of(tiny_weights)))


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether both have the same outputs, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_packed_and_unpacked_layers_equal_the_original(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    paths, pixels = pictures
    original = Original(tiny_weights)
    parameters = load_visual(TINY, Checkpoint(tiny_weights, ""), rounding=False)
    plain = tower_of(TINY, parameters)
    packed = tower_of(TINY, parameters).pack(6)
    if torch.backends.mkldnn.is_available():
        assert all(layer._handle is not None for layer in packed.modules() if isinstance(layer, Linear))
    for each in (plain, packed):
        with torch.no_grad():
            tokens = each(pixels)["patch_tokens"]
        for path, found in zip(paths, tokens, strict=True):
            assert relative_error(found, original(path)) <= BOUND


@pytest.mark.parametrize("images", [1, 3, 100])
def test_attention_equals_torchs_own(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """For any number of images in a batched product."""
    torch.manual_seed(0)
    batch, tokens, heads = 5, 17, 3
    monkeypatch.setattr(attention, "_SCORE_BYTES", images * heads * tokens * tokens * 4)
    qkv = torch.randn(batch, tokens, 3, heads, 80).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(*qkv, scale=0.2).transpose(1, 2).reshape(batch, tokens, -1)
    assert torch.allclose(attention.attention(*qkv, 0.2), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(attention._attention_on_cpu(*qkv, 0.2, None), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(attention.attention(*qkv.bfloat16(), 0.2).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_what_is_fused_into_it(dtype: torch.dtype, activation: Any, bias: bool) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(7, 5), torch.randn(7) if bias else None
    x, residual = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    expected = F.linear(x, weight, b)
    expected = {"none": lambda x: x, "silu": F.silu, "gelu": F.gelu}[activation](expected)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for rows in (None, 6):
        layer = Linear(weight, b, dtype, activation=activation)
        if rows:
            layer.pack(rows)
        assert torch.allclose(layer(x.to(dtype)).float(), expected, **near)
        if activation == "none":
            found = layer(x.to(dtype), residual.clone())
            assert found.dtype == torch.float32
            assert torch.allclose(found, expected + residual, **near)


@pytest.mark.parametrize("model", MODELS)
def test_products_are_those_of_the_architecture(model: str) -> None:
    """By hand: 12 width² per token and layer, the attention's two, the patch embedding and the projection."""
    m = MODELS[model]
    tokens = m.tokens + 1
    by_hand = 2 * m.layers * (12 * tokens * m.width**2 + 2 * tokens**2 * m.width)
    by_hand += 2 * m.tokens * 3 * m.patch_size**2 * m.width + 2 * tokens * m.width * m.output_dim
    assert flops(OpenAISpec(m)) == by_hand


def out_of_memory_above(limit: int, runner: Runner) -> list[int]:
    """Make the encoder fail as CUDA does if a batch does not fit; returns the sizes of those that did."""
    forward, sizes = runner.encoder, []

    def limited(pixels: Tensor) -> dict[str, Tensor]:
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        sizes.append(len(pixels))
        return forward(pixels)

    runner.encoder = limited  # type: ignore[assignment]
    return sizes


def test_a_batch_that_does_not_fit_is_halved_for_good(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    _, pixels = pictures
    runner = load_encoder("tiny", weights=tiny_weights)
    expected = runner(pixels)
    sizes = out_of_memory_above(2, runner)
    assert equal(runner(pixels), expected)
    assert max(sizes) <= 2 and runner.largest_batch <= 2
    sizes.clear()
    assert equal(runner(pixels), expected)
    assert max(sizes) <= 2  # it is not tried again
    [note] = runner.notes
    assert "did not fit" in note and "--batch-size" in note


def test_not_enough_memory_for_one_image(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    runner = load_encoder("tiny", weights=tiny_weights)
    out_of_memory_above(0, runner)
    with pytest.raises(PatchbankError, match="not enough free memory for one image"):
        runner(pictures[1])


def test_a_run_with_batches_that_do_not_fit_says_so_and_goes_on(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 6)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "expected", tiny_config)
    plan = make_plan(dataset, tmp_path / "bank", tiny_config)
    runner = load_runner(plan)
    assert runner is not None
    out_of_memory_above(2, runner)
    summary = execute(plan, runner)
    assert any("did not fit" in note for note in summary.notes)
    assert contents(tmp_path / "bank") == contents(tmp_path / "expected")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_submit_gives_all_outputs_rounded(
    pictures: tuple[list[Path], Tensor], tiny_weights: Path, dtype: torch.dtype
) -> None:
    runner = load_encoder("tiny", weights=tiny_weights)
    found = runner.submit(pictures[1], dtype)()
    assert equal(found, {name: value.to(dtype) for name, value in runner(pictures[1]).items()})


@pytest.mark.parametrize("cores", [1, 2, 4, 6])
def test_parts_of_a_batch_are_the_same_on_any_number_of_cores(tiny_weights: Path, cores: int) -> None:
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        runner = load_encoder("tiny", weights=tiny_weights, output=("patch_tokens", "cls", "block:1"))
        assert torch.get_num_threads() == cores
        with torch.no_grad():
            parts = [runner.encoder(part) for part in pixels.split(4)]
            whole = runner.encoder(pixels)
        found = runner(pixels)
        assert equal(found, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        assert max(relative_error(found[name], whole[name]) for name in whole) < BOUND
        torch.set_num_threads(1)  # later than it was loaded
        assert equal(runner(pixels), found) and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_an_encoder_that_does_not_say_it_is_called_by_one_thread_at_a_time(spec: OpenAISpec) -> None:
    class Stateful:
        def __init__(self, encoder: Any) -> None:
            self.encoder = encoder
            self.input, self.outputs, self.identity = encoder.input, encoder.outputs, encoder.identity
            self.calls: list[int] = []

        def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
            self.calls.append(len(pixels))
            found: dict[str, Tensor] = self.encoder(pixels)
            return found

    class Other(OpenAISpec):
        def load(self, device: torch.device, batch_size: int) -> Any:
            return Stateful(super().load(device, batch_size))

    runner = Runner(Other(TINY, checkpoint=spec.checkpoint), CPU, batch_size=8)
    runner(torch.zeros(8, 32, 32, 3, dtype=torch.uint8))
    assert runner.encoder.calls == [8]  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes(tiny_weights: Path) -> None:
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from tests.support import TINY
from patchbank.encoders.openai.registry import MODELS
MODELS["tiny"] = TINY
from patchbank import load_encoder
runner = load_encoder("tiny", weights={str(tiny_weights)!r})
pixels = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
whole = runner(pixels)
if (child := os.fork()) == 0:
    torch.set_num_threads(1)  # as in a data-loader worker
    print(all(torch.allclose(whole[name], value) for name, value in runner(pixels).items()), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


def test_an_encoder_of_other_outputs_size_and_grid(tiny_weights: Path) -> None:
    options = {"output": ("block:1", "cls"), "input_size": (32, 64), "pool_grid": 2}
    runner = load_encoder("tiny", weights=tiny_weights, **options)  # type: ignore[arg-type]
    found = runner(torch.zeros(1, 32, 64, 3, dtype=torch.uint8))
    assert {name: value.shape for name, value in found.items()} == {"block:1": (1, 8, 64), CLS: (1, 32)}


def test_an_empty_batch(tiny_weights: Path) -> None:
    found = load_encoder("tiny", weights=tiny_weights)(torch.zeros(0, 32, 32, 3, dtype=torch.uint8))
    assert {name: value.shape for name, value in found.items()} == {CLS: (0, 32), GRID: (0, 16, 32)}


def test_bfloat16_without_instructions_for_it_is_noted(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "has_bfloat16", lambda: False)
    [note] = load_encoder("tiny", weights=tiny_weights, precision="bf16").notes
    assert "no bfloat16 instructions" in note
    assert not load_encoder("tiny", weights=tiny_weights).notes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_residual_stream_is_float32(precision: Precision) -> None:
    runner = Runner(encoders.random(ExtractConfig(model="tiny", precision=precision)), CPU)
    seen: list[torch.dtype] = []
    for block in runner.encoder.tower.blocks:  # type: ignore[attr-defined]
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    runner(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert seen == [torch.float32] * TINY.layers


def test_auto_compiles_long_runs_on_cuda_alone() -> None:
    spec = OpenAISpec(MODELS["ViT-L/14@336px"])
    assert not compiles("auto", spec, 10_000_000, "cpu")
    assert not compiles("auto", spec, 47_000, "cuda")
    assert compiles("auto", spec, 1_000_000, "cuda")
    assert compiles("on", spec, 1, "cpu")
    assert not compiles("off", spec, 10_000_000, "cuda")


def test_a_compiler_that_fails_is_noted_in_a_line_and_the_bank_says_so(
    tmp_path: Path, tiny_config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> object:
        def call(_: Tensor) -> Tensor:
            raise RuntimeError("the compiler broke\nat great length")

        return call

    photographs(tmp_path / "images", 3)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "expected", tiny_config)
    monkeypatch.setattr(torch, "compile", failing)
    summary = extract(dataset, tmp_path / "bank", replace(tiny_config, compile="on"))
    [note] = summary.notes
    assert note == "The encoder could not be compiled (RuntimeError: the compiler broke); it runs uncompiled."
    assert not open_bank(tmp_path / "bank").manifest.compiled
    assert contents(tmp_path / "bank") == contents(tmp_path / "expected")


@pytest.mark.full
def test_without_a_cpp_compiler(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 3)
    done = patchbank(
        *("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", "--compile", "on"),
        *("--model", "tiny", "--weights", tiny_weights),
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        check=0,
    )
    assert "could not be compiled (no C++ compiler works: install no-such-compiler, or set CXX)" in done.stderr
    assert len(open_bank(tmp_path / "bank")) == 3


@needs_compiler
@pytest.mark.full
def test_a_compiled_run_that_is_interrupted_goes_on_compiled_to_the_same_bytes(
    tmp_path: Path, tiny_weights: Path
) -> None:
    names = photographs(tmp_path / "images", 6)
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def run(bank: str, *options: str) -> dict[str, object]:
        done = patchbank(
            *("extract", "folder", tmp_path / "images", "--out", tmp_path / bank, "--layout", "ezhoi", "--json"),
            *("--model", "tiny", "--weights", tiny_weights, "--batch-size", "4", *options),
            env=cache,
            check=0,
        )
        [summary] = json.loads(done.stdout)
        return summary

    run("whole", "--compile", "on")
    run("parts", "--compile", "on", "--limit", "3")
    assert run("parts", "--compile", "off")["notes"] == ["The bank was begun compiled; that was kept."]
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    bank, original = open_bank(tmp_path / "whole"), Original(tiny_weights)
    assert bank.manifest.compiled
    for name in names:
        assert relative_error(bank[name], original(tmp_path / "images" / name)) <= BOUND
    run("plain")
    assert run("plain", "--compile", "on")["notes"] == []  # nothing was left to do


def test_a_compiled_forward_may_give_the_same_memory_each_time(
    pictures: tuple[list[Path], Tensor], tiny_weights: Path
) -> None:
    """As CUDA graphs do; and batches of another size do not go through it."""
    runner = load_encoder("tiny", weights=tiny_weights)
    pixels = pictures[1][:4]
    expected = runner(pixels), runner(pixels.flip(0))
    memory = {name: torch.empty_like(value) for name, value in expected[0].items()}
    forward, sizes = runner.encoder, []

    def compiled(batch: Tensor) -> dict[str, Tensor]:
        sizes.append(len(batch))
        return {name: memory[name].copy_(value) for name, value in forward(batch).items()}

    runner.batch_size, runner._compiled = 4, compiled
    found = runner(pixels), runner(pixels.flip(0))
    assert all(equal(*pair) for pair in zip(found, expected, strict=True))
    runner(pixels[:3])
    assert sizes == [4, 4]


def test_an_encoder_is_loaded_again_for_another_batch_size(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    dataset = load_dataset("folder", tmp_path / "images")
    plans = [make_plan(dataset, tmp_path / str(size), replace(tiny_config, batch_size=size)) for size in (2, 2, 4)]
    first = load_runner(plans[0])
    assert load_runner(plans[1], [first]) is first
    assert load_runner(plans[2], [first]) is not first


def test_compiling_is_decided_by_all_images_of_the_run(
    tmp_path: Path, tiny_config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("patchbank.extraction.plan.compiles", lambda _, __, images, ___: asked.append(images) or False)
    photographs(tmp_path / "images", 7)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "bank", replace(tiny_config, limit=3))
    make_plan(dataset, tmp_path / "bank", tiny_config)
    make_plan(dataset, tmp_path / "bank", replace(tiny_config, partition=Partition(1, 3)))
    assert asked == [3, 7, 7]


def test_a_batch_that_no_machine_has_memory_for(spec: OpenAISpec) -> None:
    with pytest.raises(ConfigError, match=r"needs about .* of memory, and this machine has"):
        Runner(spec, CPU, batch_size=1 << 40)
    large = replace(spec, request=ExtractConfig(input_size=(1 << 22, 1 << 22)))
    with pytest.raises(ConfigError, match=r"input_size 4194304x4194304 needs about .* Choose a smaller one"):
        Runner(large, CPU)


def test_a_runner_goes_to_another_process(pictures: tuple[list[Path], Tensor], spec: OpenAISpec) -> None:
    _, pixels = pictures
    runner = Runner(spec, CPU, batch_size=6)
    sent = pickle.dumps(runner)
    assert len(sent) < 10_000
    assert equal(pickle.loads(sent)(pixels), runner(pixels))


def test_images_are_encoded_as_a_runs_are(pictures: tuple[list[Path], Tensor], spec: OpenAISpec) -> None:
    paths, pixels = pictures
    runner = Runner(spec, CPU, batch_size=6)
    images = [Image.open(path) for path in paths]
    assert equal(runner.encode(images), runner(pixels))
    squashed = [torch.from_numpy(preprocess(image, spec.input, "squash").copy()) for image in images]
    assert equal(runner.encode(images, "squash"), runner(torch.stack(squashed)))


@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 32, 31, 3), (1, 3, 32, 32)])
def test_pixels_of_another_shape_or_dtype_are_refused(spec: OpenAISpec, shape: tuple[int, ...]) -> None:
    runner = Runner(spec, CPU)
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(B, 32, 32, 3\)"):
        runner(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pixels must be uint8"):
        runner(torch.zeros(1, 32, 32, 3))


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = [torch.device("cuda", index) for index in range(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert resolve_devices("auto", "fp16") == resolve_devices("cuda", "tf32") == cuda
    assert resolve_devices("cuda:2,0,2", "fp32") == [cuda[2], cuda[0]]
    assert resolve_devices("cuda:1", "fp32") == [cuda[1]]
    assert resolve_devices("cpu", "bf16") == [CPU]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_devices("auto", "fp32") == [CPU]
    for wrong, words in (("cuda", "sees 0 CUDA devices"), ("tpu", "no device 'tpu'"), ("mps", "is not supported")):
        with pytest.raises(ConfigError, match=words):
            resolve_device(wrong, "fp32")
    with pytest.raises(ConfigError, match="needs CUDA"):
        resolve_device("cpu", "fp16")


def test_a_batch_has_about_64k_tokens_on_a_gpu() -> None:
    assert auto_batch_size((14, 14), "cpu") == 8
    for grid, count in (((14, 14), 256), ((24, 24), 64), ((3, 5), 256), ((32, 64), 32)):
        assert auto_batch_size(grid, "cuda") == count


def test_the_number_of_threads_does_not_matter(full_size_weights: Path) -> None:
    """Workers of a cluster use other numbers of threads, and make the same bytes."""
    runner = load_encoder("ViT-B/16", weights=full_size_weights)
    pixels = torch.randint(0, 256, (2, 224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(runner(pixels))
    finally:
        torch.set_num_threads(before)
    assert all(equal(each, found[0]) for each in found)
