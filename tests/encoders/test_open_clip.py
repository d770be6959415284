"""The family of open_clip's models against open_clip itself, with the same seeded weights."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from patchbank import Runner, encoders, open_bank
from patchbank.config import ExtractConfig
from patchbank.encoders import open_clip as family
from patchbank.encoders.clip import Shape
from patchbank.encoders.outputs import chosen
from patchbank.encoders.tower import VisionTransformer as Tower
from patchbank.errors import ConfigError, WeightsError
from patchbank.extraction.recompute import spec_of
from patchbank.features import Input
from patchbank.files import sha256_of
from patchbank.preprocess import preprocess
from tests.support import every_kind, patchbank, photographs, relative_error

BOUND = 2e-6
CPU = torch.device("cpu")
SMALL = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 8}  # a text tower


def model_of(arch: str, layers: int | None = None, **vision: Any) -> nn.Module:
    """open_clip's model with its own seeded weights, a small text tower, and perhaps fewer layers."""
    made = open_clip.get_model_config(arch)
    made["vision_cfg"] |= vision | ({"layers": layers} if layers else {})
    torch.manual_seed(0)
    quick = made.get("quick_gelu", False)
    return open_clip.CLIP(made["embed_dim"], made["vision_cfg"], SMALL, quick_gelu=quick).eval()


