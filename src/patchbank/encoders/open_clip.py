"""The family of open_clip's models: ``open_clip/ARCH:TAG``.

CLIP's own vision transformers go through the lean tower; towers that open_clip takes from timm, through timm's family.
open_clip says what an architecture is, and how a checkpoint's images are prepared.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from math import isqrt, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbank.config import Activation, ExtractConfig
from patchbank.encoders import hub
from patchbank.encoders.base import Description, Encoder
from patchbank.encoders.clip import Shape
from patchbank.encoders.clip_files import CONFIG, VISUAL, Stated, load_state, marked_by_openai, shapes_in, stated_beside
from patchbank.encoders.outputs import chosen, sized
from patchbank.encoders.specs import RANDOM, FilesSpec, some_of
from patchbank.encoders.weights import COUNT, as_float32, first_wrong, guess, opened
from patchbank.errors import ConfigError, WeightsError, install
from patchbank.features import Identity, Input

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKAGES = ("open_clip_torch", "timm")
PREFIX = "open_clip/"
_MISSING = f"--model open_clip/... needs open_clip: {install('open-clip')}"
_RESIZE = {"shortest": "center-crop", "squash": "squash"}
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_QUICK = "-quickgelu"  # how open_clip's names of architectures with QuickGELU end
# What the lean tower takes of a `vision_cfg`, and what makes no difference to it.
_SHAPE = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_SHAPE |= {"no_ln_pre", "ls_init_value", "pool_type", "final_ln_after_pool"}
_IDLE = {"output_tokens", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads"}


def spec(config: ExtractConfig, root: Path | None, *, rounding: bool) -> OpenClipSpec:  # noqa: ARG001
    """The encoder of a configuration. Raises ConfigError and WeightsError as `encoders.find` does."""
    found = random(config)
    if config.weights is not None:
        path = config.weights.absolute()
        given = found.of(path)
        found.check(path, shapes_in(path))  # refuses a wrong file before the run begins
        return given
    arch, tag = _parsed(found.name)
    with _library() as library:
        tags = library.list_pretrained_tags_by_model(arch)
        made = library.get_pretrained_cfg(arch, tag)
    if not tag:
        some = f"a tag ({some_of(tags)}) as {PREFIX}{arch}:{tags[0]}, or " if tags else ""
        raise ConfigError(f"{found.name} does not say which weights: add {some}a file with --weights.")
    repo, _, name = made.get("hf_hub", "").rpartition("/")
    if not repo:
        raise WeightsError(f"The Hugging Face hub has no weights of {found.name}. Give some with --weights.")
    return found.of(hub.locate(repo, (re.sub(r"\.(bin|pth)$", ".safetensors", name), name) if name else _WEIGHTS))


def random(config: ExtractConfig) -> OpenClipSpec:
    """A model with random numbers. Raises ConfigError if it is unknown or no vision transformer."""
    arch, tag = _parsed(config.model)
    with _library() as library:
        settings, stated = _settings(library, arch, tag)
        if config.weights is not None:
            stated |= _of_the_file(config.weights, arch, settings)
        preprocess = library.transform.merge_preprocess_dict(library.transform.PreprocessCfg(), stated)
        vision, activation = settings["vision_cfg"], _activation(settings)
        if config.activation not in (None, activation):
            raise ConfigError(
                f"--activation {config.activation}: open_clip's {arch} computes {activation or 'what timm does'}. "
                "Leave it out, or use another architecture."
            )
        size = vision.get("image_size", 224)
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if preprocess["resize_mode"] not in _RESIZE:
            raise ConfigError(f"{config.model} wants images with resize_mode {preprocess['resize_mode']}: not known.")
        name = PREFIX + arch + (f":{tag}" if tag else "")
        identity = {"family": "open_clip", "model": name, "weights": RANDOM, "precision": config.precision}
        own = Input(
            size=size,
            patch=vision.get("patch_size") or 16,
            mean=tuple(preprocess["mean"]),
            std=tuple(preprocess["std"]),
            interpolation="bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
            resize=_RESIZE[preprocess["resize_mode"]],  # type: ignore[arg-type]
        )
        if vision.get("timm_model_name"):
            return _of_timm(config, settings, own, identity)
    shape = _shape(config.model, settings)
    made = sized(config, config.model, own)
    return OpenClipSpec(
        name=name,
        settings=settings,
        made=shape.architecture,
        input=made,
        outputs=chosen(config, config.model, shape.architecture, made),
        identity={**identity, "activation": activation or ""},
        products=shape.products(made),
        expected=shape.parameters(own.patch, prod(own.grid)),
        shape=shape,
    )


def names() -> Sequence[str]:
    """open_clip's models with weights, with their tags; those with the activation of their weights."""
    with _library() as library:
        every = library.list_pretrained()
        return [f"{PREFIX}{arch}:{tag}" for arch, tag in every if not _wrong_activation(library, arch, tag)]


