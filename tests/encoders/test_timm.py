"""timm's models: every output, preprocessing and size against timm's own calls, with seeded weights at real sizes."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from patchbank import open_bank
from patchbank.config import ExtractConfig
from patchbank.encoders import find, random
from patchbank.encoders.timm import TimmEncoder
from patchbank.errors import ConfigError, WeightsError
from patchbank.preprocess import preprocess
from tests.support import REPOSITORY, every_kind, patchbank, photographs, relative_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
    import timm.models._builder as builder
    from timm.data import create_transform, resolve_data_config

CPU = torch.device("cpu")
SMALL = "vit_tiny_patch16_224.augreg_in21k"
# What each is here for, and the outputs that it has besides blocks.
MODELS = {
    "vit_small_patch14_reg4_dinov2": ("registers", ["patch_tokens", "cls", "registers", "pooled"]),
    "vit_base_patch16_siglip_224": ("no [CLS], attention pooling", ["patch_tokens", "pooled"]),
    "vit_little_patch16_reg4_gap_256": ("a norm after pooling", ["patch_tokens", "registers", "pooled"]),
    "vit_small_patch16_dinov3": ("rotary positions", ["patch_tokens", "cls", "registers", "pooled"]),
    "eva02_base_patch16_clip_224": ("SwiGLU, a joint space", ["patch_tokens", "cls", "pooled"]),
    "vit_pe_core_tiny_patch16_384": ("a joint space by attention pooling", ["patch_tokens", "cls", "pooled"]),
    "vit_medium_patch16_clip_224.tinyclip_yfcc15m": ("a joint space", ["patch_tokens", "cls", "pooled"]),
    "beit_base_patch16_224": ("relative positions, biases of its own", ["patch_tokens", "cls", "pooled"]),
    "vit_small_resnet26d_224": ("a backbone, which timm would fetch from the hub", ["patch_tokens", "cls", "pooled"]),
    "deit_tiny_distilled_patch16_224": ("two tokens pooled", ["patch_tokens", "cls", "registers", "pooled"]),
}
QUICK = ("vit_small_patch14_reg4_dinov2",)
MARKS = {name: [] if name in QUICK else [pytest.mark.full] for name in MODELS}
parametrize = partial(
    pytest.mark.parametrize, argvalues=[pytest.param(name, marks=marks) for name, marks in MARKS.items()]
)


def seeded(name: str, **options: Any) -> Any:
    """timm's model with numbers that differ in every layer, also in norms and biases."""
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = timm.create_model(name, **options).eval()
        for parameter in model.parameters():
            parameter.add_((0.01 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter))
    return model


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Any]:
    """A function that writes a seeded model's weights: its path, and the model."""

    def write(name: str) -> tuple[Path, Any]:
        model = seeded(name)
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        return path, model

    return write


def normalised(pixels: Tensor, encoder: TimmEncoder) -> Tensor:
    """As timm does: (B, h, w, 3) uint8 -> (B, 3, h, w)."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (encoder.input.mean, encoder.input.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def pictures(size: tuple[int, int]) -> Tensor:
    """A random picture, (1, h, w, 3) uint8."""
    return torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected(model: Any, x: Tensor, name: str, tokens: Tensor | None = None) -> Tensor:
    """An output by timm's documented calls; `tokens` are those of ``forward_features``, if they are known."""
    prefix = model.num_prefix_tokens
    if name.startswith("block"):
        block, norm = int(name.split(":")[1]), not name.endswith("raw")
        options = {"indices": [block - 1], "norm": norm, "output_fmt": "NLC", "intermediates_only": True}
        return model.forward_intermediates(x, stop_early=True, **options)[0]  # type: ignore[no-any-return]
    tokens = model.forward_features(x) if tokens is None else tokens
    joint, cls = model.num_classes == 512, model.cls_token is not None
    if name == "pooled":
        return model.forward_head(tokens, pre_logits=not joint)  # type: ignore[no-any-return]
    if joint and model.attn_pool is None:
        tokens = model.head(tokens)
    return {"patch_tokens": tokens[:, prefix:], "cls": tokens[:, 0], "registers": tokens[:, cls:prefix]}[name]


