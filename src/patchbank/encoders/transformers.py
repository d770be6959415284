"""The family of transformers' vision models: ``transformers/ORG/NAME``, a repository of the Hugging Face hub.

Its config.json says what the model is, and its preprocessor_config.json how images become the input. Both are data: the
classes are those of the installed library, and no code of a repository runs.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from patchbank.config import ExtractConfig
from patchbank.encoders import hub
from patchbank.encoders.base import Description, Product
from patchbank.encoders.hub import HubFile
from patchbank.encoders.modules import LibraryEncoder
from patchbank.encoders.outputs import Architecture, block_of, chosen, sized
from patchbank.encoders.specs import RANDOM, FilesSpec
from patchbank.encoders.weights import as_float32, read_state, sha256_of_weights
from patchbank.errors import ConfigError, WeightsError, first_line, install
from patchbank.features import POOLED, Input, Interpolation, Rgb
from patchbank.files import bytes_text, is_plain, parse_json, read_regular, sha256_of_chunks

PACKAGES = ("transformers",)
PREFIX = "transformers/"
# The model types that are plain vision transformers, alone or beside a text tower.
KINDS = (
    *("aimv2", "aimv2_vision_model", "altclip", "beit", "chinese_clip", "chinese_clip_vision_model", "clip"),
    *("clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa"),
    *("metaclip_2", "mlcd", "mlcd_vision_model", "siglip", "siglip_vision_model", "tipsv2", "tipsv2_vision_model"),
    *("vit", "vit_mae", "vit_msn"),
)
_NAFLEX = ("siglip2", "siglip2_vision_model")
_SETTINGS = {"vit_mae": {"mask_ratio": 0.0}}  # its encoder sees all patches
_TEXTS = ("clip", "siglip")
# Names of layers in the towers.
_NORMS = ("post_layernorm", "layernorm", "norm", "rms_norm")
_POOLERS = ("head", "pooler")
_CLS = re.compile(r"(cls|class)_(token|embedding)$")
_MLPS = (
    *(("fc1", "activation_fn", "fc2"), ("fc1", "activation", "fc2"), ("gate_proj", "act_fn", "down_proj")),
    *(("up_proj", "act_fn", "down_proj"), ("dense", "intermediate_act_fn", "dense")),
)
# Image processors that resize, cut out the centre and normalise, and do nothing else; what they are made of.
_PROCESSORS = ("Beit", "Bit", "CLIP", "ChineseCLIP", "DINOv3ViT", "DeiT", "Siglip", "Tipsv2", "ViT")
_FIELDS = (
    *("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
)
_PROCESSOR_TYPES = ("image_processor_type", "feature_extractor_type")
_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
# What a config.json may ask for: layers, tokens of an image, any other number; the side of a resized image.
_MOST_LAYERS, _MOST_TOKENS, _MOST, _MOST_SIDE = 512, 1 << 14, 1 << 24, 4096
_MOST_WORDS = 1 << 28  # bytes of a file of a tokenizer: vocabularies take tens of megabytes
# Its entries that say nothing of the numbers, but change what a model returns, how it computes, or what code runs.
_IGNORED = (
    *("auto_map", "attn_implementation", "dtype", "torch_dtype", "gradient_checkpointing", "output_attentions"),
    *("output_hidden_states", "return_dict", "use_return_dict", "torchscript", "transformers_version"),
    *("out_features", "out_indices", "stage_names", "num_labels", "id2label", "label2id"),
)
# What tests build at its real size: name -> the input's side, the patch's, a token's width, tokens before, text tower.
TESTED = {
    "facebook/dinov2-base": (224, 14, 768, 1, False),
    "facebook/dinov2-with-registers-base": (224, 14, 768, 5, False),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (224, 16, 384, 5, False),
    "google/siglip-base-patch16-224": (224, 16, 768, 0, True),
    "openai/clip-vit-base-patch16": (224, 16, 512, 1, True),
}


def spec(config: ExtractConfig, root: Path | None, *, rounding: bool) -> TransformersSpec:  # noqa: ARG001
    """The encoder of a configuration. Raises ConfigError and WeightsError as `encoders.find` does."""
    found = random(config)
    return found.of(*found.place.weights())


def random(config: ExtractConfig) -> TransformersSpec:
    """A model with random weights, of which only the config.json is needed. Raises as `encoders.random` does."""
    name, library, place = config.model, _library(), _Place.of(config)
    data = _checked(name, place.read("config.json"))
    with _quiet(library), _reading("config.json", name), torch.device("meta"):
        model_class, built = _model_class(library, data)
        tower = _Tower.of(model_class(built).eval())
    own, cover = _input(library, name, place, tower.patch)
    made = sized(config, name, own, own.size[0] / cover[0])
    if made.size == own.size and cover != own.size:
        made = replace(made, cover=cover)
    with _quiet(library):
        architecture, products = _facts(name, tower, made.size)
    said = json.dumps({key: value for key, value in data.items() if key != "text_config"}, sort_keys=True)
    identity = {
        **{"family": "transformers", "model": name, "weights": RANDOM},
        # Heads, activation, epsilon and others decide numbers, and the weights do not show them.
        **{"config": sha256_of_chunks([said.encode()]), "precision": config.precision},
    }
    outputs = chosen(config, name, architecture, made)
    return TransformersSpec(
        name=name,
        place=place,
        config=data,
        made=architecture,
        input=made,
        outputs=outputs,
        identity=identity,
        products=products,
    )


def names() -> Sequence[str]:
    """The tested models: nothing lists the hub's repositories without a network."""
    _library()
    return [PREFIX + name for name in TESTED]