def describe(name: str) -> Description | None:
    """One of them; None if it is no vision transformer that patchbank takes."""
    try:
        return random(ExtractConfig(model=name)).description(text=True)
    except ConfigError:
        return None


def encode_texts(spec: OpenClipSpec, texts: Sequence[str]) -> Tensor:
    """Texts as ``encode_text`` gives them. Raises as `encoders.encode_texts` does.

    SigLIP's lie in the space of its ``pooled`` output, not of its patch tokens.
    """
    from patchbank.encoders import text

    paths = spec.obtain().paths
    if not paths or paths[0] is None:
        raise WeightsError(f"{spec.name} has random weights: give a checkpoint with --weights.")
    return text.encode_texts(paths[0], texts, _parsed(spec.name)[0])


@dataclass(frozen=True, kw_only=True)
class OpenClipSpec(FilesSpec):
    """One of open_clip's models: ``open_clip/ARCH:TAG``, or without tag.

    Attributes:
        settings: open_clip's of the architecture.
        expected: the image tower's parameters, without ``visual.``, and their shapes.
        shape: for the lean tower; None if timm makes the tower.
    """

    settings: Mapping[str, Any]
    expected: Mapping[str, tuple[int, ...]] = field(repr=False)
    shape: Shape | None = None

    def load(self, device: torch.device, batch_size: int) -> Encoder:
        """Load the file. Raises WeightsError if it is damaged or another model's."""
        from patchbank.encoders.tower import TowerEncoder

        parameters = self.parameters()
        if self.shape is None:
            return _timm_encoder(self, parameters, device, batch_size)
        activation: Any = self.identity["activation"]
        return TowerEncoder(self, parameters, device, batch_size, heads=self.shape.heads, activation=activation)

    def parameters(self) -> dict[str, Tensor]:
        """The image tower's, float32 on the CPU, without ``visual.``; random numbers if there is no file."""
        import torch

        paths = self.obtain().paths
        if not paths:
            made: dict[str, Tensor] = {}
            for name, shape in self.expected.items():
                one = re.sub(r"(blocks\.)\d+\.", r"\g<1>0.", name)
                made[name] = made[one] if one in made else 0.02 * torch.randn(shape)
            return made
        path = paths[0]
        assert path is not None
        state = load_state(path, VISUAL)
        self.check(path, {name: tuple(value.shape) for name, value in state.items()})
        return {
            name: value if name.endswith(COUNT) else as_float32(path, VISUAL + name, value)
            for name, value in state.items()
        }

    def check(self, path: Path, found: Mapping[str, tuple[int, ...]]) -> None:
        """Raise WeightsError if a file's parameters are not the model's; positions may be of another input size."""
        expected = dict(self.expected)
        positions = found.get("positional_embedding", ())
        if self.shape and len(positions) == 2 and isqrt(positions[0] - 1) ** 2 == positions[0] - 1:
            expected["positional_embedding"] = (positions[0], self.shape.width)
        wrong = first_wrong(expected, found, VISUAL) if found else f"no parameter's name begins with {VISUAL!r}"
        if not wrong:
            return
        with opened(path) as (shapes, _):
            raise WeightsError(f"{path} does not hold the weights of {self.name}: {wrong}. {guess(shapes)}")


def _library() -> AbstractContextManager[Any]:
    from patchbank.encoders.text import open_clip

    return open_clip(_MISSING)


def _parsed(name: str) -> tuple[str, str]:
    """``open_clip/ARCH:TAG`` -> (ARCH, TAG); the tag may be empty."""
    arch, _, tag = name.removeprefix(PREFIX).partition(":")
    return arch.replace("/", "-"), tag.lower().replace("-", "_")


