"""The plan of a run: everything that can be determined, and can be wrong, before anything is written."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from threading import Thread

from patchbank import encoders
from patchbank.bank.manifest import Manifest, library_versions, stored_outputs
from patchbank.bank.parts import part_size
from patchbank.bank.pickles import check_names
from patchbank.bank.removal import place_of, removable
from patchbank.bank.storage import storage_of
from patchbank.bank.writer import (
    BankState,
    bank_state,
    check_location,
    check_room,
    check_same,
    disk_bytes,
    existing_manifest,
    gone_on_with,
)
from patchbank.budget import without_collection
from patchbank.config import WHOLE, ExtractConfig, Layout, Partition, check_dtype
from patchbank.datasets import SPLITS, Dataset, Sample, require_images
from patchbank.datasets.boxes import digest
from patchbank.datasets.folder import passed_over_text
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.defaults import auto_batch_size, compiles
from patchbank.errors import BankError, ConfigError, DatasetError
from patchbank.extraction.devices import Devices, assume, decide
from patchbank.features import CLS, GRID, POOLED
from patchbank.files import NEXT, live_scratches, nearest_existing
from patchbank.locations import is_remote

# A manifest's field -> the option that decides it; weights and their rounding are stated by their own rules.
_OPTIONS = {
    **{name: f"--{name}" for name in ("model", "activation", "precision", "layout", "dtype")},
    "input pool": "--pool-grid",
    "input resize": "--resize",
    "input decoder": "--decode",
    "input cut": "--crop",
}


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """One bank that a run will make or complete, with every check that is possible without writing.

    Attributes:
        dataset, out, config: the request.
        devices: the devices that compute.
        encoder: the encoder, before its weights are loaded.
        manifest: the existing bank's, or the new one's.
        resumed: whether the bank exists; with ``overwrite``, whether the one that will replace it was begun.
        state: that bank's; empty for a new one.
        selected: this run's samples.
        todo: the selected samples without a feature.
        failed_before: how many of those failed in an earlier run.
        to_delete: files of features that ``overwrite`` deletes when the new bank is complete.
        notes: what a user should know before the run begins, one sentence each.
    """

    dataset: Dataset
    out: Path
    config: ExtractConfig
    devices: Devices
    encoder: EncoderSpec
    manifest: Manifest
    resumed: bool
    state: BankState = field(repr=False)
    selected: Sequence[Sample]
    todo: Sequence[Sample]
    failed_before: int
    to_delete: list[Path]
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """Where the features are written."""
        return place_of(self.out, self.config.overwrite)

    @property
    def bytes_needed(self) -> int:
        """Disk space for the images to do."""
        return disk_bytes(len(self.todo), self.manifest)

    @property
    def bytes_freed(self) -> int:
        """Disk space of the features that ``overwrite`` deletes."""
        return sum(path.stat().st_size for path in self.to_delete)


@without_collection()
def make_plan(
    dataset: Dataset,
    out: Path,
    config: ExtractConfig,
    devices: Devices | None = None,
    encoder: EncoderSpec | None = None,
) -> ExtractPlan:
    """Determine what to do. Writes nothing; raises every PatchbankError that `extract` can foresee.

    Args:
        devices: the devices that compute; None decides by the configuration, if there is anything to do.
        encoder: the encoder; None finds the configuration's model.
    """
    config = _for_regions(_for_part(dataset, config), dataset)
    try:
        existing = existing_manifest(out, overwrite=config.overwrite)
    except OSError as error:
        raise BankError(f"{out} cannot be read: {error.strerror or error}.") from error
    begun = None if config.overwrite or not existing else existing.layout
    layout = config.layout or begun or ("shards" if dataset.regions else default_layout(dataset.name, is_remote(out)))
    check_location(out, layout)
    if layout == "ezhoi" and dataset.regions:
        raise ConfigError("Pickles are EZ-HOI's, of whole images: --layout shards stores boxes.")
    if layout == "ezhoi" and begun is None:
        check_names([sample.key for sample in dataset.samples], out)
    check_dtype(layout, config.dtype)
    if layout == "ezhoi" and (others := [name for name in config.output if name != GRID]):
        raise ConfigError(f"--output {others[0]}: a pickle holds the {GRID} alone. Add --layout shards.")
    check_images(dataset)
    lazy = devices is None and config.engine == "local"
    devices = devices or assume(config)
    state = BankState(set(), {}, [])
    if existing is not None and not config.overwrite:
        state = bank_state(out, existing)
    unfinished = lazy and len(state.done) < len(dataset)
    if unfinished:  # torch will be needed: it is imported while the weights' checksum is computed
        Thread(target=_import_torch, daemon=True).start()
    # EZ-HOI's scripts round weights, as clip.load does.
    encoder = encoder or find_encoder(config, dataset.root, rounding=dataset.name in SPLITS)
    devices = decide(config) if unfinished else devices
    wanted = describe(dataset, layout, config, devices, encoder)
    if (existing := gone_on_with(existing, wanted, config.overwrite)) is not None:
        if not config.output:  # converted pickles hold patch tokens only
            outputs = {name: wanted.outputs[name] for name in existing.outputs if name in wanted.outputs}
            wanted = replace(wanted, outputs=outputs or wanted.outputs)
        check_same(out, existing, wanted, _options_of(existing, wanted))
        state = bank_state(place_of(out, True), existing) if config.overwrite else state
    manifest = existing or wanted
    selected: Sequence[Sample] = dataset.samples
    if config.limit is not None:
        selected = selected[: _end_of(config.limit, dataset)]
    if dataset.part == WHOLE:
        selected = share_of(selected, config.partition, manifest)
    todo = without(selected, state.done)
    if layout == "ezhoi" and todo and (begun or state.done):
        check_names([*(sample.key for sample in dataset.samples), *state.done], out)
    return ExtractPlan(
        dataset=dataset,
        out=out,
        config=config,
        devices=decide(config) if lazy and todo and not unfinished else devices,
        encoder=encoder,
        manifest=manifest,
        resumed=existing is not None,
        state=state,
        selected=selected,
        todo=todo,
        failed_before=sum(sample.key in state.failed for sample in todo) if state.failed else 0,
        to_delete=removable(out) if config.overwrite else [],
        notes=(
            *_others(out, config),
            *dataset.notes,
            *filter(None, [passed_over_text(dataset), _unfinished(out, config)]),
        ),
    )


def _import_torch() -> None:
    with suppress(Exception):  # this process imports it later, and says why it cannot
        import_module("torch")


def without(samples: Sequence[Sample], done: Collection[str]) -> Sequence[Sample]:
    """The samples that are not done. If none is, they are as they were held: boxes are made on access."""
    return [sample for sample in samples if sample.key not in done] if done else samples


def describe(
    dataset: Dataset, layout: Layout, config: ExtractConfig, devices: Devices, encoder: EncoderSpec
) -> Manifest:
    """The manifest of a new bank."""
    listed = len(dataset) * dataset.part.count
    regions = digest(dataset.samples)
    made = replace(encoder.input.resized_by(config.resize), decoder=config.decode, cut=config.crop or "")
    outputs = stored_outputs(encoder.outputs, layout, config.dtype)
    return Manifest(
        layout=layout,
        dataset=dataset.name,
        split=dataset.split,
        outputs=outputs,
        identity=dict(encoder.identity),
        input=made,
        part_size=part_size(layout, outputs, config.shard_size),
        batch_size=config.batch_size or auto_batch_size(made.patches, devices.kind),
        device=devices.kind,
        # By the images of the whole run, not of its rest or of a part: all processes must make the same bytes. If only
        # a part was loaded, this is an estimate, and the process that begins the bank decides.
        compiled=compiles(config.compile, encoder, min(config.limit or listed, listed), devices.kind),
        versions=library_versions(encoders.packages(encoder.name)),
        regions=regions,
    )


def find_encoder(config: ExtractConfig, root: Path | None, *, rounding: bool) -> EncoderSpec:
    """The configuration's encoder; of regions, it gives a feature of the whole unless the configuration says more."""
    find = partial(encoders.find, root=root, rounding=rounding)
    if not config.crop or config.output:
        return find(config)
    try:
        return find(replace(config, output=(POOLED,)))
    except ConfigError:  # of models that have none, as OpenAI's
        return find(replace(config, output=(CLS,)))


