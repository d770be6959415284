"""The numbers are those of the original scripts, to 2e-6, on every kind of picture; OpenAI's package is the oracle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from patchbank import extract, load_dataset, load_encoder, open_bank
from patchbank.config import ExtractConfig, Precision
from patchbank.encoders.openai.checkpoints import Checkpoint, load_visual
from patchbank.encoders.openai.registry import MEAN, MODELS
from patchbank.encoders.openai.untrained import write_untrained
from tests.reference.original import Original, pooled
from tests.support import (
    TINY,
    every_kind,
    flat_pictures,
    hico_list,
    patchbank,
    photographs,
    relative_error,
    tower_of,
    vcoco_dict,
    write_json,
)

BOUND = 2e-6


def encoder_of(weights: Path, precision: Precision = "fp32") -> Callable[..., Tensor]:
    """Opened images to the tiny model's patch tokens, (B, 16, 32)."""
    runner = load_encoder("tiny", weights=weights, precision=precision)
    return lambda *arguments: runner.encode(*arguments)["patch_tokens"]


def ezhoi_reader(directory: Path, file_name: str) -> Tensor:
    """As EZ-HOI reads: unpickle, divide each token in place by its length."""
    with open(directory / (file_name.split(".")[0] + "_clip.pkl"), "rb") as file:
        tokens = pickle.load(file)
    tokens /= tokens.norm(dim=-1, keepdim=True)
    return tokens


