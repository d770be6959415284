"""transformers' models by their repository's files, against the library's own calls on the same weights."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from patchbank import ExtractConfig, load_dataset, open_bank
from patchbank.encoders import encode_texts, find
from patchbank.encoders.hub import HubFile
from patchbank.encoders.runner import Runner
from patchbank.encoders.transformers import TESTED
from patchbank.encoders.transformers.configuration import KINDS
from patchbank.errors import ConfigError, PatchbankError, WeightsError, install
from patchbank.features import Input
from patchbank.preprocess import preprocess
from tests.encoders.test_hub import Hub, hub  # noqa: F401  # a fixture
from tests.support import REPOSITORY, every_kind, patchbank, photograph, photographs, relative_error

transformers = pytest.importorskip("transformers")

BOUND = 2e-6
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# preprocessor_config.json of repositories, as they are written there.
BIT = {
    **{"image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_center_crop": True, "resample": 3},
    **{"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, **IMAGENET},
}
CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}, "resample": 3}
DINOV3 = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224}, "resample": 2}
PROCESSORS = {
    "dinov2": BIT,
    "clip": CLIP,
    "siglip": SIGLIP,
    "beit": {
        "image_processor_type": "BeitImageProcessor",
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
    },
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2},
    "odd": {**BIT, "size": {"shortest_edge": 57}, "crop_size": {"height": 56, "width": 42}, "resample": 1},
    "signed": {**SIGLIP, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 0.5]},
}


def dinov2(registers: int) -> Any:
    made = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "image_size": 518, "patch_size": 14}
    if registers:
        return transformers.Dinov2WithRegistersConfig(**made, num_register_tokens=registers)
    return transformers.Dinov2Config(**made)


# The repository's name -> its class, configuration and preprocessing, at its real size.
REAL: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "facebook/dinov2-base": ("Dinov2Model", lambda: dinov2(0), BIT),
    "facebook/dinov2-with-registers-base": ("Dinov2WithRegistersModel", lambda: dinov2(4), BIT),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        "DINOv3ViTModel",
        lambda: transformers.DINOv3ViTConfig(num_register_tokens=4, key_bias=False),
        DINOV3,
    ),
    "google/siglip-base-patch16-224": ("SiglipModel", lambda: transformers.SiglipConfig(), SIGLIP),
    "openai/clip-vit-base-patch16": (
        "CLIPModel",
        lambda: transformers.CLIPConfig(vision_config={"patch_size": 16}),
        CLIP,
    ),
    "org/clip-vision-only": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(patch_size=16), CLIP),
    "org/clip-with-projection": (
        "CLIPVisionModelWithProjection",
        lambda: transformers.CLIPVisionConfig(patch_size=16),
        CLIP,
    ),
}

FULL = {"facebook/dinov2-base", "org/clip-vision-only", "org/clip-with-projection"}  # like others, but for a detail


def saved(directory: Path, made: str | Any, config: Any, processor: dict[str, Any], **options: Any) -> Any:
    """Write a repository with seeded weights, all of them other than a new model's; returns the library's model."""
    made = getattr(transformers, made) if isinstance(made, str) else made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = made(config).eval()
        for each in model.parameters():
            each.data.add_(torch.randn_like(each), alpha=0.02)
        model.save_pretrained(directory, **options)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def small(config: Any) -> Any:
    """A configuration of a few narrow blocks, with an image of 4 x 4 patches."""
    towers = [getattr(config, name) for name in ("vision_config", "text_config") if hasattr(config, name)]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    for tower in towers or [config]:
        for name, value in sizes.items():
            if hasattr(tower, name):
                setattr(tower, name, value)
    vision = getattr(config, "vision_config", config)
    vision.image_size = 4 * vision.patch_size
    if hasattr(vision, "num_register_tokens"):
        vision.num_register_tokens = 3
    for name in ("out_features", "out_indices"):
        if hasattr(vision, f"_{name}"):
            setattr(vision, f"_{name}", None)
    config._attn_implementation = "sdpa"
    return config


@pytest.fixture(autouse=True)
def _no_words(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """The library's words and bars are for its own calls in these tests; patchbank's leave none."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """For hundreds of megabytes of weights."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path / "model", ignore_errors=True)  # a test that is skipped wrote none


