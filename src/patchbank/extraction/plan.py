"""The plan of a run: everything that can be found out, and can be wrong, before anything is written."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from patchbank.bank import ezhoi
from patchbank.bank.base_writer import BankState, check_same
from patchbank.bank.manifest import Manifest
from patchbank.bank.packing import images_a_shard
from patchbank.bank.removal import removable
from patchbank.bank.writer import bank_state, check_location, disk_bytes, existing_manifest
from patchbank.budget import without_collection
from patchbank.config import WHOLE, Decode, ExtractConfig, Fingerprint, Layout, Partition, check_dtype
from patchbank.datasets import SPLITS, Dataset, Sample, require_images
from patchbank.encoders import compiling
from patchbank.encoders.encoder import auto_batch_size, check_precision, resolve_device, resolve_devices
from patchbank.encoders.openai.checkpoints import CHECKPOINTS, Checkpoint, find_checkpoint, load_visual
from patchbank.encoders.openai.registry import MEAN, STD, Model, get_model
from patchbank.errors import BankError, ConfigError, DatasetError
from patchbank.files import bytes_text, free_bytes, live_scratches, nearest_existing
from patchbank.locations import is_remote

_EXACT = "Pillow bicubic in the image's own mode, then RGB"
_PIXELS: dict[Decode, str] = {
    "exact": _EXACT,
    "fast": f"RGB by torch's bicubic of uint8, others by {_EXACT}",
}


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """One bank that a run will make or complete, checked as far as that is possible without writing anything.

    Attributes:
        dataset, out, config: what was asked for.
        model: the model.
        checkpoint: its weights; None if the official file has to be downloaded first.
        manifest: of the bank: the one that is there, or the one that will be written.
        resumed: whether the bank is there already.
        state: what it holds, if so.
        selected: the samples this run is for.
        todo: those of them without a feature yet.
        failed_before: how many of those failed in an earlier run.
        to_delete: features that ``overwrite`` deletes first.
        notes: what a user should know before it begins, a sentence each.
        devices: what it computes on; several are a process each. Of a cluster the kind alone.
    """

    dataset: Dataset
    out: Path
    config: ExtractConfig
    model: Model
    checkpoint: Checkpoint | None
    manifest: Manifest
    resumed: bool
    state: BankState | None = field(repr=False)
    selected: Sequence[Sample]
    todo: list[Sample]
    failed_before: int
    to_delete: list[Path]
    devices: tuple[str, ...] = ("cpu",)
    notes: tuple[str, ...] = ()

    @property
    def bytes_needed(self) -> int:
        """Disk space that the images left to do will take."""
        return disk_bytes(len(self.todo), self.manifest)

    @property
    def bytes_freed(self) -> int:
        """Disk space of the features that ``overwrite`` deletes first."""
        return sum(path.stat().st_size for path in self.to_delete)


@without_collection()
def make_plan(dataset: Dataset, out: Path, config: ExtractConfig) -> ExtractPlan:
    """Find out what there is to do. Writes nothing; raises every PatchbankError that `extract` can foresee."""
    keys = [sample.key for sample in dataset.samples]
    config = _for_part(dataset, config)
    try:
        existing = existing_manifest(out, overwrite=config.overwrite)
    except OSError as error:
        raise BankError(f"{out} cannot be read: {error.strerror or error}.") from error
    layout = config.layout or (existing.layout if existing else default_layout(dataset.name, is_remote(out)))
    if layout == "ezhoi" and existing is None:
        ezhoi.check_names(keys)
    check_location(out, layout)
    check_dtype(layout, config.dtype)
    _check_images(dataset)
    model = get_model(config.model)
    config, devices = _devices(config)  # before the weights are looked for, which takes longer
    if config.checkpoints is None and dataset.root is not None:
        config = replace(config, checkpoints=dataset.root / CHECKPOINTS)
    checkpoint = find_checkpoint(model, config.weights, config.checkpoints)
    if checkpoint is not None and config.weights is not None:
        load_visual(model, checkpoint, rounding=True)  # a wrong file is found out before anything is made of it

    wanted = describe(dataset, layout, config, checkpoint, devices[0].type)
    state = None
    if existing is not None:
        if layout == "shards":
            wanted = replace(wanted, cls=existing.cls)  # pickles that were converted have none
        check_same(out, existing, wanted)
        state = bank_state(out, existing)
    manifest = existing or wanted
    done, failed = (state.done, state.failed) if state else (set[str](), dict[str, str]())
    if layout == "ezhoi":
        ezhoi.check_names([*keys, *done])
    limit = min(config.limit or len(dataset), len(dataset))
    selected: Sequence[Sample] = dataset.samples[:limit]
    if dataset.part == WHOLE:
        selected = share_of(selected, config.partition, manifest)
    todo = [sample for sample in selected if sample.key not in done]
    return ExtractPlan(
        dataset=dataset,
        out=out,
        config=config,
        model=model,
        checkpoint=checkpoint,
        manifest=manifest,
        resumed=existing is not None,
        state=state,
        selected=selected,
        todo=todo,
        failed_before=sum(sample.key in failed for sample in todo),
        to_delete=removable(out) if config.overwrite else [],
        devices=tuple(map(str, devices)),
        notes=_others(out, config),
    )


def _for_part(dataset: Dataset, config: ExtractConfig) -> ExtractConfig:
    """The configuration of a run for a data set of which only a part was loaded. Raises ConfigError."""
    if dataset.part == WHOLE:
        return config
    if config.partition not in (WHOLE, dataset.part):
        raise ConfigError(f"The data set was loaded for part {dataset.part}, and the run is for {config.partition}.")
    if config.limit is not None:
        raise ConfigError("--limit counts images from the first file on, and a part opens its own only: leave it out.")
    if config.overwrite:
        raise ConfigError("overwrite would delete what the other partitions wrote: remove the bank first.")
    return replace(config, partition=dataset.part)


def describe_run(config: ExtractConfig) -> str:
    """What other runs are told of this one: its part, and where it is."""
    return json.dumps({"partition": str(config.partition), "host": platform.node(), "process": os.getpid()})


def _others(out: Path, config: ExtractConfig) -> tuple[str, ...]:
    """A note of each live run that extracts some of the same images into the same bank."""
    if is_remote(out):
        return ()
    notes = []
    for text in live_scratches(out):
        try:
            other = json.loads(text)
            part = Partition.parse(other["partition"])
        except (ConfigError, KeyError, TypeError, ValueError):
            continue
        if part.overlaps(config.partition):
            notes.append(
                f"Another run extracts some of the same images into {out} at this moment: process {other['process']} "
                f"on {other['host']}, part {part}. Neither harms the other, but both do the same work."
            )
    return tuple(notes)


def share_of(samples: Sequence[Sample], partition: Partition, bank: Manifest) -> Sequence[Sample]:
    """A partition's samples: a contiguous run. No shard is cut in two."""
    if partition == WHOLE:
        return samples
    unit = bank.shard_images or 1
    starts = [
        index
        for index, sample in enumerate(samples)
        if index == 0 or sample.position // unit != samples[index - 1].position // unit
    ]
    part = partition.of(len(starts))
    return samples[[*starts, len(samples)][part.start] : [*starts, len(samples)][part.stop]]