@parametrize("name")
def test_every_output_is_timms(name: str, written: Any) -> None:
    path, model = written(name)
    outputs = (*MODELS[name][1], "block:2", "block:2:raw", f"block:{len(model.blocks)}")
    assert list(random(ExtractConfig(model=f"timm/{name}")).made.names()) == MODELS[name][1]
    spec = find(ExtractConfig(model=f"timm/{name}", weights=path, output=outputs))
    with torch.no_grad():
        encoder = spec.load(CPU, 1)
        pixels = pictures(spec.input.size)
        found = encoder(pixels)
        x = normalised(pixels, encoder)
        tokens = model.forward_features(x)
        assert list(found) == list(outputs)
        for output, value in found.items():
            wanted = expected(model, x, output, tokens)
            assert value.shape == (1, *spec.outputs[output].shape) == wanted.shape, output
            if relative_error(value, wanted) > 2e-6:  # of which timm's own rounding is a part
                assert relative_error(value, expected(model.double(), x.double(), output)) <= 2e-6, output
                model.float()


def test_the_default_is_cls_and_patch_tokens() -> None:
    assert list(random(ExtractConfig(model=f"timm/{SMALL}")).outputs) == ["cls", "patch_tokens"]
    assert list(random(ExtractConfig(model="timm/vit_base_patch16_siglip_224")).outputs) == ["patch_tokens"]


def test_a_classifier_is_not_needed(tmp_path: Path) -> None:
    """Backbones are saved without one, or with one of other classes."""
    model = seeded("vit_tiny_patch16_224")
    state = model.state_dict()
    pixels = pictures((224, 224))
    for name, head in {"none": {}, "ten": {"head.weight": torch.ones(10, 192), "head.bias": torch.ones(10)}}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value for key, value in state.items() if not key.startswith("head")} | head, path)
        encoder = find(ExtractConfig(model="timm/vit_tiny_patch16_224", weights=path)).load(CPU, 1)
        with torch.no_grad():
            wanted = model.forward_features(normalised(pixels, encoder))[:, 1:]
            assert relative_error(encoder(pixels)["patch_tokens"], wanted) <= 2e-6


def test_a_fine_tuned_classifier_projects_nothing() -> None:
    """Its head has the place of CLIP's projection."""
    for name, dim in (("laion2b", 512), ("laion2b_ft_in1k", 768), ("openai_ft_in12k", 768)):
        spec = random(ExtractConfig(model=f"timm/vit_base_patch16_clip_224.{name}", output=("patch_tokens", "pooled")))
        assert spec.outputs["patch_tokens"].shape == (196, dim)
        assert spec.outputs["patch_tokens"].projection == ("head" if dim == 512 else "")
        assert spec.outputs["pooled"].shape == (dim,)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_dinov2",  # 518, no crop fraction
        SMALL,  # 0.9
        "vit_base_patch16_clip_224.laion2b_ft_in1k",  # 1.0, CLIP's mean and std
        "vit_base_patch32_clip_448.laion2b_ft_in12k_in1k",  # squashed
        "vit_base_patch16_224_miil.in21k",  # bilinear, 0.875
        "vit_base_patch16_sapiens2",  # 1024 x 768
    ],
)
def test_pixels_are_timms(name: str, tmp_path: Path) -> None:
    wanted = random(ExtractConfig(model=f"timm/{name}")).input
    data = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = create_transform(**data, normalize=False)
    for each in every_kind(tmp_path):
        with Image.open(tmp_path / each) as image:
            timms = transform(image.convert("RGB")).permute(1, 2, 0).numpy()
            assert np.array_equal(preprocess(image, wanted), timms), each
    assert (wanted.mean, wanted.std) == (tuple(data["mean"]), tuple(data["std"]))