def runner(name: str, weights: Path | None, *outputs: str, **options: Any) -> Runner:
    config = ExtractConfig(model=f"transformers/{name}", weights=weights, output=outputs, **options)
    return Runner(find(config).obtain(), torch.device("cpu"), batch_size=2)


def expected(model: Any, pixels: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the library's documented calls give for normalised pixels."""
    whole = hasattr(model, "get_image_features")
    tower = getattr(model, "vision_model", model)
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True, **_interpolated(tower))
        norm = next(getattr(tower, each) for each in ("post_layernorm", "layernorm", "norm") if hasattr(tower, each))
        tokens = output.last_hidden_state
        if hasattr(tower, "pre_layrnorm"):  # CLIP's is not normed
            tokens = norm(tokens)
        if hasattr(model, "visual_projection"):
            tokens = model.visual_projection(tokens)
        pooled = output.pooler_output
        if whole:
            pooled = model.get_image_features(pixel_values=pixels, **_interpolated(tower))
            pooled = getattr(pooled, "pooler_output", pooled)
        elif hasattr(model, "visual_projection"):
            pooled = model(pixel_values=pixels, **_interpolated(tower)).image_embeds
        size = tower.config.patch_size
        first = tokens.shape[1] - (pixels.shape[2] // size) * (pixels.shape[3] // size)
        found = {"patch_tokens": tokens[:, first:], "cls": tokens[:, 0], "registers": tokens[:, 1:first]}
        for name in (each for each in names if each.startswith("block:")):
            hidden = output.hidden_states[int(name.split(":")[1])]
            found[name] = (hidden if name.endswith("raw") else norm(hidden))[:, first:]
    return {name: value for name, value in {**found, "pooled": pooled}.items() if name in names}


def _interpolated(tower: Any) -> dict[str, bool]:
    name = "interpolate_pos_encoding"
    return {name: True} if name in inspect.signature(tower.forward).parameters else {}


def normalised(made: Input, pixels: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (made.mean, made.std))
    return ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]


def largest_error(run: Runner, model: Any) -> float:
    image = photograph("coffee")
    found = run.encode([image])
    wanted = expected(model, normalised(run.spec.input, preprocess(image, run.spec.input)), list(found))
    assert found.keys() == wanted.keys()
    for name, output in run.spec.outputs.items():
        assert found[name].shape[1:] == wanted[name].shape[1:] == output.shape
    return max(relative_error(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in FULL)) for name in REAL])
def test_every_output_is_the_librarys(name: str, directory: Path) -> None:
    kind, config, processor = REAL[name]
    model = saved(directory, kind, config(), processor)
    names = ["patch_tokens", "pooled", "block:6", "block:6:raw", "block:12"]
    made = find(ExtractConfig(model=f"transformers/{name}", weights=directory)).made  # type: ignore[attr-defined]
    names += ["cls"] * made.cls + ["registers"] * bool(made.registers)
    assert largest_error(runner(name, directory, *names), model) <= BOUND
    if name in TESTED:
        spec = find(ExtractConfig(model=f"transformers/{name}", weights=directory))
        side, patch, dim, prefix, _ = TESTED[name]
        assert (spec.input.size, spec.input.patch) == ((side, side), patch)
        assert (spec.outputs["patch_tokens"].shape[1], made.prefix) == (dim, prefix)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("facebook/dinov2-base", (98, 126)),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", (96, 64)),
        ("org/clip-vision-only", (112, 96)),
    ],
)
def test_at_another_size_positions_are_the_librarys(name: str, size: tuple[int, int], directory: Path) -> None:
    kind, config, processor = REAL[name]
    config = config()
    config.num_hidden_layers = 4
    model = saved(directory, kind, small_indices(config), processor)
    run = runner(name, directory, "patch_tokens", "cls", input_size=size)
    assert run.spec.input.size == size
    assert largest_error(run, model) <= BOUND
    with pytest.raises(ConfigError, match="must be multiples"):
        runner(name, directory, input_size=(225, 225))


