"""`extract`: a dataset's images to a bank. Everything that can be wrong with the setup is found out beforehand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from patchbank.bank import ezhoi
from patchbank.bank.manifest import Manifest, library_versions
from patchbank.bank.writer import BankWriter, disk_bytes, done_keys, existing_manifest, removable
from patchbank.config import ExtractConfig, Fingerprint
from patchbank.datasets import Dataset, Record
from patchbank.encoder.encoder import PatchEncoder, auto_batch_size, resolve_device
from patchbank.encoder.weights import Checkpoint, find_checkpoint, obtain_checkpoint
from patchbank.encoder.weights import Progress as DownloadProgress
from patchbank.errors import BankError, DatasetError
from patchbank.files import free_bytes, nearest_existing
from patchbank.models import MEAN, STD, Model, get_model
from patchbank.pipeline import Slots, Stages, StageTimes, run
from patchbank.preprocess import Failure, load

# Called after each durable commit: features written, and failures, since the last call.
OnCommit = Callable[[int, Sequence[Failure]], None]


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """One bank that a run will make or complete, checked as far as that is possible without writing anything.

    Attributes:
        dataset, out, config: what was asked for.
        model: the model.
        checkpoint: its weights; None if the official file has to be downloaded first.
        manifest: of the bank: the one that is there, or the one that will be written.
        resumed: whether the bank is there already.
        selected: positions in ``dataset.records`` of the images this run is for.
        todo: those of them without a feature yet.
    """

    dataset: Dataset
    out: Path
    config: ExtractConfig
    model: Model
    checkpoint: Checkpoint | None
    manifest: Manifest
    resumed: bool
    selected: range
    todo: list[int]

    @property
    def bytes_needed(self) -> int:
        """Disk space that the images left to do will take."""
        return disk_bytes(len(self.todo), self.manifest)

    @property
    def bytes_freed(self) -> int:
        """Disk space of the features that ``overwrite`` deletes first."""
        return sum(path.stat().st_size for path in removable(self.out)) if self.config.overwrite else 0


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What a run did.

    Attributes:
        bank: its directory.
        images: features written by this run.
        already_done: features that were there before.
        failures: key -> reason, of this run's images that could not be extracted.
        remaining: images not reached, because the run was stopped.
        seconds: how long it took, without loading the model.
        bytes_written: of features.
        times: seconds spent waiting for each stage.
        notes: what a user should know of this run, a sentence each.
    """

    bank: Path
    images: int
    already_done: int
    failures: dict[str, str]
    remaining: int
    seconds: float
    bytes_written: int
    times: StageTimes
    notes: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Of this run, failures not counted."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def extract(
    dataset: Dataset,
    out: str | Path,
    config: ExtractConfig | None = None,
    *,
    on_commit: OnCommit | None = None,
    stop: Event | None = None,
) -> ExtractSummary:
    """Extract a dataset's patch tokens into the bank `out`, or complete the bank that is there.

    Args:
        dataset: what `load_dataset` gives.
        out: the bank's directory.
        config: what to do; None is `ExtractConfig`'s defaults, which are the original scripts'.
        on_commit: told of every durable commit: (features written, failures), for a progress bar.
        stop: set it to end the run early; what is committed stays, and the next run goes on.

    Returns:
        The summary. Images that could not be read are in its ``failures``: they raise nothing.

    Raises:
        PatchbankError: the setup is wrong (ConfigError, DatasetError, WeightsError, BankError), before anything is
            written; or the disk fills up (BankError), after which the same call goes on.
    """
    plan = make_plan(dataset, Path(out).expanduser(), config or ExtractConfig())
    check_disk([plan])
    plan, encoder = load_encoder(plan)
    return execute(plan, encoder, on_commit=on_commit, stop=stop)


def make_plan(dataset: Dataset, out: Path, config: ExtractConfig) -> ExtractPlan:
    """Find out what there is to do. Writes nothing; raises every PatchbankError that `extract` can foresee."""
    ezhoi.check_names(record.key for record in dataset.records)
    _check_images(dataset)
    model = get_model(config.model)
    device = resolve_device(config.device, config.precision)
    checkpoint = find_checkpoint(model, config.weights, config.checkpoints)
    sha256 = checkpoint.sha256 if checkpoint else model.sha256
    wanted = Manifest(
        layout="ezhoi",
        dataset=dataset.name,
        split=dataset.split,
        grid=model.grid,
        dim=model.output_dim,
        dtype=config.dtype,
        resize=config.resize,
        input_size=model.input_size,
        patch_size=model.patch_size,
        fingerprint=make_fingerprint(model, sha256, config),
        batch_size=config.batch_size or auto_batch_size(model, device),
        device=device.type,
    )
    existing = existing_manifest(out, wanted, overwrite=config.overwrite)
    limit = min(config.limit or len(dataset), len(dataset))
    selected = config.partition.of(limit)
    done = set() if config.overwrite else done_keys(out)
    return ExtractPlan(
        dataset=dataset,
        out=out,
        config=config,
        model=model,
        checkpoint=checkpoint,
        manifest=existing or wanted,
        resumed=existing is not None,
        selected=selected,
        todo=[position for position in selected if dataset.records[position].key not in done],
    )