def test_pixels_of_another_size_are_timms(tmp_path: Path) -> None:
    """Not square, with a crop fraction of 0.9."""
    wanted = random(ExtractConfig(model=f"timm/{SMALL}", input_size=(160, 256))).input
    data = resolve_data_config({"input_size": (3, 160, 256)}, timm.get_pretrained_cfg(SMALL).to_dict())
    transform = create_transform(**data, normalize=False)
    for each in every_kind(tmp_path):
        with Image.open(tmp_path / each) as image:
            timms = transform(image.convert("RGB")).permute(1, 2, 0).numpy()
            assert np.array_equal(preprocess(image, wanted), timms), each


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (SMALL, (112, 448)),  # as many patches, of another shape
        pytest.param("vit_small_patch14_reg4_dinov2", (224, 308), marks=pytest.mark.full),
        pytest.param("vit_small_patch16_dinov3", (192, 288), marks=pytest.mark.full),
        pytest.param("eva02_base_patch16_clip_224", (160, 320), marks=pytest.mark.full),
        pytest.param("vit_base_patch16_siglip_224", (288, 192), marks=pytest.mark.full),
    ],
)
def test_positions_at_another_size_are_timms(name: str, size: tuple[int, int], written: Any) -> None:
    """As with ``dynamic_img_size``."""
    path, model = written(name)
    dynamic = timm.create_model(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    spec = find(ExtractConfig(model=f"timm/{name}", weights=path, input_size=size, output=("patch_tokens",)))
    patch = spec.input.patch
    assert spec.input.grid == (size[0] // patch, size[1] // patch)
    with torch.no_grad():
        encoder = spec.load(CPU, 1)
        pixels = pictures(size)
        wanted = expected(dynamic, normalised(pixels, encoder), "patch_tokens")
        assert relative_error(encoder(pixels)["patch_tokens"], wanted) <= 2e-6


def test_a_size_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"multiples of timm/.*'s patch, 14 pixels, such as 224x224"):
        random(ExtractConfig(model="timm/vit_small_patch14_dinov2", input_size=(225, 225)))


@pytest.mark.parametrize("layout", ["shards", "ezhoi"])
def test_a_bank_holds_timms_tokens(layout: str, tmp_path: Path, written: Any) -> None:
    path, model = written(SMALL)
    names = photographs(tmp_path / "images", 3)
    outputs = ["patch_tokens", "pooled", "block:6"] if layout == "shards" else ["patch_tokens"]
    patchbank(
        *("extract", "folder", tmp_path / "images", "--model", f"timm/{SMALL}", "--weights", path),
        *("--out", tmp_path / "bank", "--layout", layout, "--batch-size", 2, "--input-size", "192x256"),
        *("--pool-grid", 2, *(word for output in outputs for word in ("--output", output))),
        tiny=False,
        check=0,
    )
    bank = open_bank(tmp_path / "bank")
    assert bank.manifest.grid == (6, 8)
    model.set_input_size((192, 256))
    data = resolve_data_config({"input_size": (3, 192, 256)}, model.pretrained_cfg)
    transform = create_transform(**data)
    for name in names:
        with Image.open(tmp_path / "images" / name) as image, torch.no_grad():
            x = transform(image.convert("RGB"))[None]
            for output in outputs:
                wanted = expected(model, x, output)[0]
                if output != "pooled":
                    wanted = wanted.view(6, 2, 8, 2, -1).mean((1, 3)).flatten(0, 1)
                assert relative_error(bank.output(name, output), wanted) <= 2e-6, output


def test_formats_and_dtypes_of_weights(tmp_path: Path) -> None:
    """A training checkpoint, and float16: computed in float32."""
    model = seeded(SMALL).half()
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "w.pt")
    with torch.no_grad():
        encoder = find(ExtractConfig(model=f"timm/{SMALL}", weights=tmp_path / "w.pt")).load(CPU, 1)
        pixels = pictures((224, 224))
        wanted = expected(model.float(), normalised(pixels, encoder), "patch_tokens")
        assert relative_error(encoder(pixels)["patch_tokens"], wanted) <= 2e-6


HUB = """
import sys, torch, timm
from patchbank.config import ExtractConfig
from patchbank.encoders import find
spec = find(ExtractConfig(model=f"timm/{sys.argv[1].partition('.')[0]}"))
assert spec.identity == {**spec.identity, "model": f"timm/{sys.argv[1]}", "weights": sys.argv[2]}, spec.identity
own = spec.obtain().load(torch.device("cpu"), 1).model.cls_token
assert torch.equal(own, timm.create_model(sys.argv[1], pretrained=True).cls_token)
"""