def written(model: nn.Module, path: Path, prefix: str = "") -> Path:
    save_file({prefix + name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def pixels_of(made: Input, directory: Path, count: int = 2) -> Tensor:
    images = [Image.open(directory / name) for name in photographs(directory, count)]
    return torch.stack([torch.from_numpy(preprocess(image, made).copy()) for image in images])


def normalised(pixels: Tensor, made: Input) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (made.mean, made.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.mark.parametrize("arch", ["ViT-B-16", pytest.param("ViT-B-16-quickgelu", marks=pytest.mark.full)])
def test_patch_tokens_and_encode_image_at_real_size(tmp_path: Path, arch: str) -> None:
    """Patch tokens are open_clip's own, projected; cls is ``encode_image``; blocks are its intermediates."""
    model = model_of(arch)
    path = written(model, tmp_path / "model.safetensors")
    config = ExtractConfig(model=f"open_clip/{arch}", weights=path, output=("patch_tokens", "cls", "pooled", "block:6"))
    spec = encoders.find(config)
    assert spec.identity["activation"] == ("quickgelu" if "quick" in arch else "gelu")
    pixels = pixels_of(spec.input, tmp_path / "images")
    found = Runner(spec, CPU, batch_size=2)(pixels)
    images = normalised(pixels, spec.input)
    with torch.no_grad():
        every = model.visual.forward_intermediates(images, normalize_intermediates=True, output_fmt="NLC")
        cls, layers = model.encode_image(images), every["image_intermediates"]
        tokens = layers[-1] @ model.visual.proj
    expected = {"patch_tokens": tokens, "cls": cls, "pooled": cls, "block:6": layers[5]}
    for name, value in expected.items():
        assert list(found) == list(expected)
        for mine, theirs in zip(found[name], value, strict=True):
            assert relative_error(mine, theirs) <= BOUND, name


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({"head_width": 80, "width": 400}, id="ViT-H's heads"),
        pytest.param({"head_width": 88, "width": 352, "mlp_ratio": 4.3637}, id="ViT-g's heads and MLPs"),
        pytest.param({"ls_init_value": 0.3}, id="layer scale"),
        pytest.param({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, id="CLIPA"),
    ],
)
def test_what_open_clips_architectures_vary(facts: dict[str, Any]) -> None:
    vision = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32, **facts}
    settings = {"embed_dim": 64, "vision_cfg": vision}
    shape = family._shape("small", settings)
    torch.manual_seed(0)
    visual: VisionTransformer = open_clip.CLIP(64, vision, SMALL).visual.eval()
    for name, value in visual.named_parameters():
        if "ls_" in name or ".ln_" in name or "_embedding" in name:
            value.data += 0.2 * torch.randn_like(value)
    parameters = visual.state_dict()
    assert {name: tuple(value.shape) for name, value in parameters.items()} == shape.parameters(8, 16)
    made = Input(size=(32, 32), patch=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    wanted = ("patch_tokens", "pooled", *(() if shape.mean else ("cls",)))
    outputs = chosen(ExtractConfig(output=wanted), "small", shape.architecture, made)
    tower = Tower(parameters, made, outputs, torch.float32, heads=shape.heads, activation="gelu")
    images = normalised(pixels, made)
    with torch.no_grad():
        found = tower.pack(3)(pixels)
        every = visual.forward_intermediates(images, normalize_intermediates=True, output_fmt="NLC")
        tokens = every["image_intermediates"][-1] @ visual.proj
    expected = {"patch_tokens": tokens, "pooled": every["image_features"], "cls": every["image_features"]}
    for name in wanted:
        assert relative_error(found[name], expected[name]) <= BOUND, name
    assert ("naclip" in shape.architecture.names()) == ("no_ln_pre" not in facts)


@pytest.mark.parametrize(
    ("arch", "layers", "outputs"),
    [
        pytest.param("ViT-B-16-SigLIP", None, ("patch_tokens", "pooled"), id="SigLIP", marks=pytest.mark.full),
        pytest.param("EVA02-B-16", None, ("patch_tokens", "cls", "pooled"), id="EVA02", marks=pytest.mark.full),
    ],
)
def test_towers_that_are_timms(tmp_path: Path, arch: str, layers: int | None, outputs: tuple[str, ...]) -> None:
    model = model_of(arch, layers)
    path = written(model, tmp_path / "model.safetensors", prefix="module.")
    spec = encoders.find(ExtractConfig(model=f"open_clip/{arch}", weights=path, output=outputs))
    pixels = pixels_of(spec.input, tmp_path / "images")
    found = Runner(spec, CPU, batch_size=2)(pixels)
    images, trunk = normalised(pixels, spec.input), model.visual.trunk
    with torch.no_grad():
        tokens = trunk.forward_intermediates(images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
        image, tokens = model.encode_image(images), tokens if "SigLIP" in arch else trunk.head(tokens)
    expected = {"patch_tokens": tokens, "cls": image, "pooled": image}
    for name in outputs:
        assert relative_error(found[name], expected[name]) <= BOUND, name


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("ViT-B-16:laion2b_s34b_b88k", None),
        ("ViT-B-16:laion2b_s34b_b88k", (448, 448)),
        ("ViT-B-16:laion2b_s34b_b88k", (224, 336)),
        ("ViT-H-14-378-quickgelu:dfn5b", None),
        ("ViT-L-14-CLIPA-336:datacomp1b", None),
        ("ViT-B-16-SigLIP2-256:webli", (256, 384)),
        ("MobileCLIP-B:datacompdr", None),
    ],
)
def test_pixels_are_those_of_open_clips_own_transform(tmp_path: Path, model: str, size: tuple[int, int] | None) -> None:
    arch, tag = model.split(":")
    made = family.random(ExtractConfig(model=f"open_clip/{model}", input_size=size)).input
    stated = merge_preprocess_dict(PreprocessCfg(size=made.size), open_clip.get_pretrained_cfg(arch, tag))
    transform = image_transform_v2(PreprocessCfg(**stated), is_train=False)
    assert (made.mean, made.std) == tuple(map(tuple, (transform.transforms[-1].mean, transform.transforms[-1].std)))
    transform.transforms[-2:] = []  # to a tensor, and normalised
    for name in every_kind(tmp_path):
        with Image.open(tmp_path / name) as image:
            theirs = transform(image)
            assert preprocess(image, made).tobytes() == theirs.convert("RGB").tobytes(), name


@pytest.mark.full
def test_other_input_sizes_through_the_command_line(tmp_path: Path) -> None:
    """Two blocks of ViT-B/32 with LAION's names, in a bank; positions interpolated as by open_clip."""
    model = model_of("ViT-B-32")
    path = written(model, tmp_path / "model.safetensors")
    names = photographs(tmp_path / "images", 2, size=(300, 200))
    options = ["--model", "open_clip/ViT-B-32", "--weights", path, "--input-size", "448x224", "--resize", "squash"]
    outputs = [word for name in ("block:2", "patch_tokens", "cls") for word in ("--output", name)]
    bank_at = tmp_path / "bank"
    patchbank("extract", "folder", tmp_path / "images", "--out", bank_at, *options, *outputs, check=0)
    bank = open_bank(bank_at)
    assert bank.manifest.grid == (14, 7) and list(bank.manifest.outputs) == ["block:2", "patch_tokens", "cls"]
    assert spec_of(bank.manifest, ExtractConfig(weights=path), None).identity == bank.manifest.identity
    wide = model_of("ViT-B-32", image_size=(448, 224))
    state = model.state_dict()
    open_clip.model.resize_pos_embed(state, wide)
    wide.load_state_dict(state)
    for name in names:
        with Image.open(tmp_path / "images" / name) as image:
            resized = image.resize((224, 448), Image.Resampling.BICUBIC)
        made = bank.manifest.input
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(1, 448, 224, 3)
        with torch.no_grad():
            every = wide.visual.forward_intermediates(
                normalised(pixels, made), normalize_intermediates=True, output_fmt="NLC"
            )
            tokens = every["image_intermediates"][-1][0] @ wide.visual.proj
        assert relative_error(bank[name], tokens) <= BOUND
        assert relative_error(bank.output(name, "block:2"), every["image_intermediates"][1][0]) <= BOUND
        assert relative_error(bank.output(name, "cls"), every["image_features"][0]) <= BOUND


@pytest.mark.full
def test_a_tags_weights_come_from_the_hubs_cache(tmp_path: Path) -> None:
    repo, commit = "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K", "a" * 40
    home = tmp_path / "hub" / repo
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    path = written(model_of("ViT-B-32"), home / "snapshots" / commit / "open_clip_model.safetensors")
    photographs(tmp_path / "images", 1)
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    options = ["--out", tmp_path / "bank", "--model", "open_clip/ViT-B-32:laion2b_s34b_b79k", "--output", "cls"]
    patchbank("extract", "folder", tmp_path / "images", *options, check=0, env=env)
    identity = open_bank(tmp_path / "bank").manifest.identity
    assert identity["weights"] == sha256_of(path) and identity["activation"] == "gelu"
    assert identity["model"] == "open_clip/ViT-B-32:laion2b_s34b_b79k"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r'needs open_clip: pip install "patchbank\[open-clip\]"'):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-16"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("ViT-B-61", "has no model 'ViT-B-61'. Did you mean open_clip/ViT-B-16 or"),
        ("ViT-B-16:laion", "open_clip's ViT-B-16 has no tag 'laion': it has openai, laion400m_e31"),
        ("ViT-B-16:laion", "datacomp_xl_s13b_b90k and 1"),
        ("ViT-B-16", "does not say which weights: add a tag (openai, laion400m_e31"),
        ("ViT-S-16", "does not say which weights: add a file with --weights"),
        ("ViT-B-16:openai", "computes GELU. Use --model open_clip/ViT-B-16-quickgelu:openai."),
        ("RN50:openai", "open_clip/RN50 is no vision transformer: it has no grid of patch tokens."),
        ("ViTamin-XL-384:datacomp1b", "VisionTransformer has no grid of patch tokens (tokens are (1, 256, 1152)"),
        ("RN50-quickgelu:openai", "is no vision transformer: it has no grid of patch tokens."),
        ("convnext_base:laion400m_s13b_b51k", "is no vision transformer: ConvNeXt has no grid of patch tokens."),
        ("coca_ViT-B-32:laion2b_s13b_b90k", "is built with attentional_pool True, which patchbank does not compute"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(model: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason.replace("--", ""))):
        encoders.find(ExtractConfig(model=f"open_clip/{model}"))


