"""Stored dtypes: their bytes, their errors, and numbers that cannot be stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import (
    NotFiniteError,
    fields,
    memory,
    pack,
    quantise,
    sample_bytes,
    samples_a_shard,
    unpack,
)
from patchbank.features import Output
from patchbank.files import sha256_of_chunks
from tests.support import relative_error, tiny_manifest

# What the docs state for each dtype and normally distributed tokens: bytes of a ViT-B/16 image, relative error.
STATED = {
    "float32": (403_456, 0.0),
    "float16": (201_728, 3e-4),
    "bfloat16": (201_728, 2.4e-3),
    "int8": (102_160, 1e-2),
}


def vit_b16(dtype: str) -> Manifest:
    tiny = tiny_manifest("shards", dtype)
    shapes = {"cls": (512,), "patch_tokens": (196, 512)}
    return replace(tiny, outputs={name: replace(each, shape=shapes[name]) for name, each in tiny.outputs.items()})


def dequantise(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    output = Output(shape=tuple(numbers.shape), dtype="int8", block=1)
    fields = {"x": numbers.view(torch.uint8).numpy(), "x.scale": scale.view(torch.uint8).numpy()}
    out = torch.empty(1, *numbers.shape)
    unpack(output, "x", fields, out)
    return out[0]


def both(tokens: torch.Tensor, cls: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"patch_tokens": tokens, "cls": cls}


@pytest.mark.parametrize("dtype", STATED)
def test_bytes_and_errors_are_those_stated(dtype: str) -> None:
    manifest = vit_b16(dtype)
    tokens, cls = torch.randn(196, 512), torch.randn(512)
    packed = pack(manifest, both(tokens, cls))
    size, error = STATED[dtype]
    assert sample_bytes(manifest.outputs) == sum(tensor.nbytes for tensor in packed.values()) == size
    stored = packed["patch_tokens"]
    read = dequantise(stored, packed["patch_tokens.scale"]) if "patch_tokens.scale" in packed else stored.float()
    assert relative_error(read, tokens) <= error
    assert relative_error(packed["cls"].float(), cls) <= error
    assert samples_a_shard(manifest.outputs, 256_000_000) == 256_000_000 // size


def test_a_float16_image_takes_at_most_051_of_the_original_pickle() -> None:
    assert sample_bytes(vit_b16("float16").outputs) <= 0.505 * 401_823


tokens = st.integers(0, 2**32 - 1).map(
    lambda seed: (lambda g: torch.randn(7, 16, generator=g) * 10 ** (40 * torch.rand(7, 1, generator=g) - 20))(
        torch.Generator().manual_seed(seed)
    )
)


@given(tokens)
def test_what_int8_holds_is_not_changed_by_int8(original: torch.Tensor) -> None:
    scale, numbers = quantise(original)
    again = quantise(dequantise(numbers, scale))
    assert torch.equal(again[0], scale)
    assert torch.equal(again[1], numbers)
    assert int(numbers.abs().max()) == 127  # never -128, and the whole range is used
    assert ((dequantise(numbers, scale) - original).abs() <= 0.501 * scale.unsqueeze(-1)).all()


def test_a_zero_token_stays_one() -> None:
    original = torch.randn(3, 8)
    original[1] = 0
    scale, numbers = quantise(original)
    assert scale[1] == 0
    assert not dequantise(numbers, scale)[1].any()


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", "nan"), ("float32", "inf"), ("float16", "1e5"), ("int8", "nan"), ("int8", "-inf")]
)
def test_what_is_not_finite_is_not_stored(dtype: str, value: str) -> None:
    manifest = tiny_manifest("shards", dtype)
    good = torch.randn(16, 32), torch.randn(32)
    pack(manifest, both(*good))
    for number, bad in enumerate(good):
        bad = bad.clone()
        bad.view(-1)[5] = float(value)
        with pytest.raises(NotFiniteError, match="not finite"):
            pack(manifest, both(*(bad if number == position else each for position, each in enumerate(good))))


def test_a_wrong_shape_is_an_error() -> None:
    manifest = tiny_manifest("shards", "int8")
    for shapes in (((17, 32), (32,)), ((16, 32), (33,))):
        with pytest.raises(ValueError, match="must be"):
            pack(manifest, both(*(torch.randn(shape) for shape in shapes)))


def test_every_field_owns_its_storage_and_counts_in_the_checksum() -> None:
    batch = torch.randn(8, 17, 32)
    manifest = tiny_manifest("shards", "float32")
    packed = pack(manifest, both(batch[3, 1:], batch[3, 0]))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in packed.values())
    parts = {name: memory(tensor) for name, tensor in packed.items()}
    before = sha256_of_chunks(parts.values())
    for field in fields(manifest.outputs):
        packed[field.name].view(-1)[0] += 1
        assert sha256_of_chunks(parts.values()) != before
        before = sha256_of_chunks(parts.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_refused_at_any_place(dtype: str, value: float) -> None:
    manifest = tiny_manifest("shards", dtype)
    for column in range(manifest.shape[1]):
        tokens = torch.ones(manifest.shape)
        tokens[3, column] = value
        with pytest.raises(NotFiniteError):
            pack(manifest, both(tokens, torch.ones(manifest.shape[1])))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000])
def test_every_nan_is_refused_as_int8(bits: int) -> None:
    manifest = tiny_manifest("shards", "int8")
    for column in range(manifest.shape[1]):
        tokens = torch.ones(manifest.shape)
        tokens.view(torch.int32)[3, column] = bits
        with pytest.raises(NotFiniteError):
            pack(manifest, both(tokens, torch.ones(manifest.shape[1])))