def _settings(library: Any, arch: str, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An architecture's settings, and what open_clip says of a tag's weights. Raises ConfigError."""
    settings = library.get_model_config(arch)
    if settings is None:
        near = difflib.get_close_matches(arch, library.list_models(), 3)
        meant = f" Did you mean {' or '.join(PREFIX + each for each in near)}?" if near else ""
        raise ConfigError(f"open_clip {library.__version__} has no model {arch!r}.{meant}")
    stated = dict(library.get_pretrained_cfg(arch, tag))
    if tag and not stated:
        tags = some_of(library.list_pretrained_tags_by_model(arch))
        raise ConfigError(f"open_clip's {arch} has no tag {tag!r}: it has {tags}.")
    if not isinstance(settings["vision_cfg"].get("layers", 12), int):
        raise ConfigError(f"{PREFIX}{arch} is no vision transformer: it has no grid of patch tokens.")
    if _wrong_activation(library, arch, tag):
        raise ConfigError(
            f"{PREFIX}{arch}:{tag} was trained with QuickGELU, and open_clip's {arch} computes GELU. Use "
            f"--model {PREFIX}{arch}{_QUICK}:{tag}."
        )
    return settings, stated


def _wrong_activation(library: Any, arch: str, tag: str) -> bool:
    """Whether weights need QuickGELU, and the architecture has GELU; of timm's towers open_clip does not say it."""
    quick = library.get_pretrained_cfg(arch, tag).get("quick_gelu", False)
    return bool(quick) and not library.get_model_config(arch).get("quick_gelu", False)


def _activation(settings: Mapping[str, Any]) -> Activation | None:
    """Of an architecture; None if timm makes the tower."""
    if settings["vision_cfg"].get("timm_model_name"):
        return None
    return "quickgelu" if settings.get("quick_gelu") else "gelu"


def _of_the_file(path: Path, arch: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared for a user's weights, if a config beside them says so.

    Raises WeightsError if the weights are known to be of another architecture.
    """
    stated = stated_beside(path)
    if stated is None and path.is_file() and marked_by_openai(path):
        stated = Stated("quickgelu", settings["vision_cfg"], {})
    if stated is None:
        return {}
    own = _activation(settings)
    if own and stated.activation != own:
        other = arch.removesuffix(_QUICK) if arch.endswith(_QUICK) else arch + _QUICK
        raise WeightsError(
            f"{path} was trained with {stated.activation}, as its format or {CONFIG} says, and open_clip's {arch} "
            f"computes {own}. Use --model {PREFIX}{other}."
        )
    vision = settings["vision_cfg"]
    idle = _IDLE | {"image_size"}
    others = [f"{name} {value}" for name, value in stated.vision.items() if name not in idle and value]
    others = [each for each in others if each not in [f"{name} {value}" for name, value in vision.items()]]
    if others := [each for each in others if each.split()[0] in vision or each.split()[0] in _SHAPE]:
        raise WeightsError(f"{path.with_name(CONFIG)} asks for {', '.join(others)}, which {arch} does not have.")
    return stated.preprocess


def _shape(name: str, settings: Mapping[str, Any]) -> Shape:
    """The shape of a standard vision transformer. Raises ConfigError if it is none, or not known."""
    vision = {key: value for key, value in settings["vision_cfg"].items() if key not in _IDLE and value}
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    mean = vision.get("pool_type", "tok") == "avg"
    others = sorted(vision.keys() - _SHAPE)
    if vision.get("pool_type", "tok") not in ("tok", "avg") or (mean and not vision.get("final_ln_after_pool")):
        others.append("pool_type")
    if others:
        listed = ", ".join(f"{key} {vision[key]}" for key in others)
        raise ConfigError(f"{name} is built with {listed}, which patchbank does not compute: use another model.")
    return Shape(
        blocks=layers,
        width=width,
        heads=width // vision.get("head_width", 64),
        hidden=int(width * vision.get("mlp_ratio", 4.0)),
        dim=settings["embed_dim"],
        mean=mean,
        pre_norm=not vision.get("no_ln_pre"),
        layer_scale=bool(vision.get("ls_init_value")),
    )


def _visual(library: Any, settings: Mapping[str, Any]) -> Any:
    """open_clip's image tower, beside as small a text tower as there is."""
    text = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 2}
    return library.CLIP(settings["embed_dim"], dict(settings["vision_cfg"]), text).visual.eval()


def _of_timm(config: ExtractConfig, settings: dict[str, Any], own: Input, identity: Identity) -> OpenClipSpec:
    """A model whose tower is timm's. Raises ConfigError if that is no vision transformer."""
    import torch

    from patchbank.encoders import timm

    with _library() as library, torch.device("meta"):
        visual = _visual(library, settings)
        expected = {name: tuple(value.shape) for name, value in visual.state_dict().items()}
        trunk = visual.trunk
        trunk.pretrained_cfg = {}  # a tag of timm's own says nothing of this head
        try:
            made = timm.architecture(trunk, own.size)
        except ValueError as error:
            raise ConfigError(f"{config.model} is no vision transformer: {error}.") from error
        if list(visual.head.parameters()):
            raise ConfigError(f"{config.model} projects outside of timm's tower: use another model.")
        own = replace(own, patch=own.size[0] // trunk.patch_embed.grid_size[0])
        seen = sized(config, config.model, own)
        timm.resize(trunk, seen.size)
    return OpenClipSpec(
        name=identity["model"],
        settings=settings,
        made=made,
        input=seen,
        outputs=chosen(config, config.model, made, seen),
        identity=identity,
        products=timm.products(trunk, made, seen),
        expected=expected,
    )


def _timm_encoder(spec: OpenClipSpec, state: dict[str, Tensor], device: torch.device, batch_size: int) -> Encoder:
    from patchbank.encoders import timm

    with _library() as library, timm.WithoutInitialNumbers():  # type: ignore[no-untyped-call]
        visual = _visual(library, spec.settings)
    visual.load_state_dict(state, assign=True)
    timm.resize(visual.trunk, spec.input.size)
    return timm.TimmEncoder(spec, spec.made, visual.trunk, device, batch_size)