def test_a_model_of_images_that_are_not_square(directory: Path) -> None:
    """At its own size the library's interpolation of positions fails."""
    config = small(transformers.ViTConfig(patch_size=16))
    config.image_size = [32, 64]
    model = saved(directory, "ViTModel", config, {**PROCESSORS["vit"], "size": {"height": 32, "width": 64}})
    run = runner("a/b", directory)
    with torch.no_grad():
        image = normalised(run.spec.input, preprocess(photograph("coffee"), run.spec.input))
        wanted = model(image).last_hidden_state[:, 1:]
    assert relative_error(run.encode([photograph("coffee")])["patch_tokens"], wanted) <= BOUND


def small_indices(config: Any) -> Any:
    """Without stages that a backbone of other depth has."""
    for name in ("out_features", "out_indices"):
        if hasattr(config, f"_{name}"):
            setattr(config, f"_{name}", None)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_is_read_by_the_same_rules(kind: str, directory: Path) -> None:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = small(transformers.CONFIG_MAPPING[kind]())
    model_class = transformers.MODEL_MAPPING[type(config)]
    side = getattr(config, "vision_config", config).image_size
    model = saved(directory, model_class, config, {**SIGLIP, "size": {"height": side, "width": side}})
    found = find(ExtractConfig(model=f"transformers/a/{kind}", weights=directory))
    made = found.made  # type: ignore[attr-defined]
    run = runner(f"a/{kind}", directory, *made.names(), "block:1", "block:3:raw")
    tower = getattr(model, "vision_model", model)
    image = photograph("coffee")
    outputs = run.encode([image])
    pixels, options = normalised(run.spec.input, preprocess(image, run.spec.input)), {}
    if kind == "vit_mae":
        tower.config.mask_ratio, options = 0.0, {"noise": torch.arange(16)[None]}
    kept: list[Tensor] = []
    blocks = next(each for each in tower.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 3)
    for block in blocks:
        block.register_forward_hook(lambda *now: kept.append(now[2][0] if isinstance(now[2], tuple) else now[2]))
    with torch.no_grad():
        output = tower(pixel_values=pixels, **options)
        tokens = output.last_hidden_state
        if made.norm == "post_layernorm" and made.cls:  # CLIP's
            tokens = tower.post_layernorm(tokens)
        if made.projection:
            tokens = model.visual_projection(tokens)
        first = made.prefix
        wanted = {"patch_tokens": tokens[:, first:], "block:3:raw": kept[2][:, first:]}
        wanted["block:1"] = getattr(tower, made.norm or "forward_nothing", lambda x: x)(kept[0][:, first:])
        if made.cls:
            wanted["cls"] = tokens[:, 0]
        if made.registers:
            wanted["registers"] = tokens[:, 1:first]
        if made.pooled:
            pooled = model.get_image_features(pixel_values=pixels) if model is not tower else output
            wanted["pooled"] = getattr(pooled, "pooler_output", pooled)
    assert outputs.keys() == wanted.keys()
    # Narrow layers of random numbers cancel more.
    assert max(relative_error(outputs[name], wanted[name]) for name in outputs) <= 2 * BOUND
    # Blocks after the last one that is asked for are not computed.
    assert torch.equal(runner(f"a/{kind}", directory, "block:1").encode([image])["block:1"], outputs["block:1"])


@pytest.mark.parametrize("kind", ["beit", "data2vec-vision"])
def test_relative_positions_and_quick_gelus_are_the_librarys(kind: str, directory: Path) -> None:
    """The library keeps tables of relative positions, from whatever device they were first asked for."""
    config = small(transformers.CONFIG_MAPPING[kind](use_relative_position_bias=True, hidden_act="quick_gelu"))
    config.image_size = 5 * config.patch_size  # a grid that no other test has
    model = saved(directory, transformers.MODEL_MAPPING[type(config)], config, SIGLIP)
    run = runner(f"a/{kind}", directory, "patch_tokens", "cls", input_size=(config.image_size,) * 2)
    image = photograph("coffee")
    found = run.encode([image])
    with torch.no_grad():
        tokens = model(pixel_values=normalised(run.spec.input, preprocess(image, run.spec.input))).last_hidden_state
    assert relative_error(found["patch_tokens"], tokens[:, 1:]) <= 2 * BOUND
    assert relative_error(found["cls"], tokens[:, 0]) <= 2 * BOUND