def _for_regions(config: ExtractConfig, dataset: Dataset) -> ExtractConfig:
    """The configuration with the way in which boxes are cut out, of a dataset of regions. Raises ConfigError."""
    if not dataset.regions:
        if config.crop is not None:
            raise ConfigError("--crop cuts out boxes, and these samples are whole images: leave it out.")
        return config
    if config.resize not in (None, "squash"):
        raise ConfigError("--resize is for whole images: --crop says how boxes become the input.")
    return replace(config, crop=config.crop or "pad", resize="squash")


def _end_of(limit: int, dataset: Dataset) -> int:
    """How many samples the first images have: as many, but of regions."""
    if not dataset.regions:
        return limit
    images = (len(list(same)) for _, same in groupby(dataset.samples, lambda sample: sample.image))
    return sum(islice(images, limit))


def _options_of(found: Manifest, wanted: Manifest) -> str:
    """The options that a bank was made with, of those that differ; empty if options alone do not decide them."""
    has = {name: value for name, value, _ in found.differences(wanted)}
    if has.keys() & {"dataset", "split", "regions", "rounded"}:
        return ""
    options = [f"{_OPTIONS[name]} {value}" for name, value in has.items() if name in _OPTIONS]
    if "input size" in has:
        options.append("--input-size {}x{}".format(*found.input.size))
    if "outputs" in has:
        options += [f"--output {name}" for name in found.outputs]
    official = encoders.official_weights(found.identity)
    if "weights" in has and not official:
        options += [f"--model {found.model}"] * ("model" not in has) + ["--weights FILE"]
    elif "weights" in has and not encoders.official_weights(wanted.identity):
        options.append("no --weights")
    if has.get("rounding", "none") != "none":
        options.append("--round-weights")
    elif "rounding" in has and "weights" not in has:
        options.append("no --round-weights")
    return ", ".join(options)


