"""The family of timm's vision transformers: ``timm/NAME[.TAG]``.

timm itself says what a model computes and how an image becomes its input: a model without numbers (torch's meta device)
is asked for both, and timm's own path loads its weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from patchbank.config import ExtractConfig
from patchbank.encoders import hub
from patchbank.encoders.base import Description, EncoderSpec, Product
from patchbank.encoders.modules import LibraryEncoder
from patchbank.encoders.outputs import Architecture, chosen, sized
from patchbank.encoders.packed import Mlps
from patchbank.encoders.quiet import quiet
from patchbank.encoders.specs import RANDOM, FilesSpec, products_of, some_of
from patchbank.encoders.weights import COUNT, as_float32, first_wrong, guess, opened, read_state
from patchbank.errors import ConfigError, WeightsError, first_line, install
from patchbank.features import Input, Interpolation

PACKAGES = ("timm",)
PREFIX = "timm/"
# timm's modules whose models are vision transformers. What is in no list is tried all the same.
_MODULES = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "eva", "beit", "deit")
_RESIZE = {"center": "center-crop", "squash": "squash"}


def spec(config: ExtractConfig, root: Path | None, *, rounding: bool) -> TimmSpec:  # noqa: ARG001
    """The encoder of a configuration. Raises ConfigError and WeightsError as `encoders.find` does."""
    found = _described(config)
    if config.weights is not None:
        path = config.weights.absolute()
        given = found.of(path)
        with opened(path) as (shapes, _):
            state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        _refuse_lost_projection(found, path, shapes)
        with torch.device("meta"):
            _filled(found, path, state)  # refuses a wrong file before the run begins
        return given
    with _quiet() as timm:
        made = timm.models.get_pretrained_cfg(found.model)
    if not made.hf_hub_id:
        whence = f": download {made.url}, and give it with --weights" if made.url else ". Give some with --weights"
        raise WeightsError(f"The Hugging Face hub has no weights of {found.name}{whence}.")
    repo, _, revision = made.hf_hub_id.partition("@")
    names = (made.hf_hub_filename,) if made.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    return found.of(hub.locate(repo, names, revision or None))


def random(config: ExtractConfig) -> TimmSpec:
    """A model with timm's own random numbers. Raises ConfigError if there is no such model."""
    return _described(config)


def names() -> Sequence[str]:
    """timm's vision transformers that have weights, with their tags."""
    with _quiet() as timm:
        return [PREFIX + name for module in _MODULES for name in timm.list_models(module=module, pretrained=True)]


def describe(name: str) -> Description | None:
    """One of them; None if it is no vision transformer."""
    try:
        return _described(ExtractConfig(model=name)).description(text=False)
    except ConfigError:
        return None


def licence(name: str) -> str:
    """What timm states of the licence of a tag's weights; empty without a tag. Raises ConfigError as `random` does."""
    model = name.removeprefix(PREFIX)
    with _quiet() as timm:
        stated = _pretrained(timm, model).license if "." in model else ""
        told = f"timm {timm.__version__} states {stated} for {model}; check that these are its weights"
        return told if stated else ""  # an identity does not tell a file of the user's from the library's


class TimmSpec(FilesSpec):
    """One of timm's models; its name has the tag, unless the weights are a file of the user's."""

    @property
    def model(self) -> str:
        """timm's own name of it."""
        return self.name.removeprefix(PREFIX)

    def load(self, device: torch.device, batch_size: int) -> TimmEncoder:
        """Load the file. Raises WeightsError if it is damaged or another model's."""
        paths = self.obtain().paths
        if not paths:
            with _quiet() as timm:
                model = timm.create_model(self.model, **_classes(self.made))
        else:
            path = paths[0]
            assert path is not None
            state = read_state(path)
            model = _filled(self, path, state)
        resize(model, self.input.size)
        return TimmEncoder(self, self.made, model, device, batch_size)