def test_options_that_contradict_an_architecture_are_refused() -> None:
    assert family.random(ExtractConfig(model="open_clip/ViT-B-16", activation="gelu")).identity["activation"] == "gelu"
    with pytest.raises(ConfigError, match="open_clip's ViT-B-16 computes gelu"):
        family.random(ExtractConfig(model="open_clip/ViT-B-16", activation="quickgelu"))
    with pytest.raises(ConfigError, match="round_weights is for OpenAI's models"):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-16", round_weights=True))


def test_the_config_beside_a_file_is_believed(tmp_path: Path) -> None:
    path = written(model_of("ViT-M-32"), tmp_path / "model.safetensors")
    config, beside = ExtractConfig(model="open_clip/ViT-M-32", weights=path), tmp_path / "open_clip_config.json"
    assert encoders.find(config).input.mean[0] == pytest.approx(0.4815, abs=1e-4)
    vision = {"width": 512, "patch_size": 32}

    def says(quick: bool = False, vision: dict[str, Any] = vision, **preprocess: Any) -> None:
        model = {"embed_dim": 512, "vision_cfg": vision, "quick_gelu": quick}
        beside.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))

    says(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], interpolation="bilinear", resize_mode="squash")
    made = encoders.find(config).input
    assert (made.mean, made.std, made.interpolation, made.resize) == ((0.5,) * 3, (0.5,) * 3, "bilinear", "squash")
    says(quick=True)
    with pytest.raises(WeightsError, match=r"was trained with quickgelu.*ViT-M-32-quickgelu"):
        encoders.find(config)
    says(vision={**vision, "width": 768})
    with pytest.raises(WeightsError, match="asks for width 768, which ViT-M-32 does not have"):
        encoders.find(config)
    says(resize_mode="longest")
    with pytest.raises(ConfigError, match="resize_mode longest"):
        encoders.find(config)
    beside.write_text("{")
    with pytest.raises(WeightsError, match="cannot be read as open_clip's config"):
        encoders.find(config)