def default_layout(dataset: str, remote: bool = False) -> Layout:
    """EZ-HOI's, for its data sets; the compact one for any other, and in an object store."""
    return "ezhoi" if dataset in SPLITS and not remote else "shards"


def _devices(config: ExtractConfig) -> tuple[ExtractConfig, list[torch.device]]:
    """What a run computes on; and its configuration, with what depends on a cluster decided."""
    if config.engine == "local":
        return config, resolve_devices(config.device, config.precision)
    from patchbank.extraction import ray  # its package is an extra

    config = ray.settle(config)
    device = torch.device("cuda" if config.num_gpus_per_worker else "cpu")
    check_precision(device, config.precision)
    return config, [device]


def describe(
    dataset: Dataset, layout: str, config: ExtractConfig, checkpoint: Checkpoint | None, device_type: str | None = None
) -> Manifest:
    """What a bank is that a run begins; without a checkpoint, with the official one.

    Args:
        device_type: the kind of device it computes on; None is what the configuration says of this machine.

    Raises ConfigError where there is no such model or device, or layout and dtype do not go together.
    """
    model, listed = get_model(config.model), len(dataset) * dataset.part.count
    device = torch.device(device_type) if device_type else resolve_device(config.device, config.precision)
    fingerprint = make_fingerprint(model, checkpoint.sha256 if checkpoint else model.sha256, config)
    check_dtype(layout, config.dtype)
    manifest = Manifest.of_model(
        model,
        layout=layout,
        dataset=dataset.name,
        split=dataset.split,
        fingerprint=fingerprint,
        batch_size=config.batch_size or auto_batch_size(model, device),
        device=device.type,
        # By the whole run, whatever part of it is left or this process's: all must make the same bytes. Where only a
        # part was loaded, that is an estimate, and whoever begins the bank decides.
        compiled=compiling.decide(config.compile, model, min(config.limit or listed, listed), device),
        cls=layout == "shards",
    )
    if layout == "shards":
        manifest = replace(manifest, shard_images=images_a_shard(manifest, config.shard_size))
    return manifest


def make_fingerprint(model: Model, weights_sha256: str, config: ExtractConfig) -> Fingerprint:
    """What decides the numbers that this configuration gives."""
    return Fingerprint(
        model=model.name,
        weights_sha256=weights_sha256,
        architecture=model.architecture,
        output="patch tokens: ln_post and proj on every token, [CLS] dropped, not normalised",
        resize=config.resize,
        preprocessing=(
            f"to {model.input_size} pixels, {_PIXELS[config.decode]}, no EXIF rotation, mean {MEAN}, std {STD}"
        ),
        precision=config.precision,
        dtype=config.dtype,
    )


def _check_images(dataset: Dataset) -> None:
    if dataset.name in SPLITS:
        require_images(dataset)
    if not dataset.samples and dataset.part != WHOLE:
        return
    if not any(sample.exists() for sample in dataset.samples):
        first = dataset.samples[0]
        raise DatasetError(
            f"None of the {len(dataset):,} listed images is in {dataset.images}: there is no {first.path}, for one. "
            "Are these the images of another split or data set? Name their directory with --images."
        )


def check_disk(plans: Sequence[ExtractPlan]) -> None:
    """Raise BankError if the banks will not fit on their disks, taken together."""
    needed: dict[int, tuple[int, Path]] = {}
    for plan in plans:
        if is_remote(plan.out):
            continue
        disk = nearest_existing(plan.out).stat().st_dev
        before = needed[disk][0] if disk in needed else 0
        needed[disk] = (before + plan.bytes_needed - plan.bytes_freed, plan.out)
    for size, place in needed.values():
        if size > (free := free_bytes(place)):
            raise BankError(
                f"Not enough disk: the features need {bytes_text(size)} and {place} has {bytes_text(free)} free. "
                "Free some space, choose another --out, or store them in half the space with --dtype float16."
            )