class TimmEncoder(LibraryEncoder):
    """A model of timm's on a device."""

    model: Any
    mlps: ClassVar[Mlps] = {"Mlp": ("fc1", "act", "fc2"), "SwiGLU": ("fc1_g", "act", "fc2")}

    def __init__(
        self, spec: EncoderSpec, made: Architecture, model: Any, device: torch.device, batch_size: int
    ) -> None:
        for layer in model.modules():
            if getattr(layer, "q_bias", None) is not None:  # timm adds three biases to the product of `qkv.weight`
                layer.qkv.bias = nn.Parameter(torch.cat((layer.q_bias, layer.k_bias, layer.v_bias)))
                layer.q_bias = None
        super().__init__(spec, made, model, device, batch_size)

    def hidden(self, x: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
        """By timm's ``forward_intermediates``."""
        order = sorted(blocks)
        return dict(zip(order, _hidden(self.model, x, [block - 1 for block in order]), strict=True))

    def norm(self, x: Tensor) -> Tensor:
        """The model's ``norm``: an identity if it norms the pooled feature instead."""
        return self.model.norm(x)  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        """The model's ``head``."""
        return self.model.head(x)  # type: ignore[no-any-return]

    def pooled(self, x: Tensor) -> Tensor:
        """timm's ``forward_head``: before a classifier, after a projection."""
        return self.model.forward_head(x, pre_logits="head" not in self.made.pooling)  # type: ignore[no-any-return]


def architecture(model: Any, size: tuple[int, int]) -> Architecture:
    """What a model of timm's computes from an input of (h, w) pixels; it is run once, on its own device.

    Raises ValueError if it is no vision transformer: a grid of patches, after tokens that it counts.
    """
    try:
        x = torch.empty(1, 3, *size, device=next(model.parameters()).device)
        blocks, prefix = len(model.blocks), model.num_prefix_tokens
        tokens = model.norm(_hidden(model, x, [blocks - 1])[0])
        rows, columns = model.patch_embed.grid_size
        cls = getattr(model, "cls_token", None) is not None
        width = tokens.shape[-1]
        if tokens.shape != (1, prefix + rows * columns, width) or model.forward_features(x).shape != tokens.shape:
            raise ValueError(f"tokens are {tuple(tokens.shape)}, and a grid {rows} x {columns}")
        projecting = is_projection(model)
        pooled = model.forward_head(tokens, pre_logits=not projecting)
    except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        said = f" ({first_line(error)})" * isinstance(error, ValueError | AssertionError)  # often of its size
        raise ValueError(f"{type(model).__name__} has no grid of patch tokens{said}") from error
    layers = {name: getattr(model, name, None) for name in ("norm", "attn_pool", "fc_norm", "head")}
    there = [name for name, layer in layers.items() if not isinstance(layer, nn.Identity | None)]
    if "attn_pool" not in there:
        there.insert("norm" in there, f"{model.global_pool} pool")
    # Through attention pooling, or a norm of the pooled feature alone, no single token is projected.
    alone = projecting and not {"attn_pool", "fc_norm"} & set(there)
    return Architecture(
        blocks=blocks,
        width=width,
        cls=cls,
        registers=prefix - cls,
        norm="norm" if "norm" in there else "",
        projection="head" if alone else "",
        dim=model.head.out_features if alone else 0,
        pooled=pooled.shape[1] if pooled.ndim == 2 else 0,
        pooling=", ".join(there if projecting else there[: len(there) - ("head" in there)]),
    )


def is_projection(model: Any) -> bool:
    """Whether a model's head maps to a space of images and texts, and is no classifier.

    timm keeps the projection of CLIP's towers as ``head``, and calls a classifier's tag ``..._ft_...`` where one was
    trained in its place. The width of a joint space is a multiple of 64; no set of classes that timm has is as large.
    """
    head, made = getattr(model, "head", None), getattr(model, "pretrained_cfg", None) or {}
    return isinstance(head, nn.Linear) and head.out_features % 64 == 0 and "_ft_" not in (made.get("tag") or "")


def resize(model: Any, size: tuple[int, int]) -> None:
    """Give a model an input of (h, w) pixels: its positions are interpolated as timm does. Raises ConfigError."""
    if model.patch_embed.img_size in (None, size) and model.patch_embed.grid_size is not None:
        return
    with _quiet():
        model.set_input_size(img_size=size)


def _hidden(model: Any, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """All tokens after some blocks, counted from 0 and in order, before any norm: (B, T, width) each."""
    prefix = bool(model.num_prefix_tokens)
    found = model.forward_intermediates(
        x,
        indices=list(indices),
        return_prefix_tokens=prefix,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return [torch.cat(each[::-1], 1) for each in found] if prefix else found


def _described(config: ExtractConfig) -> TimmSpec:
    """A configuration's model, with random numbers. Raises ConfigError."""
    with _quiet() as timm:
        asked = config.model.removeprefix(PREFIX)
        name, made = asked, _pretrained(timm, asked)
        if made.tag and config.weights is None:
            name = f"{asked.partition('.')[0]}.{made.tag}"
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
                if not is_projection(model) and hasattr(model, "reset_classifier"):
                    model.reset_classifier(0)  # which many files of weights lack, and nothing needs
            size = tuple(model.pretrained_cfg["input_size"][-2:])
            own = architecture(model, size)
        except ValueError as error:
            raise ConfigError(f"{config.model} is no vision transformer: {error}.") from error
        data = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
        if data["crop_mode"] not in _RESIZE or data["interpolation"] not in get_args(Interpolation):
            raise ConfigError(
                f"{config.model} wants images with crop_mode {data['crop_mode']} and interpolation "
                f"{data['interpolation']}, which patchbank does not have."
            )
        seen = Input(
            size=size,
            patch=size[0] // model.patch_embed.grid_size[0],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"],
            resize=_RESIZE[data["crop_mode"]],  # type: ignore[arg-type]
            rgb="first",
        )
        seen = sized(config, config.model, seen, data["crop_pct"])
        with torch.device("meta"):
            resize(model, seen.size)
            architecture(model, seen.size)
    return TimmSpec(
        name=PREFIX + name,
        made=own,
        input=seen,
        outputs=chosen(config, config.model, own, seen),
        identity={"family": "timm", "model": PREFIX + name, "weights": RANDOM, "precision": config.precision},
        products=products(model, own, seen),
    )


def _pretrained(timm: Any, name: str) -> Any:
    """timm's description of a checkpoint. Raises ConfigError if it knows no such name."""
    known, tag = name.partition(".")[0], name.partition(".")[2]
    every = timm.list_models()
    if known not in every:
        near = difflib.get_close_matches(known, every, 3)
        meant = f" Did you mean {' or '.join(PREFIX + each for each in near)}?" if near else ""
        raise ConfigError(f"timm {timm.__version__} has no model {known!r}.{meant}")
    if tag and name not in (tagged := timm.list_models(f"{known}.*", include_tags=True)):
        tags = [each.partition(".")[2] for each in tagged if each.partition(".")[0] == known and "." in each]
        raise ConfigError(f"timm's {known} has no tag {tag!r}: it has {some_of(tags)}.")
    return timm.models.get_pretrained_cfg(name)


def products(model: Any, made: Architecture, seen: Input) -> list[Product]:
    """The matrix products of one image."""
    parts = list(model.blocks.modules())
    layers = [(each.in_features, each.out_features) for each in parts if isinstance(each, nn.Linear)]
    heads = [each.num_heads for each in parts if hasattr(each, "num_heads")]
    return products_of(seen, made.width, made.prefix, layers + [(made.width, made.dim)] * bool(made.projection), heads)


def _filled(found: TimmSpec, path: Path, state: dict[str, Tensor]) -> Any:
    """The model with a file's tensors, which it keeps; by timm's own path, so that its filters of names apply.

    Its own initial numbers are not computed. Raises WeightsError if the tensors are another model's.
    """
    with _quiet() as timm:
        with torch.device("meta"):
            kind = type(timm.create_model(found.model, **_classes(found.made)))
        state = timm.models.clean_state_dict(state)

        def load_state_dict(self: nn.Module, loaded: dict[str, Tensor], **_: Any) -> Any:
            # timm is not strict where it drops a classifier, and that has gone by now.
            expected, found = (
                {name: tuple(x.shape) for name, x in each.items()} for each in (self.state_dict(), loaded)
            )
            if wrong := first_wrong(expected, found):
                raise _WrongError(wrong)
            floats = {name: x if name.endswith(COUNT) else as_float32(path, name, x) for name, x in loaded.items()}
            return nn.Module.load_state_dict(self, floats, assign=True)

        builder: Any = import_module("timm.models._builder")
        eva: Any = import_module("timm.models.eva")
        load_pretrained = builder.load_pretrained
        # timm calls this within `create_model`, and logs what is missing instead of raising it.
        kind.load_state_dict = load_state_dict
        # A hybrid's backbone is in the file, and would be looked for on the hub.
        builder.load_pretrained = lambda made, **rest: type(made) is kind and load_pretrained(made, **rest)
        eva.print = lambda *_: None  # of an error that it expects
        try:
            with WithoutInitialNumbers():  # type: ignore[no-untyped-call]
                model = timm.create_model(
                    found.model,
                    pretrained=True,
                    # Whatever the tensors are, timm must not go on to those of the hub.
                    pretrained_cfg_overlay={"state_dict": state, **dict.fromkeys(("hf_hub_id", "url", "file"))},
                    **_classes(found.made),
                )
        except WeightsError:
            raise
        except Exception as error:  # of a filter that finds other names than it knows
            wrong = str(error) if isinstance(error, _WrongError) else f"timm cannot convert it ({first_line(error)})"
            kind_of_file = guess({name: tuple(x.shape) for name, x in state.items()})
            raise WeightsError(f"{path} does not hold the weights of {found.name}: {wrong}. {kind_of_file}") from error
        finally:
            del kind.load_state_dict
            builder.load_pretrained = load_pretrained
            del eva.print
    model.pretrained_cfg.pop("state_dict")  # copies
    return model


def _refuse_lost_projection(found: TimmSpec, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError if a file has CLIP's projection, and the model's tag a classifier in its place."""
    arch = found.model.partition(".")[0]
    rows = [shape[0] for name, shape in shapes.items() if name.endswith("head.weight") and len(shape) == 2]
    joint = "visual.proj" in shapes or any(each % 64 == 0 for each in rows)
    if joint and "_clip_" in arch and _classes(found.made):
        with _quiet() as timm:
            tags = [each for each in timm.list_models(f"{arch}.*", include_tags=True) if "_ft_" not in each]
        use = f"use --model {PREFIX}{tags[0]}" if tags else "use another model"
        raise WeightsError(f"{path} holds CLIP's projection, and {found.name} has a classifier in its place: {use}.")


def _classes(made: Architecture) -> dict[str, int]:
    """What leaves a model without a classifier, if its head is one."""
    return {} if "head" in made.pooling.split(", ") else {"num_classes": 0}


class _WrongError(Exception):
    """Why tensors are not a model's."""


class WithoutInitialNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves out whatever would be written to parameters: they are replaced."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _quiet() -> AbstractContextManager[Any]:
    """timm, without words of its own on the terminal. Raises ConfigError if it is not installed."""
    return quiet("timm", f"--model timm/... needs timm: {install('timm')}", "timm")
