"""`extract`: a dataset's images to a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event

import torch

from patchbank.advice import advise, auto_workers
from patchbank.bank.manifest import Manifest, library_versions
from patchbank.bank.packing import images_a_shard
from patchbank.bank.writer import open_writer
from patchbank.config import ExtractConfig
from patchbank.datasets import Dataset, Record
from patchbank.encoder.encoder import PatchEncoder
from patchbank.encoder.weights import Progress as DownloadProgress
from patchbank.encoder.weights import obtain_checkpoint
from patchbank.pipeline import Slots, Stages, StageTimes, run
from patchbank.plan import ExtractPlan, check_disk, make_plan
from patchbank.preprocess import Failure, load

# What is stored in half the bytes is rounded on the device, so that half the bytes are received. int8's scales are
# computed of float32.
_RECEIVED = {"float16": torch.float16, "bfloat16": torch.bfloat16}

_ENOUGH = 4  # batches, from which on a run says what bounds it

# Called after each batch is handed to the bank: features and failures since the last call. They are durable when the
# run ends, and most of them before: a pickle at once, a shard when it is whole.
OnProgress = Callable[[int, Sequence[Failure]], None]


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
        advice: what would make the stage that bounds the run faster; None where the run was too short to tell.
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
    advice: str | None = None
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
    on_progress: OnProgress | None = None,
    stop: Event | None = None,
) -> ExtractSummary:
    """Extract a dataset's patch tokens into the bank `out`, or complete the bank that is there.

    Args:
        dataset: what `load_dataset` gives.
        out: the bank's directory.
        config: what to do; None is `ExtractConfig`'s defaults, which are the original scripts'.
        on_progress: told of every batch: (features, failures), for a progress bar.
        stop: set it to end the run early; what is committed stays, and the next run goes on.

    Returns:
        The summary. Images that could not be read are in its ``failures``: they raise nothing.

    Raises:
        PatchbankError: the setup is wrong (ConfigError, DatasetError, WeightsError, BankError), before anything is
            written; or the disk fills up (BankError), after which the same call goes on.
    """
    plan = make_plan(dataset, Path(out).expanduser(), config or ExtractConfig())
    check_disk([plan])
    plan = obtain_weights(plan)
    return execute(plan, load_encoder(plan), on_progress=on_progress, stop=stop)


def obtain_weights(plan: ExtractPlan, progress: DownloadProgress | None = None) -> ExtractPlan:
    """The plan with its checkpoint on disk, downloaded if need be. Raises WeightsError."""
    config = plan.config
    checkpoint = plan.checkpoint or obtain_checkpoint(plan.model, config.weights, config.checkpoints, progress)
    return replace(plan, checkpoint=checkpoint)


def load_encoder(plan: ExtractPlan, loaded: PatchEncoder | None = None) -> PatchEncoder | None:
    """The encoder that a plan needs; None where there is nothing left to do.

    `loaded`, an encoder of an earlier plan, is taken again if it is the same. Raises WeightsError.
    """
    if not plan.todo or plan.checkpoint is None:
        return None
    batch_size, compiled = plan.manifest.batch_size, plan.manifest.compiled
    if (
        loaded
        and (loaded.model, loaded.checkpoint) == (plan.model, plan.checkpoint)
        and (loaded.batch_size, loaded.compiled) == (batch_size, compiled)
    ):
        return loaded
    return PatchEncoder(
        *(plan.model, plan.checkpoint, plan.config.precision, plan.config.device),
        batch_size=batch_size,
        compiled=compiled,
    )


def execute(
    plan: ExtractPlan,
    encoder: PatchEncoder | None,
    *,
    on_progress: OnProgress | None = None,
    stop: Event | None = None,
) -> ExtractSummary:
    """Do what a plan says, with the encoder that `load_encoder` gives. Raises BankError where it cannot be written."""
    stop = stop or Event()
    config, model, records = plan.config, plan.model, plan.dataset.records
    began = time.perf_counter()
    failures: dict[str, str] = {}
    written = 0

    def added(count: int, failed: Sequence[Failure]) -> None:
        nonlocal written
        written += count
        failures.update(failed)
        if on_progress:
            on_progress(count, failed)

    keys = [record.key for record in records]
    wanted = plan.manifest if plan.resumed or encoder is None else replace(plan.manifest, compiled=encoder.compiled)
    with open_writer(plan.out, wanted, keys, overwrite=config.overwrite, known=plan.state) as bank:
        batch_size = bank.manifest.batch_size
        todo = [position for position in plan.selected if records[position].key not in bank.done]
        times = StageTimes()
        if encoder is not None:
            stages = Stages(
                decode=lambda record, budget: load(record, config.resize, model.input_size, budget, config.decode),
                submit=partial(encoder.submit, dtype=_RECEIVED.get(bank.manifest.dtype, torch.float32)),
                add=bank.add,
                added=added,
                pinned=encoder.device.type == "cuda",
            )
            times = run(
                _batches(todo, records, batch_size),
                stages,
                batch_size=batch_size,
                input_size=model.input_size,
                workers=config.workers or auto_workers(),
                stop=stop,
            )
        manifest = bank.manifest
    advice = advise(times.bound, manifest, config) if written >= _ENOUGH * batch_size else None
    return ExtractSummary(
        bank=plan.out,
        images=written,
        already_done=len(plan.selected) - len(todo),
        failures=failures,
        remaining=len(todo) - written - len(failures),
        seconds=time.perf_counter() - began,
        bytes_written=bank.bytes_written,
        times=times,
        advice=advice,
        notes=bank.notes + _notes(plan, manifest, encoder),
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


def _notes(plan: ExtractPlan, manifest: Manifest, encoder: PatchEncoder | None) -> list[str]:
    if not plan.selected and (size := plan.manifest.shard_images):
        return [f"Part {plan.config.partition} is empty: parts are whole shards, and these hold {size:,} images each."]
    if encoder is None:
        return []
    notes = list(encoder.notes)
    asked = plan.config.batch_size
    if asked and asked != manifest.batch_size:
        notes.append(f"The bank was begun with --batch-size {manifest.batch_size}; that was kept, not {asked}.")
    if plan.resumed and plan.config.compile in ("on", "off") and manifest.compiled != (plan.config.compile == "on"):
        notes.append(f"The bank was begun {'' if manifest.compiled else 'un'}compiled; that was kept.")
    if plan.resumed and manifest.compiled and not encoder.compiled:
        notes.append("The bank was begun compiled: the last bits of these features may differ.")
    if manifest.shard_images not in (None, images_a_shard(manifest, plan.config.shard_size)):
        notes.append(f"The bank was begun with {manifest.shard_images:,} images a shard; that was kept.")
    if plan.resumed and manifest.device != encoder.device.type:
        notes.append(f"The bank was begun on {manifest.device}: the last bits of its features may differ.")
    now = library_versions()
    changed = [f"{name} {was} -> {now[name]}" for name, was in manifest.versions.items() if now.get(name) != was]
    if plan.resumed and changed:
        notes.append(f"Versions have changed since the bank was begun: {', '.join(changed)}.")
    return notes