def test_weights_of_the_hubs_cache_are_timms(tmp_path: Path) -> None:
    """Without a tag, and offline: those that timm itself takes."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    repository = tmp_path / f"models--timm--{name}"
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    save_file(seeded(name).state_dict(), tmp_path / "weights")
    sha256 = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    (repository / "blobs").mkdir()
    (tmp_path / "weights").rename(repository / "blobs" / sha256)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{sha256}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HUB, name, sha256]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.full
def test_precision_bf16_is_nearer_than_the_librarys(written: Any) -> None:
    """Residuals and norms stay in float32."""
    name = "vit_small_patch16_dinov3"
    path, model = written(name)
    with torch.no_grad():
        encoder = find(ExtractConfig(model=f"timm/{name}", weights=path, precision="bf16")).load(CPU, 1)
        pixels = pictures((256, 256))
        x = normalised(pixels, encoder)
        wanted = expected(model, x, "patch_tokens")
        eager = expected(model.bfloat16(), x.bfloat16(), "patch_tokens")
        found = relative_error(encoder(pixels)["patch_tokens"].float(), wanted)
    assert 1e-4 < found < 0.9 * relative_error(eager.float(), wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_bas_patch16_224", r"timm \S+ has no model 'vit_bas_patch16_224'. Did you mean timm/vit_base_patch16_224"),
        ("vit_base_patch16_224.nonsense", r"has no tag 'nonsense': it has augreg2_in21k_ft_in1k, "),
        ("../../etc/passwd", "has no model"),
        ("hf-hub:timm/resnet50", "has no model"),
        ("resnet18", r"timm/resnet18 is no vision transformer: ResNet has no grid of patch tokens\."),
        ("swin_tiny_patch4_window7_224", "is no vision transformer: SwinTransformer"),
        ("samvit_base_patch16", "is no vision transformer"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(ExtractConfig(model=f"timm/{name}"))


def test_outputs_and_options_that_it_has_not() -> None:
    with pytest.raises(ConfigError, match=r"has no such output\. It has patch_tokens, pooled, block:1 to block:12"):
        random(ExtractConfig(model="timm/vit_base_patch16_siglip_224", output=("cls",)))
    for option in ({"activation": "gelu"}, {"round_weights": True}, {"checkpoints": Path()}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))} is for OpenAI's models: leave it out with timm/"):
            random(ExtractConfig(model=f"timm/{SMALL}", **option))  # type: ignore[arg-type]


def test_without_timm_one_line_says_how_to_install_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['timm'] = None; from patchbank.cli import main; main()"
    command = ["extract", "folder", REPOSITORY / "docs/images", "--out", tmp_path / "bank", "--model", f"timm/{SMALL}"]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'needs timm: pip install "patchbank[timm]"' in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_weights_of_another_model(tmp_path: Path) -> None:
    state = seeded(SMALL).state_dict()
    config = ExtractConfig(model=f"timm/{SMALL}", weights=tmp_path / "weights.safetensors")

    def refused(content: dict[str, Tensor], message: str) -> None:
        save_file(content, tmp_path / "weights.safetensors")
        with pytest.raises(WeightsError, match=message) as caught:
            find(config)
        assert "\n" not in str(caught.value)

    small = timm.create_model("vit_small_patch16_224").state_dict()
    wrong = r"cls_token has the shape \(1, 1, 384\), expected \(1, 1, 192\)\. By its shapes .* 384 and 12 blocks"
    refused(small, wrong)
    less = {name: value for name, value in state.items() if name != "blocks.3.mlp.fc2.bias"}
    refused(less, r"blocks\.3\.mlp\.fc2\.bias is missing")
    refused({**state, "extra": torch.ones(1)}, "it has 1 more parameters, such as extra")
    refused({"vision_model.embeddings.patch_embedding.weight": torch.ones(1)}, "give model transformers/ORG/NAME")
    refused({"layer1.weight": torch.ones(1)}, "Its first parameters are layer1.weight")
    save_file({**state, "norm.bias": state["norm.bias"] / 0}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"is damaged: norm\.bias holds NaN or Inf"):
        find(config).load(CPU, 1)
    save_file({**state, "norm.bias": state["norm.bias"].to(torch.int8)}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"norm\.bias holds int8 numbers"):
        find(config).load(CPU, 1)
    with pytest.raises(WeightsError, match="is a directory"):
        find(ExtractConfig(model=f"timm/{SMALL}", weights=tmp_path))
    config.weights.write_bytes(b"no weights")  # type: ignore[union-attr]
    with pytest.raises(WeightsError, match="cannot be read"):
        find(config)


def test_a_classifiers_tag_does_not_lose_a_projection(tmp_path: Path) -> None:
    """timm's default tag of a CLIP may be of a classifier that was trained in the projection's place."""
    path = tmp_path / "weights.safetensors"
    config = ExtractConfig(model="timm/vit_base_patch16_clip_224", weights=path)
    save_file({"head.weight": torch.ones(512, 768)}, path)
    with pytest.raises(
        WeightsError, match=r"holds CLIP's projection, .* use model timm/vit_base_patch16_clip_224\.\w+"
    ):
        find(config)
    save_file({"head.weight": torch.ones(1000, 768)}, path)
    with pytest.raises(WeightsError, match=r"\w+ is missing"):
        find(config)


def test_weights_that_do_not_fill_a_lenient_model_are_refused(tmp_path: Path) -> None:
    """timm itself loads SigLIP without pooling from any file, and leaves what is missing random."""
    torch.save({"nothing": torch.ones(1)}, tmp_path / "weights.pt")
    config = ExtractConfig(model="timm/vit_base_patch16_siglip_gap_224", weights=tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="is missing"):
        find(config)


def test_names_are_listed_and_described() -> None:
    from patchbank.encoders import timm as family

    names = list(family.names())
    assert len(set(names)) == len(names) > 300
    assert "timm/vit_small_patch14_dinov2.lvd142m" in names
    found = family.describe("timm/vit_small_patch14_reg4_dinov2.lvd142m")
    assert found is not None
    assert found[1:] == ((518, 518), (37, 37), 384, 5, False)
    assert family.describe("timm/resnet18.a1_in1k") is None


@pytest.mark.parametrize(
    ("name", "attentions"),
    [
        ("vit_small_patch16_18x2_224", {(36, 6)}),  # two beside each other in a block
        ("vit_pwee_patch16_reg1_gap_256", {(16, 4)}),  # beside the MLP
    ],
)
def test_attentions_beside_each_other_are_counted(name: str, attentions: set[tuple[int, int]]) -> None:
    products = random(ExtractConfig(model=f"timm/{name}")).products
    assert {(each.times, each.heads) for each in products if each.kind == "attention"} == attentions


def test_models_without_a_classifier_are_none() -> None:
    from patchbank.encoders import timm as family

    assert family.describe("timm/mobilenetv5_300m_enc") is None


def test_threads_load_models_at_once(tmp_path: Path) -> None:
    """What is silenced or changed meanwhile is the program's: it is as before, and each has its own weights."""
    state, pixels = seeded(SMALL).state_dict(), pictures((224, 224))
    paths = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for number, path in enumerate(paths):
        save_file({**state, "cls_token": state["cls_token"] + number}, path)

    def cls(path: Path) -> Tensor:
        encoder = find(ExtractConfig(model=f"timm/{SMALL}", weights=path, output=("cls",))).load(CPU, 1)
        with torch.no_grad():
            return encoder(pixels)["cls"]

    def program() -> tuple[Any, ...]:
        levels = [logging.getLogger(name).level for name in ("timm", "huggingface_hub")]
        return sys.stdout, warnings.filters, levels, builder.load_pretrained

    before = program()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(cls, paths))
    assert program() == before
    assert all(torch.equal(each, cls(path)) for each, path in zip(found, paths, strict=True))


@pytest.mark.full
def test_architectures_are_described_or_are_none() -> None:
    from patchbank.encoders import timm as family

    names = sorted({name.partition(".")[0] for name in family.names()})[::6]  # of a minute
    assert sum(family.describe(name) is not None for name in names) > 30


@pytest.mark.full
def test_a_compiled_encoder_gives_the_same(written: Any) -> None:
    from patchbank.encoders.compiling import compile_forward

    for name in (SMALL, "vit_small_patch16_dinov3"):
        path, _ = written(name)
        for precision, bound in (("fp32", 2e-6), ("bf16", 2e-2)):
            config = ExtractConfig(model=f"timm/{name}", weights=path, precision=precision)  # type: ignore[arg-type]
            spec = find(config)
            encoder = spec.load(CPU, 1)
            pixels = pictures(spec.input.size)
            compiled, notes = compile_forward(encoder, pixels)
            assert compiled is not None, notes
            with torch.no_grad():
                found, wanted = compiled(pixels), encoder(pixels)
            assert relative_error(found["patch_tokens"].float(), wanted["patch_tokens"].float()) <= bound