def make_fingerprint(model: Model, weights_sha256: str, config: ExtractConfig) -> Fingerprint:
    """What decides the numbers that this configuration gives."""
    fill = " on the mean colour" if config.resize == "pad" else ""
    return Fingerprint(
        model=model.name,
        weights_sha256=weights_sha256,
        architecture=model.architecture,
        output="patch tokens: ln_post and proj on every token, [CLS] dropped, not normalised",
        preprocessing=(
            f"{config.resize} to {model.input_size}{fill}, Pillow bicubic in the image's own mode, RGB after "
            f"cropping, no EXIF rotation, mean {MEAN}, std {STD}"
        ),
        precision=config.precision,
        dtype=config.dtype,
    )


def _check_images(dataset: Dataset) -> None:
    if not any(record.path.exists() for record in dataset.records):
        first = dataset.records[0]
        raise DatasetError(
            f"None of the {len(dataset):,} listed images is in {dataset.images}: there is no {first.path}, for one. "
            "Are these the images of another split or data set? Name their directory with --images."
        )


def check_disk(plans: Sequence[ExtractPlan]) -> None:
    """Raise BankError if the banks will not fit on their disks, taken together."""
    needed: dict[int, tuple[int, Path]] = {}
    for plan in plans:
        disk = nearest_existing(plan.out).stat().st_dev
        before = needed[disk][0] if disk in needed else 0
        needed[disk] = (before + plan.bytes_needed - plan.bytes_freed, plan.out)
    for size, place in needed.values():
        if size > (free := free_bytes(place)):
            raise BankError(
                f"Not enough disk: the features need {size / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free. "
                "Free some space, choose another --out, or store them in half the space with --dtype float16."
            )


def load_encoder(
    plan: ExtractPlan, loaded: PatchEncoder | None = None, progress: DownloadProgress | None = None
) -> tuple[ExtractPlan, PatchEncoder]:
    """The plan with its checkpoint on disk (downloaded if need be), and the encoder.

    `loaded`, an encoder of an earlier plan, is taken again if it is the same. Raises WeightsError.
    """
    config = plan.config
    checkpoint = plan.checkpoint or obtain_checkpoint(plan.model, config.weights, config.checkpoints, progress)
    if not (loaded and loaded.model == plan.model and loaded.checkpoint == checkpoint):
        loaded = PatchEncoder(plan.model, checkpoint, config.precision, config.device)
    return replace(plan, checkpoint=checkpoint), loaded


def execute(
    plan: ExtractPlan, encoder: PatchEncoder, *, on_commit: OnCommit | None = None, stop: Event | None = None
) -> ExtractSummary:
    """Do what a plan says. Raises BankError where the bank cannot be written."""
    stop = stop or Event()
    config, model, records = plan.config, plan.model, plan.dataset.records
    began = time.perf_counter()
    failures: dict[str, str] = {}
    written = 0

    def committed(count: int, failed: Sequence[Failure]) -> None:
        nonlocal written
        written += count
        failures.update(failed)
        if on_commit:
            on_commit(count, failed)

    with BankWriter(plan.out, plan.manifest, overwrite=config.overwrite) as bank:
        batch_size = bank.manifest.batch_size
        todo = [position for position in plan.selected if records[position].key not in bank.done]
        times = run(
            _batches(todo, records, batch_size),
            Stages(
                decode=lambda record, budget: load(record, config.resize, model.input_size, budget),
                encode=encoder,
                commit=bank.commit,
                committed=committed,
            ),
            batch_size=batch_size,
            input_size=model.input_size,
            workers=config.workers or auto_workers(),
            stop=stop,
        )
        manifest = bank.manifest
    return ExtractSummary(
        bank=plan.out,
        images=written,
        already_done=len(plan.selected) - len(todo),
        failures=failures,
        remaining=len(todo) - written - len(failures),
        seconds=time.perf_counter() - began,
        bytes_written=bank.bytes_written,
        times=times,
        notes=_notes(plan, manifest, encoder),
    )


def _batches(todo: Sequence[int], records: Sequence[Record], batch_size: int) -> Iterator[Slots]:
    """Positions to batches: an image belongs to batch ``position // batch_size``, slot ``position % batch_size``."""
    slots: list[tuple[int, Record]] = []
    current = -1
    for position in todo:
        number, slot = divmod(position, batch_size)
        if number != current and slots:
            yield slots
            slots = []
        current = number
        slots.append((slot, records[position]))
    if slots:
        yield slots


def _notes(plan: ExtractPlan, manifest: Manifest, encoder: PatchEncoder) -> list[str]:
    notes = []
    asked = plan.config.batch_size
    if asked and asked != manifest.batch_size:
        notes.append(f"The bank was begun with --batch-size {manifest.batch_size}; that was kept, not {asked}.")
    if plan.resumed and manifest.device != encoder.device.type:
        notes.append(f"The bank was begun on {manifest.device}: the last bits of its features may differ.")
    now = library_versions()
    changed = [f"{name} {was} -> {now[name]}" for name, was in manifest.versions.items() if now.get(name) != was]
    if plan.resumed and changed:
        notes.append(f"Versions have changed since the bank was begun: {', '.join(changed)}.")
    return notes


def auto_workers() -> int:
    """One decode thread for each core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores))


__all__ = ["ExtractPlan", "ExtractSummary", "check_disk", "execute", "extract", "load_encoder", "make_plan"]