@pytest.mark.parametrize("model", ["tiny", pytest.param("ViT-B/16", marks=pytest.mark.full)])
def test_hicodet_equals_the_original_on_every_kind_of_picture(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    weights = request.getfixturevalue("tiny_weights" if model == "tiny" else "full_size_weights")
    images = tmp_path / "hicodet/hico_20160224_det/images/test2015"
    names = every_kind(images)
    write_json(tmp_path / "hicodet/test_hico.json", hico_list(names))

    run = ("extract", "hicodet", "--root", tmp_path, "--split", "test", "--model", model, "--weights", weights)
    patchbank(*run, check=0)

    original = Original(weights)
    patches, width = (16, 32) if model == "tiny" else (196, 512)
    directory = tmp_path / f"hicodet_pkl_files/{MODELS[model].bank_prefix}_img_hicodet_test"
    for name in names:
        expected = original(images / name)
        with open(directory / (name.split(".")[0] + "_clip.pkl"), "rb") as file:
            found = pickle.load(file)
        assert found.shape == (patches, width)
        assert found.dtype == torch.float32
        assert relative_error(found, expected) <= BOUND, name
    batch = torch.stack([ezhoi_reader(directory, name) for name in names])
    assert torch.allclose(batch.norm(dim=-1), torch.ones(len(names), patches))


@pytest.mark.parametrize("model", [pytest.param(name, marks=pytest.mark.full) for name in ("ViT-B/16", "ViT-B/32")])
def test_flat_pictures_are_as_near_to_float64_as_the_original(model: str, tmp_path: Path) -> None:
    """The original itself may be 2e-6 from float64 on them, so what it computes cannot be the measure alone."""
    write_untrained(MODELS[model], tmp_path / "weights.pt")
    original, runner = Original(tmp_path / "weights.pt"), load_encoder(model, weights=tmp_path / "weights.pt")
    for name in flat_pictures(tmp_path):
        with Image.open(tmp_path / name) as image:
            found = runner.encode([image])["patch_tokens"][0]
        exact, expected = original.exact(tmp_path / name), original(tmp_path / name)
        error = relative_error(found.double(), exact)
        assert error <= BOUND, name
        assert error <= 1.5 * relative_error(expected.double(), exact), name
        assert relative_error(found, expected) <= 2 * BOUND, name


@pytest.mark.parametrize("model", ["tiny", pytest.param("ViT-L/14@336px", marks=pytest.mark.full)])
def test_vcoco_equals_the_original(model: str, tmp_path: Path, tiny_weights: Path) -> None:
    weights = tiny_weights if model == "tiny" else tmp_path / "large.pt"
    if model != "tiny":
        write_untrained(MODELS[model], weights)
    images = tmp_path / "vcoco/mscoco2014/val2014"
    names = photographs(images, 2, size=(400, 290), prefix="COCO_val2014")
    write_json(tmp_path / "vcoco/instances_vcoco_test.json", vcoco_dict(names))

    run = ("extract", "vcoco", "--root", tmp_path, "--split", "val", "--model", model, "--weights", weights)
    patchbank(*run, "--batch-size", 2, check=0)

    original = Original(weights)
    bank = open_bank(tmp_path / f"vcoco_pkl_files/{MODELS[model].bank_prefix}_img_vcoco_val")
    assert sorted(bank) == names
    for name in names:
        assert bank[name].shape == ((16, 32) if model == "tiny" else (576, 768))
        assert relative_error(bank[name], original(images / name)) <= BOUND


@pytest.mark.parametrize("model", ["tiny", pytest.param("ViT-B/16", marks=pytest.mark.full)])
def test_the_cls_feature_is_openais_image_feature(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    weights = request.getfixturevalue("tiny_weights" if model == "tiny" else "full_size_weights")
    names = photographs(tmp_path / "images", 3, size=(300, 250))
    config = ExtractConfig(model=model, weights=weights, layout="shards")
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", config)
    bank, original = open_bank(tmp_path / "bank"), Original(weights)
    for name in names:
        assert relative_error(bank.cls(name), pooled(original, tmp_path / "images" / name)) <= BOUND
        assert relative_error(bank[name], original(tmp_path / "images" / name)) <= BOUND


def test_the_oracle_is_openais_model(tmp_path: Path, tiny_weights: Path) -> None:
    """The reference's first token is stock OpenAI's pooled feature: the oracle itself is checked."""
    [name] = photographs(tmp_path, 1)
    original = Original(tiny_weights)
    with torch.no_grad():
        image = original.preprocess(Image.open(tmp_path / name)).unsqueeze(0)
        first = original.encode_image(image)[0, 0]
    assert torch.allclose(first, pooled(original, tmp_path / name), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of every kind."""
    place = tmp_path_factory.mktemp("pictures")
    return [place / name for name in every_kind(place)]


@pytest.mark.parametrize("kind", ["grey", "cmyk", "palette", "rgba", "one_bit", "exif_rotated"])
def test_a_batch_gives_what_single_images_give(
    tmp_path: Path, pictures: list[Path], tiny_weights: Path, kind: str
) -> None:
    paths = [path for path in pictures if path.name.startswith(kind)]
    paths += [tmp_path / name for name in photographs(tmp_path, 5)]
    images = [Image.open(path) for path in paths]
    encode = encoder_of(tiny_weights)
    together = encode(images)
    original = Original(tiny_weights)
    for path, image, tokens in zip(paths, images, together, strict=True):
        assert relative_error(tokens, encode([image])[0]) <= BOUND
        assert relative_error(tokens, original(path)) <= BOUND


def test_what_the_program_around_it_chose_for_its_own_products_does_not_matter(
    tmp_path: Path, tiny_weights: Path
) -> None:
    image = Image.open(tmp_path / photographs(tmp_path, 1)[0])
    encode = encoder_of(tiny_weights)
    expected = encode([image])
    torch.set_float32_matmul_precision("medium")  # bfloat16 products where the processor has them
    try:
        assert torch.equal(encode([image]), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pixel_is_exact_in_every_precision(tiny_weights: Path, dtype: torch.dtype) -> None:
    """What is subtracted from the pixels before they are multiplied leaves numbers that the dtype holds exactly."""
    parameters = load_visual(TINY, Checkpoint(tiny_weights, ""), rounding=False)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 32, 32, 3)
    tower = tower_of(TINY, parameters, dtype=dtype)
    patches = tower._patches(pixels).float()
    assert torch.equal(patches.unique(), torch.unique(pixels.float().view(-1, 3) - tower.whole[:3].float()))
    assert float((tower.whole[:3].float() - 255 * torch.tensor(MEAN)).abs().max()) <= 0.5


def test_bf16_is_near(tmp_path: Path, tiny_weights: Path) -> None:
    image = Image.open(tmp_path / photographs(tmp_path, 1)[0])
    exact = encoder_of(tiny_weights)([image])
    near = encoder_of(tiny_weights, "bf16")([image])
    assert near.dtype == torch.float32
    assert 0 < relative_error(near, exact) < 0.03


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_stored_dtypes_are_the_rounded_features(tmp_path: Path, tiny_weights: Path, dtype: str) -> None:
    names = photographs(tmp_path / "images", 3)
    dataset = load_dataset("folder", tmp_path / "images")
    for stored in ("float32", dtype):
        extract(dataset, tmp_path / stored, ExtractConfig(model="tiny", weights=tiny_weights, dtype=stored))
    full, short = open_bank(tmp_path / "float32"), open_bank(tmp_path / dtype)
    for name in names:
        assert torch.equal(short[name], full[name].to(getattr(torch, dtype)))


def test_squash_and_pad_see_the_whole_image(tmp_path: Path, tiny_weights: Path) -> None:
    """Each equals the original's encoder on a picture that was brought to the square by hand."""
    name = photographs(tmp_path, 2, size=(160, 90))[1]
    image = Image.open(tmp_path / name)
    squashed = image.resize((32, 32), Image.Resampling.BICUBIC)
    padded = Image.new("RGB", (32, 32), (123, 117, 104))  # CLIP's mean colour
    padded.paste(image.resize((32, 18), Image.Resampling.BICUBIC), (0, 7))
    encode, original = encoder_of(tiny_weights), Original(tiny_weights)
    for mode, by_hand in (("squash", squashed), ("pad", padded)):
        by_hand.save(tmp_path / "by_hand.png")
        assert relative_error(encode([image], mode)[0], original(tmp_path / "by_hand.png")) <= BOUND


def test_a_gradient_can_lead_on_from_the_tokens(tmp_path: Path, tiny_weights: Path) -> None:
    image = Image.open(tmp_path / photographs(tmp_path, 1)[0])
    tokens = encoder_of(tiny_weights)([image])
    head = torch.nn.Linear(32, 3)
    head(tokens).sum().backward()
    assert head.weight.grad is not None
    tokens /= tokens.norm(dim=-1, keepdim=True)


def test_pixels_of_another_kind_are_refused(tiny_weights: Path) -> None:
    encoder = load_encoder("tiny", weights=tiny_weights)
    for pixels in (torch.rand(1, 32, 32, 3), torch.zeros(1, 16, 16, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(B, 32, 32, 3\)"):
            encoder(pixels)
