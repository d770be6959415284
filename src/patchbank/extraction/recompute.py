"""Extracts a bank's features again from the images, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from patchbank import encoders
from patchbank.bank.check import Report, compare_with_pixels
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import sample_bytes
from patchbank.budget import ByteBudget
from patchbank.config import ExtractConfig
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Failure
from patchbank.encoders import trained
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.device import resolve_device
from patchbank.encoders.runner import Runner
from patchbank.encoders.weights import sha256_of_weights
from patchbank.errors import ConfigError, WeightsError
from patchbank.features import UNKNOWN, Input
from patchbank.preprocess import load

_BYTES = 2 << 30  # memory for decoding an image


def recompute(dataset: Dataset, runner: Runner, wanted: Input) -> Callable[[str], Mapping[str, Tensor] | None]:
    """A function from key to every output, float32 on the CPU, or None if the image cannot be read."""
    samples = {sample.key: sample for sample in dataset.samples}

    def function(key: str) -> Mapping[str, Tensor] | None:
        image = load(samples[key], wanted, ByteBudget(_BYTES))
        if isinstance(image, Failure):
            return None
        outputs = runner(torch.from_numpy(image.pixels.copy())[None])
        return {name: value[0].cpu() for name, value in outputs.items()}

    return function


def compare_sample(report: Report, dataset: Dataset, runner: Runner, wanted: Input, count: int) -> None:
    """Extract `count` of a verified bank's sound features again, and add those that differ to the report."""
    keys = [sample.key for sample in dataset.samples if sample.exists()]
    compare_with_pixels(report, keys, count, recompute(dataset, runner, wanted))


def config_of(bank: Manifest, config: ExtractConfig) -> ExtractConfig:
    """The configuration that a bank was made with; fields that the bank does not store are `config`'s.

    Raises WeightsError if it needs the trained weights that pip fetches, and they are not there.
    """
    names = ["model", "precision"] + ["activation"] * (config.weights is not None)  # OpenAI's own have one
    made = {name: bank.identity[name] for name in names if name in bank.identity}
    known = {name: value for name, value in made.items() if value != UNKNOWN}
    if config.weights is None and bank.identity.get("weights") == trained.SHA256:
        config = replace(config, weights=trained.require())
    return replace(
        config,
        **known,  # type: ignore[arg-type]
        round_weights=bank.identity.get("rounding", "none") != "none",  # other families do not round
        output=tuple(bank.outputs),
        input_size=bank.input.size,
        pool_grid=bank.input.pool,
        resize=bank.input.resize,
        crop=bank.input.cut or None,
        decode=bank.input.decoder,
        dtype=bank.dtype,
        layout=bank.layout,
        shard_size=bank.part_size * sample_bytes(bank.outputs),
    )


def spec_of(bank: Manifest, config: ExtractConfig, root: Path | None) -> EncoderSpec:
    """The encoder that a bank was made with.

    Args:
        config: with the user's weights and checkpoints.
        root: the EZ-HOI checkout, which may hold checkpoints.

    Raises:
        WeightsError: its weights are missing, or differ from the bank's.
        ConfigError: the model is unknown.
    """
    made, given = config_of(bank, config), config.weights
    if given is not None and given.is_file():  # before anything that weights of another architecture lack
        _compare(bank, given, sha256_of_weights(given))
    try:
        spec = encoders.find(made, root)
    except ConfigError:
        if given is None:
            raise
        spec = encoders.find(replace(made, output=(), input_size=None, pool_grid=1), root)
        _compare(bank, given, spec.identity["weights"])
        raise
    _compare(bank, given, spec.identity["weights"])
    return spec


def _compare(bank: Manifest, given: Path | None, found: str) -> None:
    known = bank.identity.get("weights", UNKNOWN)
    if known in (UNKNOWN, found):
        return
    if given is None:
        raise WeightsError(f"The bank was made with other weights (SHA-256 {known}): give the file with --weights.")
    raise WeightsError(
        f"The bank was made with other weights than {given}: their SHA-256 is {known}, {given.name}'s {found}. "
        "Give the right ones with --weights."
    )


def runner_of(bank: Manifest, config: ExtractConfig, root: Path | None) -> Runner:
    """The encoder of `spec_of`, loaded; in fp32 if this machine lacks the bank's precision."""
    config = config_of(bank, config)
    try:
        device = resolve_device(config.device, config.precision)
    except ConfigError:
        config = replace(config, precision="fp32")
        device = resolve_device(config.device, config.precision)
        bank = replace(bank, identity={**bank.identity, "precision": "fp32"})
    return Runner(spec_of(bank, config, root).obtain(), device)