def test_another_configuration_of_the_same_weights_is_another_model(directory: Path) -> None:
    saved(directory, "Dinov2Model", small(transformers.Dinov2Config()), SIGLIP)
    one = find(ExtractConfig(model="transformers/a/b", weights=directory)).identity
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": 2}))
    other = find(ExtractConfig(model="transformers/a/b", weights=directory)).identity
    assert one["weights"] == other["weights"] and one["config"] != other["config"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"0": "cat"}, "transformers_version": "9"}))
    assert find(ExtractConfig(model="transformers/a/b", weights=directory)).identity == other


def pillow(processor: dict[str, Any], patch_size: int = 14) -> Any:
    """The library's own processor that Pillow computes."""
    kind = processor.get("image_processor_type") or processor["feature_extractor_type"]
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    made = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return made(**{name: value for name, value in processor.items() if not name.endswith("_type")})


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_pixels_are_those_of_the_librarys_processor(kind: str, tmp_path: Path) -> None:
    processor = PROCESSORS[kind]
    saved(tmp_path / "model", "Dinov2Model", small(transformers.Dinov2Config()), processor)
    made = find(ExtractConfig(model="transformers/a/b", weights=tmp_path / "model", input_size=None)).input
    library = pillow(processor)
    for name in every_kind(tmp_path / "images"):
        with Image.open(tmp_path / "images" / name) as image:
            image.load()
            given = image if library.do_convert_rgb else image.convert("RGB")
            wanted = library(given, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
            ready = library(given, return_tensors="np")["pixel_values"][0]
            found = preprocess(image, made)
        assert np.array_equal(found.transpose(2, 0, 1), wanted), name
        assert np.allclose(normalised(made, found)[0].numpy(), ready, atol=2e-6), name


def test_a_processor_that_only_torchvision_has_differs_by_its_rounding(tmp_path: Path) -> None:
    saved(tmp_path / "model", "Dinov2Model", small(transformers.Dinov2Config()), DINOV3)
    made = find(ExtractConfig(model="transformers/a/b", weights=tmp_path / "model")).input
    library = getattr(transformers, "DINOv3ViTImageProcessor", None) or transformers.DINOv3ViTImageProcessorFast
    for name in ("coffee", "rocket"):
        image = photograph(name)
        wanted = library()(image, do_normalize=False, return_tensors="np")["pixel_values"][0]
        assert np.abs(preprocess(image, made).transpose(2, 0, 1) / 255 - wanted).max() <= 1 / 255


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "prepares images by Siglip2ImageProcessor"),
        ({**BIT, "do_center_crop": False}, "prepares images in a way"),
        ({**BIT, "crop_size": {"height": 448, "width": 448}}, "prepares images in a way"),
        ({**SIGLIP, "size": {"longest_edge": 224}}, "prepares images in a way"),
        ({**SIGLIP, "do_resize": False}, "prepares images in a way"),
        ({**SIGLIP, "size": {"height": 1 << 40, "width": 1 << 40}}, "prepares images in a way"),
        ({**SIGLIP, "image_std": [0, 0, 0]}, "images are normalised by"),
        ({**SIGLIP, "image_mean": "bright"}, "could not convert"),
        ({**SIGLIP, "resample": 77}, "is not as transformers reads it"),
        ({**SIGLIP, "size": {"height": "x", "width": []}}, ""),
        ({}, "prepares images by None"),
    ],
)
def test_preprocessing_that_cannot_be_said_is_refused(processor: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved(tmp_path, "Dinov2Model", small(transformers.Dinov2Config()), processor)
    with pytest.raises(PatchbankError) as caught:
        runner("a/b", tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with registers, of 4 x 4 patches."""
    place = tmp_path_factory.mktemp("tiny") / "model"
    processor = {**BIT, "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    saved(place, "Dinov2WithRegistersModel", small(transformers.Dinov2WithRegistersConfig()), processor)
    return place


def changed(place: Path, copy: Path, **entries: Any) -> Path:
    """A copy of a repository with other entries in its config.json."""
    shutil.copytree(place, copy)
    config = json.loads((place / "config.json").read_text()) | entries
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_type": "swin"}, "is of the type 'swin', which patchbank does not read"),
        ({"model_type": "convnext"}, "no plain vision transformer"),
        ({"model_type": "siglip2"}, "is a NaFlex model"),
        ({"model_type": ["dinov2"]}, "which patchbank does not read"),
        ({"model_type": None, "auto_map": {"AutoModel": "evil.Model"}}, "which patchbank does not read"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": 10**30}, "hidden_size is"),
        ({"image_size": 1 << 20}, "more than 16,384 patches"),
        ({"patch_size": 0}, "is not as transformers reads it"),
        ({"patch_size": [14, 7]}, "is not as transformers reads it"),
        ({"hidden_size": "wide"}, "is not as transformers reads it"),
        ({"num_hidden_layers": None}, "is not as transformers reads it"),
        ({"num_hidden_layers": 0}, "it has no blocks"),
        ({"hidden_act": "os.system"}, "is not as transformers reads it"),
        ({"layer_norm_eps": {"a": [1]}}, ""),
        ({"hidden_size": 64}, "does not hold the weights of"),
        ({"num_hidden_layers": 4}, "does not hold the weights of"),
    ],
)
def test_a_config_that_is_another_models_or_hostile(
    entries: dict[str, Any], words: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(PatchbankError) as caught:
        runner("a/b", changed(tiny, tmp_path / "other", **entries))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_config_may_not_say_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    """Neither code of the repository, nor another attention's kernels, nor another type of output."""
    (tmp_path / "other").mkdir()
    other = changed(
        tiny,
        tmp_path / "other/model",
        **{"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, "_attn_implementation": "org/kernel"},
        **{"attn_implementation": "org/kernel", "return_dict": False, "output_attentions": True, "torchscript": True},
        **{"torch_dtype": "float16", "architectures": ["evil"], "_name_or_path": "/etc"},
    )
    (other / "evil.py").write_text("raise SystemExit('it ran')")
    image = photograph("rocket")
    first, second = (runner("a/b", place).encode([image])["patch_tokens"] for place in (tiny, other))
    assert torch.equal(first, second)


def test_weights_in_other_files(tiny: Path, tmp_path: Path) -> None:
    """Shards, torch's own format, and float16 give the same features; shards have an identity of their own."""
    image = photograph("rocket")
    plain = runner("a/b", tiny)
    model = transformers.Dinov2WithRegistersModel.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    for name in ("shards", "bin"):
        for file in ("config.json", "preprocessor_config.json"):
            shutil.copy(tiny / file, tmp_path / name / file)
        run = runner("a/b", tmp_path / name)
        assert torch.equal(run.encode([image])["patch_tokens"], plain.encode([image])["patch_tokens"])
        assert run.spec.identity["weights"] != plain.spec.identity["weights"]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    index = tmp_path / "shards/model.safetensors.index.json"
    for names in ({"a": "../elsewhere.safetensors"}, {"a": "gone.safetensors"}, {"a": 1}, [], None):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(WeightsError):
            runner("a/b", tmp_path / "shards")


def test_weights_that_are_not_the_models(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tiny / "model.safetensors")
    other = changed(tiny, tmp_path / "other")
    name = "encoder.layer.1.mlp.fc1.weight"

    def refused(**changes: Any) -> str:
        kept = {key: changes.get(key, value) for key, value in state.items()}
        save_file({key: value for key, value in kept.items() if value is not None}, other / "model.safetensors")
        with pytest.raises(WeightsError) as caught:
            runner("a/b", other)
        return str(caught.value)

    assert f"{name} is missing" in refused(**{name: None})
    assert f"{name} has the shape (2, 2), expected (128, 32)" in refused(**{name: torch.zeros(2, 2)})
    assert "NaN" in refused(**{name: torch.full_like(state[name], torch.nan)})
    assert f"{name} is missing" in refused(**{name: torch.zeros_like(state[name], dtype=torch.int8)})
    (other / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint"):
        runner("a/b", other)
    (other / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors or"):
        runner("a/b", other)


def test_the_config_beside_a_file_is_read_instead_of_the_hubs(tiny: Path) -> None:
    spec = find(ExtractConfig(model="transformers/me/x", weights=tiny / "model.safetensors"))
    assert spec.identity == find(ExtractConfig(model="transformers/me/x", weights=tiny)).identity
    assert spec.input.size == (56, 56)


def test_a_pooler_that_was_not_saved_is_missed_only_if_it_is_asked_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = saved(
        tmp_path, "ViTModel", small(transformers.ViTConfig()), {**SIGLIP, "size": {"height": 64, "width": 64}}
    )
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if "pooler" not in name}
    assert len(kept) < len(state)
    save_file({**kept, "classifier.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    assert largest_error(runner("a/b", tmp_path, "patch_tokens", "cls"), model) <= 2 * BOUND
    with pytest.raises(WeightsError, match=r"pooler.* is missing"):
        runner("a/b", tmp_path, "pooled")


def test_passes_at_once_do_not_see_each_other(tiny: Path) -> None:
    run = runner("facebook/dinov2-with-registers-small", tiny, "patch_tokens", "block:1:raw", "pooled")
    pixels = torch.randint(0, 256, (4, *run.spec.input.size, 3), dtype=torch.uint8)
    with torch.no_grad(), ThreadPoolExecutor(4) as threads:
        expected = [run.encoder(each) for each in pixels.split(1)]
        for _ in range(20):
            found = threads.map(torch.no_grad()(run.encoder), pixels.split(1))
            for one, other in zip(expected, found, strict=True):
                assert all(relative_error(one[name], other[name]) < BOUND for name in one)


def test_a_run_of_the_commands(tiny: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 5)
    options = ("--model", "transformers/facebook/tiny", "--weights", tiny, "--device", "cpu", "--batch-size", 2)
    outputs = [word for name in ("patch_tokens", "registers", "block:2") for word in ("--output", name)]
    images, bank = tmp_path / "images", tmp_path / "bank"
    done = patchbank("extract", "folder", images, "--out", bank, *options, *outputs, check=0)
    assert "transformers]" not in done.stderr and "Loading" not in done.stderr
    made = open_bank(bank)
    assert made.manifest.model == "transformers/facebook/tiny" and len(made) == 5
    assert (made.manifest.input.cover, made.manifest.input.crop) == ((64, 64), "down")
    run = runner("facebook/tiny", tiny, "patch_tokens", "registers", "block:2")
    for sample in load_dataset("folder", images).samples:
        found = run.encode([Image.open(images / sample.key)])
        for name in found:
            assert relative_error(made.output(sample.key, name), found[name][0]) <= BOUND
    verified = patchbank("verify", bank, "--images", images, "--sample", 5, "--weights", tiny, "--json", check=0)
    assert max(json.loads(verified.stdout)["sample"].values()) <= BOUND
    other = tmp_path / "other"  # without registers
    processor = {**BIT, "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    saved(other, "Dinov2Model", small(transformers.Dinov2Config()), processor)
    for given in (other, other / "model.safetensors"):
        done = patchbank("verify", bank, "--images", images, "--sample", 1, "--weights", given, check=2)
        assert f"made with other weights than {given}" in done.stderr
    again = patchbank("extract", "folder", images, "--out", bank, *options, *outputs, check=0)
    assert "5 already" in again.stdout + again.stderr


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_texts_are_the_librarys(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = small(getattr(transformers, f"{kind}Config")())
    words = ["<pad>", "<eos>", "a", "dog", "cat", "of"]
    config.text_config.vocab_size, config.text_config.eos_token_id = len(words), 1
    config.text_config.bos_token_id = config.text_config.pad_token_id = 0
    config.text_config.max_position_embeddings = 8
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    model = saved(tmp_path, f"{kind}Model", config, {**SIGLIP, "size": size})
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="of"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(tmp_path)
    texts = ["a dog <eos>", "a cat of a dog <eos>"]
    spec = find(ExtractConfig(model="transformers/a/b", weights=tmp_path))
    with torch.no_grad():
        wanted = model.get_text_features(**fast(texts, return_tensors="pt", padding="max_length", max_length=8))
    wanted = getattr(wanted, "pooler_output", wanted)
    assert relative_error(encode_texts(spec, texts), wanted) <= BOUND
    with pytest.raises(ConfigError, match="9 tokens long"):
        encode_texts(spec, ["a " * 9])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="no usable tokenizer"):
        encode_texts(spec, texts)


def test_texts_of_a_model_without_them(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="text needs a model with a text tower"):
        encode_texts(find(ExtractConfig(model="transformers/a/b", weights=tiny)), ["a dog"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "transformers/dinov2"}, "name a repository of the Hugging Face hub"),
        ({"model": "transformers/../../etc"}, "name a repository of the Hugging Face hub"),
        ({"activation": "gelu"}, "activation is for OpenAI's models"),
        ({"round_weights": True}, "round_weights is for OpenAI's models"),
        ({"checkpoints": Path("somewhere")}, "checkpoints is for OpenAI's models"),
        ({"output": ("maskclip",)}, "has no such output. It has patch_tokens, cls, registers, pooled, block:1 to"),
        ({"output": ("nothing",)}, "block:1 to block:3, and block:1:raw to block:3:raw."),
        ({"output": ("block:4",)}, "has 3 blocks"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find(ExtractConfig(**{"model": "transformers/a/b", "weights": tiny, **options}))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def process(*arguments: object, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which may run some code before."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    program = f"{code}\nfrom patchbank.cli import main\nmain()"
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, env=kept | environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_without_the_package(tiny: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "images", 1)
    given = ("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", "--weights", tiny)
    blocked = "import sys; sys.modules['transformers'] = None"
    done = process(*given, "--model", "transformers/a/b", code=blocked)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == f"error: --model transformers/... needs transformers: {install('transformers')}"
    )


def test_weights_of_the_hub_may_be_large(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    spec = find(ExtractConfig(model="transformers/org/name", weights=tiny))
    held = HubFile("org/name", path.name, None, "a" * 40, spec.identity["weights"], path, 1 << 40, "")
    found, wanted = (
        Runner(each, torch.device("cpu"), batch_size=1).encode([photograph("coffee")])
        for each in (replace(spec, files=(held,)), spec)  # type: ignore[type-var]
    )
    assert torch.equal(found["patch_tokens"], wanted["patch_tokens"])


def test_a_config_of_many_megabytes_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    hub.files = {"config.json": b" " * (17 << 20)}
    photographs(tmp_path / "images", 1)
    done = process(
        *("extract", "folder", tmp_path / "images", "--out", tmp_path / "bank", "--model", "transformers/org/name"),
        **{"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"},
    )
    assert done.returncode == 2 and "config.json has 17.8 MB: that is no config.json." in done.stderr
    assert not any("/bytes/" in path for _, path, *_ in hub.asked)


@pytest.mark.full
def test_a_repository_of_the_hub(hub: Hub, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    hub.files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    photographs(tmp_path / "images", 2)
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def extract(bank: str, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
        given = ("extract", "folder", tmp_path / "images", "--out", tmp_path / bank, "--device", "cpu", *options)
        return process(*given, **home, **environment)

    name = ("--model", "transformers/org/name")
    done = extract("first", *name, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "home").rglob("model.safetensors"))
    done = extract("first", *name)
    assert done.returncode == 0, done.stderr
    assert "Loading" not in done.stderr and "transformers]" not in done.stderr and "Warning" not in done.stderr
    asked = len(hub.asked)
    done = extract("second", *name, HF_HUB_OFFLINE="1")
    assert (done.returncode, len(hub.asked)) == (0, asked), done.stderr
    # The repository's config.json from the cache, and the user's own weights.
    alone = shutil.copy(tiny / "model.safetensors", tmp_path)
    done = extract("third", *name, "--weights", alone, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    done = extract("none", "--model", "transformers/me/x", "--weights", alone, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "has no config.json beside it: give --weights the directory" in done.stderr
    done = process("models", "transformers/me/x", HF_HUB_OFFLINE="1", **home)
    assert done.returncode == 2 and done.stderr.endswith("(HF_HUB_OFFLINE is set): unset it.\n"), done.stderr
    banks = [open_bank(tmp_path / each) for each in ("first", "second", "third")]
    key = next(iter(banks[0]))
    assert all(torch.equal(bank[key], banks[0][key]) for bank in banks)
    assert len({bank.manifest.identity["weights"] for bank in banks}) == 1
    hub.refusal = 401, "GatedRepo"
    for other, words in ((name, "is gated: accept its licence at"), (("--model", "transformers/org/none"), "")):
        done = process(
            *("extract", "folder", tmp_path / "images", "--out", tmp_path / "none", *other),
            **{**home, "HF_HOME": str(tmp_path / "empty")},
        )
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1), done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert words in done.stderr
        hub.refusal = None
