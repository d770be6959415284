"""The encoder's fast paths: each equals the original, and none of them is lost without a word."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchbank import ExtractConfig, PatchEncoder, extract, load_dataset, open_bank
from patchbank.config import Partition, Precision
from patchbank.encoders import compiling
from patchbank.encoders import encoder as encoder_module
from patchbank.encoders.openai import tower as vit
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual
from patchbank.encoders.openai.random import random_encoder
from patchbank.encoders.openai.registry import MODELS
from patchbank.encoders.packed import Linear
from patchbank.errors import ConfigError, PatchbankError
from patchbank.extraction.plan import make_plan
from patchbank.extraction.run import execute, load_encoder
from patchbank.preprocess import preprocess
from tests.reference.original import Original
from tests.support import TINY, contents, patchbank, photographs, relative_error

BOUND = 2e-6
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[list[Path], Tensor]:
    """Six photographs: their files, and the tiny model's input."""
    names = photographs(tmp_path / "images", 6)
    paths = [tmp_path / "images" / name for name in names]
    pixels = [torch.from_numpy(preprocess(Image.open(path), "center-crop", TINY.input_size).copy()) for path in paths]
    return paths, torch.stack(pixels)


def test_packed_and_unpacked_layers_equal_the_original(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    paths, pixels = pictures
    original = Original(tiny_weights)
    plain = vit.VisionTransformer(TINY, load_visual(TINY, Checkpoint(tiny_weights, "")), torch.float32)
    packed = vit.build(
        TINY, load_visual(TINY, Checkpoint(tiny_weights, "")), torch.float32, torch.device("cpu"), batch_size=6
    )
    if torch.backends.mkldnn.is_available():
        assert all(layer._handle is not None for layer in packed.modules() if isinstance(layer, Linear))
    for tower in (plain, packed):
        with torch.no_grad():
            tokens = tower(pixels)[:, 1:]
        for path, found in zip(paths, tokens, strict=True):
            assert relative_error(found, original(path)) <= BOUND


@pytest.mark.parametrize("images", [1, 3, 100])
def test_attention_equals_torchs_own(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """However many images the scores of batched products are computed for at once."""
    torch.manual_seed(0)
    batch, tokens, heads = 5, 17, 3
    monkeypatch.setattr(vit, "_SCORE_BYTES", images * heads * tokens * tokens * 4)
    qkv = torch.randn(batch, tokens, 3 * heads * 64)
    qkv[..., : heads * 64] /= 8  # as the weights do
    q, k, v = qkv.view(batch, tokens, 3, heads, 64).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(batch, tokens, -1)
    assert torch.allclose(vit.attention(qkv), expected, rtol=1e-5, atol=1e-5)
    by_products = vit._attention_on_cpu(qkv.view(batch, tokens, 3, heads, 64))
    assert torch.allclose(by_products, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(vit.attention(qkv.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_what_is_fused_into_it(dtype: torch.dtype, silu: bool, bias: bool) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(7, 5), torch.randn(7) if bias else None
    x, residual = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    expected = F.linear(x, weight, b)
    expected = F.silu(expected) if silu else expected
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for rows in (None, 6):
        layer = Linear(weight, b, dtype, silu=silu)
        if rows:
            layer.pack(rows)
        assert torch.allclose(layer(x.to(dtype)).float(), expected, **near)
        if not silu:
            found = layer(x.to(dtype), residual.clone())
            assert found.dtype == torch.float32
            assert torch.allclose(found, expected + residual, **near)


@pytest.mark.parametrize("model", MODELS)
def test_products_are_those_of_the_architecture(model: str) -> None:
    """By hand: 12 width² a token and layer, the attention's two, the patch embedding and the projection."""
    m = MODELS[model]
    tokens = m.tokens + 1
    by_hand = 2 * m.layers * (12 * tokens * m.width**2 + 2 * tokens**2 * m.width)
    by_hand += 2 * m.tokens * 3 * m.patch_size**2 * m.width + 2 * tokens * m.width * m.output_dim
    assert m.flops == by_hand


def out_of_memory_above(limit: int, encoder: PatchEncoder) -> list[int]:
    """Make the encoder fail as CUDA does where a batch does not fit; returns the sizes of those that did."""
    forward, sizes = encoder._forward, []

    def limited(pixels: Tensor) -> Tensor:
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        sizes.append(len(pixels))
        return forward(pixels)

    encoder._forward = limited
    return sizes


def test_a_batch_that_does_not_fit_is_halved_for_good(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    _, pixels = pictures
    encoder = PatchEncoder.load("tiny", weights=tiny_weights)
    expected = encoder.all_tokens(pixels)
    sizes = out_of_memory_above(2, encoder)
    assert torch.equal(encoder.all_tokens(pixels), expected)
    assert max(sizes) <= 2
    sizes.clear()
    assert torch.equal(encoder.all_tokens(pixels), expected)
    assert max(sizes) <= 2  # it is not tried again
    [note] = encoder.notes
    assert "did not fit" in note and "--batch-size" in note


def test_not_enough_memory_for_one_image(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    encoder = PatchEncoder.load("tiny", weights=tiny_weights)
    out_of_memory_above(0, encoder)
    with pytest.raises(PatchbankError, match="not enough free memory for one image"):
        encoder(pictures[1])


def test_a_run_whose_batches_do_not_fit_says_so_and_goes_on(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 6)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "expected", tiny_config)
    plan = make_plan(dataset, tmp_path / "bank", tiny_config)
    encoder = load_encoder(plan)
    assert encoder is not None
    out_of_memory_above(2, encoder)
    summary = execute(plan, encoder)
    assert any("did not fit" in note for note in summary.notes)
    assert contents(tmp_path / "bank") == contents(tmp_path / "expected")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_submit_gives_all_tokens_rounded(
    pictures: tuple[list[Path], Tensor], tiny_weights: Path, dtype: torch.dtype
) -> None:
    encoder = PatchEncoder.load("tiny", weights=tiny_weights)
    found = encoder.submit(pictures[1], dtype)()
    assert torch.equal(found, encoder.all_tokens(pictures[1]).to(dtype))


def test_an_empty_batch(tiny_weights: Path) -> None:
    encoder = PatchEncoder.load("tiny", weights=tiny_weights)
    assert encoder(torch.zeros(0, 32, 32, 3, dtype=torch.uint8)).shape == (0, 16, 32)


def test_bfloat16_without_instructions_for_it_is_told_of(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "has_bfloat16", lambda: False)
    [note] = PatchEncoder.load("tiny", weights=tiny_weights, precision="bf16").notes
    assert "no bfloat16 instructions" in note
    assert not PatchEncoder.load("tiny", weights=tiny_weights).notes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_residual_stream_is_float32(precision: Precision) -> None:
    encoder = random_encoder(TINY, precision, torch.device("cpu"))
    seen: list[torch.dtype] = []
    for block in encoder._forward.blocks:  # type: ignore[attr-defined]
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    encoder(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert seen == [torch.float32] * TINY.layers


def test_auto_compiles_long_runs_on_cuda_alone() -> None:
    model, cuda, cpu = MODELS["ViT-L/14@336px"], torch.device("cuda"), torch.device("cpu")
    assert not compiling.decide("auto", model, 10_000_000, cpu)
    assert not compiling.decide("auto", model, 47_000, cuda)
    assert compiling.decide("auto", model, 1_000_000, cuda)
    assert compiling.decide("on", model, 1, cpu)
    assert not compiling.decide("off", model, 10_000_000, cuda)


def test_a_compiler_that_fails_is_told_of_in_a_line_and_the_bank_says_so(
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
    encoder = PatchEncoder.load("tiny", weights=tiny_weights)
    pixels = pictures[1][:4]
    expected = encoder.all_tokens(pixels), encoder.all_tokens(pixels.flip(0))
    memory, forward, sizes = torch.empty_like(expected[0]), encoder._forward, []

    def compiled(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return memory.copy_(forward(batch))

    encoder.batch_size, encoder.compiled, encoder._compiled = 4, True, compiled
    found = encoder.all_tokens(pixels), encoder.all_tokens(pixels.flip(0))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    encoder.all_tokens(pixels[:3])
    assert sizes == [4, 4]


def test_an_encoder_is_loaded_anew_for_another_batch_size(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    dataset = load_dataset("folder", tmp_path / "images")
    plans = [make_plan(dataset, tmp_path / str(size), replace(tiny_config, batch_size=size)) for size in (2, 2, 4)]
    first = load_encoder(plans[0])
    assert load_encoder(plans[1], first) is first
    assert load_encoder(plans[2], first) is not first


def test_compiling_is_decided_by_all_images_of_the_run(
    tmp_path: Path, tiny_config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(compiling, "decide", lambda _, __, images, ___: asked.append(images) or False)
    photographs(tmp_path / "images", 7)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "bank", replace(tiny_config, limit=3))
    make_plan(dataset, tmp_path / "bank", tiny_config)
    make_plan(dataset, tmp_path / "bank", replace(tiny_config, partition=Partition(1, 3)))
    assert asked == [3, 7, 7]


def test_a_batch_that_no_machine_has_memory_for(tiny_weights: Path) -> None:
    with pytest.raises(ConfigError, match="would need about"):
        PatchEncoder(TINY, Checkpoint(tiny_weights, ""), device="cpu", batch_size=1 << 40)


def test_an_encoder_goes_to_another_process(pictures: tuple[list[Path], Tensor], tiny_weights: Path) -> None:
    _, pixels = pictures
    encoder = PatchEncoder(TINY, Checkpoint(tiny_weights, ""), device="cpu", batch_size=6)
    sent = pickle.dumps(encoder)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent)(pixels), encoder(pixels))


def test_the_number_of_threads_does_not_matter(full_size_weights: Path) -> None:
    """Workers of a cluster compute with other numbers of threads, and make the same bytes."""
    encoder = PatchEncoder.load("ViT-B/16", weights=full_size_weights)
    pixels = torch.randint(0, 256, (2, 224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(encoder(pixels))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