def test_files_of_other_models_are_refused(tmp_path: Path, tiny_weights: Path) -> None:
    path = written(model_of("ViT-M-32"), tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"visual\.conv1\.weight has the shape|visual\.class_embedding has the shape"
    ):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-32", weights=path))
    with pytest.raises(WeightsError, match=r"visual\.trunk\.\S+ is missing"):
        encoders.find(ExtractConfig(model="open_clip/EVA02-B-16", weights=path))
    state = {name: value.contiguous() for name, value in model_of("ViT-M-32").state_dict().items()}
    save_file({**state, "visual.proj": state["visual.proj"].to(torch.int8)}, path)
    with pytest.raises(WeightsError, match=r"visual\.proj holds int8 numbers"):
        encoders.find(ExtractConfig(model="open_clip/ViT-M-32", weights=path)).load(CPU, 1)
    save_file({"vision_model.embeddings.patch_embedding.weight": torch.ones(1)}, tmp_path / "clip.safetensors")
    with pytest.raises(
        WeightsError, match=r"the weights of open_clip/ViT-B-32: .*By its names it is a model of transf"
    ):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-32", weights=tmp_path / "clip.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"no parameter's name begins with 'visual\.'\. Its first"):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-32", weights=tmp_path / "other.safetensors"))
    with pytest.raises(WeightsError, match=r"was trained with quickgelu, as its format .*/ViT-B-32-quickgelu"):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-32", weights=tiny_weights))
    with pytest.raises(WeightsError, match="There is no checkpoint"):
        encoders.find(ExtractConfig(model="open_clip/ViT-B-32", weights=tmp_path / "none.pt"))


def test_random_weights_and_descriptions() -> None:
    runner = Runner(family.random(ExtractConfig(model="open_clip/ViT-M-32")), CPU)
    assert runner(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))["patch_tokens"].shape == (1, 49, 512)
    found = family.describe("open_clip/ViT-H-14-quickgelu:dfn5b")
    assert found is not None and found[1:] == ((224, 224), (16, 16), 1024, 1, True)
    assert family.describe("open_clip/RN50-quickgelu:openai") is None
    listed = family.names()
    assert "open_clip/ViT-B-16:laion2b_s34b_b88k" in listed and "open_clip/ViT-B-16:openai" not in listed


def test_shapes_hold_every_parameter() -> None:
    shape = Shape(blocks=1, width=8, heads=2, hidden=10, dim=4, layer_scale=True)
    assert shape.parameters(2, 9)["transformer.resblocks.0.ls_2.gamma"] == (8,)