def _for_part(dataset: Dataset, config: ExtractConfig) -> ExtractConfig:
    """The configuration with the part for which the dataset was loaded. Raises ConfigError."""
    if dataset.part == WHOLE:
        return config
    if config.partition not in (WHOLE, dataset.part):
        raise ConfigError(f"The dataset was loaded for part {dataset.part}, and the run is for {config.partition}.")
    if config.limit is not None:
        raise ConfigError("--limit counts images from the first file on, and a part opens its own only: leave it out.")
    if config.overwrite:
        raise ConfigError("--overwrite would delete what the other partitions wrote: remove the bank first.")
    return replace(config, partition=dataset.part)


def _unfinished(out: Path, config: ExtractConfig) -> str:
    """A note on what an interrupted run has left."""
    if config.overwrite or is_remote(out) or not (out / NEXT).is_dir():
        return ""
    return f"A run with --overwrite has not ended: the same command completes it. Or delete {out / NEXT}."


def describe_run(config: ExtractConfig) -> str:
    """This run's description for other runs: its part, and where it runs."""
    return json.dumps({"partition": str(config.partition), "host": platform.node(), "process": os.getpid()})


def _others(out: Path, config: ExtractConfig) -> tuple[str, ...]:
    """One note for each live run that extracts some of the same images into the same bank."""
    if is_remote(out):
        return ()
    notes = []
    for text in live_scratches(place_of(out, config.overwrite)):
        try:
            other = json.loads(text)
            part = Partition.parse(other["partition"])
        except (ConfigError, KeyError, TypeError, ValueError):
            continue
        if part.overlaps(config.partition):
            notes.append(
                f"Another run is extracting some of the same images into {out}: process {other['process']} on "
                f"{other['host']}, part {part}. Both runs are safe, but do the same work."
            )
    return tuple(notes)


def share_of(samples: Sequence[Sample], partition: Partition, bank: Manifest) -> Sequence[Sample]:
    """A partition's samples: a contiguous run of whole shards."""
    if partition == WHOLE:
        return samples
    shards = [sample.position // bank.atom for sample in samples]
    starts = [index for index, shard in enumerate(shards) if index == 0 or shard != shards[index - 1]]
    part = partition.of(len(starts))
    return samples[[*starts, len(samples)][part.start] : [*starts, len(samples)][part.stop]]


def default_layout(dataset: str, remote: bool = False) -> Layout:
    """EZ-HOI's layout for its datasets; shards for any other, and in an object store."""
    return "ezhoi" if dataset in SPLITS and not remote else "shards"


def check_images(dataset: Dataset) -> None:
    """Raise DatasetError if none of the images exists."""
    if dataset.name in SPLITS:
        require_images(dataset)
    if not dataset.samples:
        if dataset.part != WHOLE:
            return
        raise DatasetError(f"{dataset.title} has no images.")
    if not any(sample.exists() for sample in dataset.samples):
        first = dataset.samples[0]
        raise DatasetError(
            f"None of the {len(dataset):,} listed images is in {dataset.images}: there is no {first.path}, for one. "
            "Are these the images of another split or dataset? Name their directory with --images."
        )


def check_places(plans: Sequence[ExtractPlan]) -> None:
    """Raise BankError if a bank cannot be written, or the banks together do not fit on their disks."""
    for plan in plans:
        try:
            storage_of(plan.out).check()
        except OSError as error:
            reason = error.strerror or error
            raise BankError(f"{plan.out} cannot be written: {reason}. Choose another --out.") from error
    check_disk(plans)


def check_disk(plans: Sequence[ExtractPlan]) -> None:
    """Raise BankError if the banks together do not fit on their disks."""
    for together in by_disk(plans):
        needed, overwrite = sum(each.bytes_needed for each in together), any(each.to_delete for each in together)
        check_room(together[-1].out, needed, "--out", overwrite=overwrite)


def by_disk(plans: Sequence[ExtractPlan]) -> list[list[ExtractPlan]]:
    """The plans of banks on this machine, grouped by file system."""
    disks: dict[int, list[ExtractPlan]] = defaultdict(list)
    for plan in plans:
        if not is_remote(plan.out):
            disks[nearest_existing(plan.out).stat().st_dev].append(plan)
    return list(disks.values())