def describe(name: str) -> Description | None:
    """A tested model, or another one by its config.json. Raises ConfigError and WeightsError as `spec` does."""
    if (known := TESTED.get(name.removeprefix(PREFIX))) is not None:
        size, patch, dim, prefix, text = known
        return Description(name, (size, size), (size // patch, size // patch), dim, prefix, text)
    found = random(ExtractConfig(model=name))
    made, text = found.made, found.config["model_type"] in _TEXTS
    return Description(name, found.input.size, found.input.grid, made.dim or made.width, made.prefix, text)


def encode_texts(spec: TransformersSpec, texts: Sequence[str]) -> Tensor:
    """Texts as ``get_text_features`` gives them, by the repository's tokenizer. Raises as `encoders.encode_texts` does.

    SigLIP's lie in the space of its ``pooled`` output, not of its patch tokens.
    """
    if spec.config["model_type"] not in _TEXTS:
        raise ConfigError(f"--text needs a model with a text tower, such as ViT-B/16: {spec.name} has none.")
    found, library = spec.obtain(), _library()
    with _quiet(library):
        model = _loaded(library, found)
        longest = model.config.text_config.max_position_embeddings
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(
                found.place.tokenizer(), local_files_only=True, trust_remote_code=False
            )
            tokens = tokenizer(list(texts), padding="max_length", max_length=longest, return_tensors="pt")
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise WeightsError(f"{found.name} has no usable tokenizer: {first_line(error)}") from error
        if (count := tokens["input_ids"].shape[1]) > longest:
            raise ConfigError(f"--text is {count} tokens long, and {found.name}'s text tower takes {longest}.")
        with torch.inference_mode():
            features = model.get_text_features(**tokens)
    encoded: Tensor = getattr(features, "pooler_output", features).clone()
    return encoded


@dataclass(frozen=True, kw_only=True)
class TransformersSpec(FilesSpec):
    """A model of a repository: ``transformers/ORG/NAME``.

    Attributes:
        place: where its files are.
        config: its config.json, checked.
    """

    place: _Place
    config: Mapping[str, Any]

    def load(self, device: torch.device, batch_size: int) -> TransformersEncoder:
        """Load the weights. Raises WeightsError if they are damaged or another model's."""
        found, library = self.obtain(), _library()
        with _quiet(library):
            return TransformersEncoder(found, _loaded(library, found), device, batch_size)


class TransformersEncoder(LibraryEncoder):
    """The image tower of one of transformers' models on a device."""

    def __init__(self, spec: TransformersSpec, model: Any, device: torch.device, batch_size: int) -> None:
        self._tower = tower = _Tower.of(model)
        wanted = {(block_of(name) or (spec.made.blocks, False))[0] for name in spec.outputs}
        del tower.blocks[max(wanted) :]
        self._kept: dict[int, Tensor] = {}
        self._pooler_output: Any = None
        for number in wanted:
            tower.blocks[number - 1].register_forward_hook(partial(self._keep, number))
        modules = [(type(each).__name__, dict(each.named_children())) for each in tower.blocks[0].modules()]
        found = ((kind, next((mlp for mlp in _MLPS if {*mlp} <= {*children}), None)) for kind, children in modules)
        self.mlps = {kind: mlp for kind, mlp in found if mlp is not None}  # type: ignore[misc]  # of this model
        layers = {"tower": tower.module, **({"projection": tower.projection} if tower.projection else {})}
        super().__init__(spec, spec.made, nn.ModuleDict(layers), device, batch_size)
        self._projection = dict(self.model.named_children()).get("projection", nn.Identity())

    def _keep(self, number: int, _module: nn.Module, _arguments: object, output: Any) -> None:
        self._kept[number] = output[0] if isinstance(output, tuple) else output

    def hidden(self, x: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
        """The library's own forward pass; blocks after the last one asked for are not there."""
        output = self._tower(x)
        self._pooler_output = getattr(output, "pooler_output", None)
        return {number: self._kept.pop(number) for number in blocks}

    def norm(self, x: Tensor) -> Tensor:
        """By the layer that the library applies after the last block, or, as CLIP does, to its [CLS] alone."""
        return self._tower.norm(x)

    def project(self, x: Tensor) -> Tensor:
        """By CLIP's projection."""
        projected: Tensor = self._projection(x)
        return projected

    def pooled(self, x: Tensor) -> Tensor:
        """The library's ``pooler_output``, in the space of texts if the model has one, as of ``get_image_features``."""
        return self.project(self._pooler_output)


@dataclass(frozen=True)
class _Place:
    """Where a model's files are.

    Attributes:
        repo: ``ORG/NAME``.
        revision: its commit, of which all files are; None for a directory.
        directory: with all files, instead of the repository.
        file: with the weights, instead of those there.
    """

    repo: str
    revision: str | None = None
    directory: Path | None = None
    file: Path | None = None

    @classmethod
    def of(cls, config: ExtractConfig) -> _Place:
        """The place that a configuration names. Raises ConfigError and WeightsError."""
        repo = config.model.removeprefix(PREFIX)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) is None:
            raise ConfigError(
                f"There is no model {config.model!r}: name a repository of the Hugging Face hub, such as "
                f"{PREFIX}facebook/dinov2-base."
            )
        for name, given in (
            ("--activation", config.activation),
            ("--checkpoints", config.checkpoints),
            ("--round-weights", config.round_weights),
        ):
            if given:
                raise ConfigError(f"{name} is for OpenAI's models, and {config.model} is none: leave it out.")
        given = config.weights and config.weights.absolute()
        if given is not None and given.is_dir():
            return cls(repo, directory=given)
        if given is not None and given.with_name("config.json").is_file():
            return cls(repo, directory=given.parent, file=given)
        try:
            found = hub.locate(repo, ["config.json"])
            _path(found)
            return cls(repo, found.revision, file=given)
        except WeightsError as error:
            if given is None:
                raise
            sha256_of_weights(given)  # it must be there
            raise WeightsError(
                f"{given} has no config.json beside it: give --weights the directory that save_pretrained made. Nor is "
                f"it on the hub: {error.args[0]}"
            ) from error

    def find(self, *names: str) -> HubFile | Path:
        """The first of some files that is there. Raises WeightsError if none is."""
        if self.directory is None:
            return hub.locate(self.repo, names, self.revision)
        found = [path for name in names if (path := self.directory / name).is_file()]
        if not found:
            raise WeightsError(
                f"{self.directory} has no {' or '.join(names)}: give --weights a directory that save_pretrained made."
            )
        return found[0]

    def path(self, *names: str, most: int = _MOST) -> Path:
        """The same on this machine; a file of at most that many bytes."""
        return _path(self.find(*names), most)

    def read(self, *names: str) -> dict[str, Any]:
        """The object in the first of some JSON files. Raises WeightsError."""
        path = self.path(*names)
        try:
            if path.stat().st_size > _MOST:
                raise ValueError("it is too large")
            content: dict[str, Any] = parse_json(read_regular(path), dict[str, Any])
            return content
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{path} cannot be read as JSON ({first_line(error)}). Download it again.") from error

    def weights(self) -> tuple[HubFile | Path, ...]:
        """The files of the weights. Raises WeightsError."""
        if self.file is not None:
            sha256_of_weights(self.file)  # it must be there
            return (self.file,)
        first = self.find(*_WEIGHTS)
        name = first.name
        if not name.endswith(".index.json"):
            return (first,)
        shards = self.read(name).get("weight_map")
        files = {each for each in shards.values() if isinstance(each, str)} if isinstance(shards, dict) else set()
        if not files or len(files) > 1000 or not all("/" not in each and is_plain(each) for each in files):
            raise WeightsError(f"{name} of {self.directory or self.repo} names no files of weights. Download it again.")
        return tuple(self.find(each) for each in sorted(files))

    def tokenizer(self) -> Path:
        """The directory with the tokenizer's files. Raises WeightsError if the hub has none."""
        if self.directory is not None:
            return self.directory
        self.path("config.json")
        for name in _TOKENIZER[1:]:
            with contextlib.suppress(WeightsError):  # not every tokenizer has all
                self.path(name, most=_MOST_WORDS)
        return self.path(_TOKENIZER[0], most=_MOST_WORDS).parent


class _Tower(NamedTuple):
    """The image tower of a model, and what of it has a name.

    Attributes:
        module: the tower.
        blocks: its blocks.
        norm: the layer after the last one; an identity if there is none.
        pooler: the names of norm and pooling layers.
        projection: from the pooled output into the space of images and texts.
        patch: the side of a patch in pixels.
        options: of its call, but for pixels.
    """

    module: Any
    blocks: nn.ModuleList
    norm_name: str
    pooler_name: str
    projection: nn.Module | None
    patch: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> _Tower:
        """Raises ValueError if the model has no blocks, or its patches are no squares."""
        tower = model
        while hasattr(tower, "vision_model"):
            tower = tower.vision_model
        count, patch = tower.config.num_hidden_layers, tower.config.patch_size
        lists = (each for each in tower.modules() if isinstance(each, nn.ModuleList) and len(each) == count)
        blocks = next(lists, None)
        sides = set(patch) if isinstance(patch, list | tuple) else {patch}
        if blocks is None or len(sides) != 1:
            raise ValueError("it has no blocks, or patches that are no squares")
        layers = dict(tower.named_children())
        norm, pooler = (next((each for each in known if each in layers), "") for known in (_NORMS, _POOLERS))
        parameters = inspect.signature(tower.forward).parameters
        return cls(
            tower,
            blocks,
            "" if isinstance(layers.get(norm), nn.Identity) else norm,
            "" if layers.get(pooler) is None else pooler,
            getattr(model, "visual_projection", None),
            sides.pop(),
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {},
        )

    def __call__(self, x: Tensor) -> Any:
        """The library's output of a batch (B, 3, h, w)."""
        options = dict(self.options)
        if hasattr(self.module.config, "mask_ratio"):  # ViTMAE shuffles patches by this noise: in their order
            tokens = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
            options["noise"] = torch.arange(tokens, device=x.device).expand(len(x), -1)
        return self.module(pixel_values=x, **options)

    def norm(self, x: Tensor) -> Tensor:
        """Tokens after the last norm."""
        return getattr(self.module, self.norm_name)(x) if self.norm_name else x


def _library() -> Any:
    """transformers. Raises ConfigError if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers
        except ImportError:
            raise ConfigError(f"--model {PREFIX}... needs transformers: {install('transformers')}") from None
    return transformers


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's words and bars on the terminal."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(file: str, name: str) -> Iterator[None]:
    """Whatever the library says of a file that is not right is a WeightsError."""
    try:
        yield
    except (ConfigError, WeightsError):
        raise
    except Exception as error:
        raise WeightsError(f"The {file} of {name} is not as transformers reads it: {first_line(error)}") from error


def _checked(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """A config.json without what would run code or change the outputs. Raises ConfigError, WeightsError."""
    kind = data.get("model_type")
    if kind in _NAFLEX:
        raise ConfigError(
            f"{name} is a NaFlex model, without a fixed grid. Use one of a fixed size, of the type siglip."
        )
    if kind not in KINDS:
        raise ConfigError(
            f"{name} is of the type {kind!r}, which patchbank does not read: it is no plain vision transformer. Known "
            f"types: {', '.join(sorted(KINDS))}."
        )
    if "quantization_config" in data:
        raise ConfigError(f"{name} is quantised. Use a repository with weights in float32, bfloat16 or float16.")
    return {**_bounded(name, data), **_SETTINGS.get(kind, {})}


def _bounded(name: str, data: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in data.items():
        if key in _IGNORED or key.startswith("_"):
            continue
        if isinstance(value, dict):
            value = _bounded(name, value)
        most = _MOST_LAYERS if "layers" in key else _MOST
        if isinstance(value, int | float) and not abs(value) <= most:
            raise WeightsError(f"The config.json of {name} is damaged: {key} is {value}.")
        kept[key] = value
    return kept


def _model_class(library: Any, data: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a config.json, and its configuration. Raises ConfigError if this version has no such models."""
    kind, named = data["model_type"], data.get("architectures")
    if kind not in library.CONFIG_MAPPING:
        raise ConfigError(f"transformers {library.__version__} has no models of the type {kind}: install a newer one.")
    config = library.CONFIG_MAPPING[kind].from_dict(dict(data))
    vision = getattr(config, "vision_config", config)
    size, patch = (
        each if isinstance(each, list | tuple) else [each] * 2 for each in (vision.image_size, vision.patch_size)
    )
    if (size[0] // patch[0]) * (size[1] // patch[1]) > _MOST_TOKENS:
        raise ValueError(f"its images have more than {_MOST_TOKENS:,} patches")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    projected = name.endswith("VisionModelWithProjection") and hasattr(library, name)
    model_class = getattr(library, name) if projected else library.MODEL_MAPPING[type(config)]
    config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    return model_class, config


def _blank(tower: _Tower, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The last tokens, and what is pooled of them."""
    try:
        output = tower(x)
    except RuntimeError:
        if not hasattr(tower.module, "rope_embeddings"):
            raise
        tokens = tower.module.embeddings(x)  # before version 5, DINOv3 cannot turn them on the meta device
        return tokens, tokens[:, 0]
    return output.last_hidden_state, getattr(output, "pooler_output", None)


def _facts(name: str, tower: _Tower, size: tuple[int, int]) -> tuple[Architecture, list[Product]]:
    """What a tower on the meta device computes of inputs of (h, w) pixels. Raises ConfigError if it does not."""
    config = tower.module.config
    try:
        with torch.no_grad():  # other tensors are not on the meta device: the library keeps some for later passes
            last, pooled = _blank(tower, torch.empty(1, 3, *size, device="meta"))
            if pooled is not None and tower.projection is not None:
                pooled = tower.projection(pooled)
    except Exception as error:
        raise ConfigError(
            f"{name} takes no inputs of {size[0]}x{size[1]} pixels ({first_line(error)}): leave out --input-size."
        ) from error
    _, tokens, width = last.shape
    patches = (size[0] // tower.patch) * (size[1] // tower.patch)
    prefix = tokens - patches
    embedded = (each for each, _ in tower.module.named_parameters() if not each.startswith(_POOLERS))
    cls = any(map(_CLS.search, embedded))
    if prefix < cls:
        raise ConfigError(f"{name} has no grid of {tower.patch} x {tower.patch} patches: it gives {tokens} tokens.")
    features = 0 if pooled is None else pooled.shape[-1]
    joint = tower.projection is not None and not tower.pooler_name  # which [CLS] and patches go through alike
    layers = (tower.norm_name, tower.pooler_name, "visual_projection" if tower.projection is not None else "")
    made = Architecture(
        blocks=len(tower.blocks),
        width=width,
        cls=cls,
        registers=prefix - cls,
        norm=tower.norm_name,
        projection="visual_projection" if joint else "",
        dim=features if joint else 0,
        pooled=features,
        pooling=", ".join(filter(None, layers)) if features else "",
    )
    blocks, heads = len(tower.blocks), config.num_attention_heads
    linear = [each for each in tower.blocks[0].modules() if isinstance(each, nn.Linear)]
    return made, [
        Product(1, patches, 3 * tower.patch**2, width),
        *(Product(blocks, tokens, each.in_features, each.out_features) for each in linear),
        Product(blocks, tokens, width // heads, tokens, "attention", heads),
    ]


def _input(library: Any, name: str, place: _Place, patch: int) -> tuple[Input, tuple[int, int]]:
    """How a repository's image processor makes an input, and the (h, w) to resize to before the centre is cut out.

    Raises ConfigError if an `Input` cannot say it.
    """
    data = place.read("processor_config.json", "preprocessor_config.json")
    if isinstance(nested := data.get("image_processor"), dict):
        data = nested
    elif not any(each in data for each in _PROCESSOR_TYPES):
        data = place.read("preprocessor_config.json")
    kind = str(next((data[each] for each in _PROCESSOR_TYPES if each in data), None))
    plain = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
    if plain not in _PROCESSORS:
        raise ConfigError(f"{name} prepares images by {kind}, which patchbank does not know.")
    with _quiet(library), _reading("preprocessor_config.json", name):
        # Pillow's, if there is one: DINOv3's is made for torchvision alone.
        ends = ("Pil", "", "Fast")
        processor = next(filter(None, (getattr(library, f"{plain}ImageProcessor{end}", None) for end in ends)))
        made = processor(**{each: data[each] for each in _FIELDS if each in data})
        size, crop = (dict(each or {}) for each in (made.size, getattr(made, "crop_size", None)))
        crops = bool(getattr(made, "do_center_crop", False))
        shortest = set(size) == {"shortest_edge"}
        cover: Any = (size["shortest_edge"],) * 2 if shortest else (size.get("height"), size.get("width"))
        cut: Any = (crop["height"], crop["width"]) if crops else cover
        sides = all(type(side) is int and 0 < side <= least for side, least in zip(cut, cover, strict=True))
        if data.get("do_pad") or "crop_pct" in data:
            raise ConfigError(f"{name} pads images, or has a crop_pct, which patchbank does not know.")
        if not (made.do_resize and sides and max(cover) <= _MOST_SIDE and crops >= shortest):
            raise ConfigError(
                f"{name} prepares images in a way that patchbank does not know: size {size}, crop {crop}."
            )
        scale = round(255 * (made.rescale_factor if made.do_rescale else 1), 9)  # what 255 becomes
        mean, std = (
            tuple(float(each) / scale for each in (value if isinstance(value, list | tuple) else [value] * 3))
            for value in ((made.image_mean, made.image_std) if made.do_normalize else (0.0, 1.0))
        )
        if not (len(mean) == len(std) == 3 and all(map(isfinite, mean)) and all(0 < each < 1e6 for each in std)):
            raise ValueError(f"images are normalised by {mean} and {std}")
        return Input(
            size=cut,
            patch=patch,
            mean=mean,
            std=std,
            interpolation=_FILTERS[int(made.resample)],
            resize="center-crop" if shortest else "squash",
            crop="down",
            rgb=_rgb(library) if getattr(made, "do_convert_rgb", None) else "first",
        ), cover


def _rgb(library: Any) -> Rgb:
    """How the library makes RGB of what is transparent: since version 5, over white."""
    made = library.image_transforms.convert_to_rgb(Image.new("RGBA", (1, 1)))
    return "white" if np.asarray(made).any() else "first"


def _path(file: HubFile | Path, most: int = _MOST) -> Path:
    """A file on this machine; downloads one of at most that many bytes. Raises WeightsError."""
    if isinstance(file, Path):
        return file
    if file.size > most:
        raise WeightsError(f"{file.url} has {bytes_text(file.size)}: that is no {file.name}.")
    path = hub.download(file).path
    assert path is not None
    return path


def _loaded(library: Any, spec: TransformersSpec) -> Any:
    """The whole model with its weights, in float32 on the CPU. Raises WeightsError."""
    with _reading("config.json", spec.name):
        model_class, config = _model_class(library, spec.config)
        if spec.untrained:
            return model_class(config).eval()
    state: dict[str, Tensor] = {}
    for path in spec.paths:
        assert path is not None
        values = read_state(path)
        # Numbers of positions are the model's own; quantised weights are missed below.
        state |= {name: as_float32(path, name, value) for name, value in values.items() if value.is_floating_point()}
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            attn_implementation=config._attn_implementation,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise WeightsError(f"{spec.sources[0]} cannot be loaded as {spec.name}: {first_line(error)}") from error
    tower = _Tower.of(model)
    parts = [tower.module, *([tower.projection] if tower.projection is not None else [])]
    used = {id(each) for part in parts for each in part.parameters()}
    if POOLED not in spec.outputs and tower.pooler_name:  # often missing, and then not needed
        used -= {id(each) for each in getattr(tower.module, tower.pooler_name).parameters()}
    needed = {name for name, each in model.named_parameters() if id(each) in used and not name.endswith("mask_token")}
    other = {
        name: f"has the shape {tuple(found)}, expected {tuple(shape)}" for name, found, shape in info["mismatched_keys"]
    }
    wrong = {**dict.fromkeys(info["missing_keys"], "is missing"), **other}
    if lacking := sorted(needed & wrong.keys()):
        raise WeightsError(
            f"{spec.sources[0]} does not hold the weights of {spec.name}: {lacking[0]} {wrong[lacking[0]]} "
            f"({len(lacking)} of {len(needed)} parameters are missing or of another shape)."
        )
    return model.eval()
