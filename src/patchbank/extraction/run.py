"""`extract`: a dataset's images to a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from patchbank.bank.manifest import Manifest, library_versions
from patchbank.bank.packing import samples_a_shard
from patchbank.bank.runs import DIRECTORY as RUNS
from patchbank.bank.runs import Run, relative, seal, write_run
from patchbank.bank.writer import BankWriter
from patchbank.config import WHOLE, ExtractConfig
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Failure
from patchbank.decoder_warnings import Warned
from patchbank.encoders import packages
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.base import Progress as DownloadProgress
from patchbank.errors import DatasetError, with_options
from patchbank.extraction.advice import advise
from patchbank.extraction.pipeline import StageTimes, encode_into
from patchbank.extraction.plan import ExtractPlan, check_places, describe_run, make_plan, without
from patchbank.extraction.progress import Progress, reporting
from patchbank.features import UNKNOWN
from patchbank.locations import locate

if TYPE_CHECKING:
    from patchbank.encoders.runner import Runner
    from patchbank.extraction.work import Outcome

_KINDS = 3  # of warnings in a note
_ENOUGH = 4  # batches of a run that can say which stage bounds it
_SILENT = Progress()


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """The result of a run.

    Attributes:
        bank: its directory.
        images: features written by this run.
        already_done: features of earlier runs.
        failures: key -> reason, of this run's images that could not be extracted. A damaged tar or table, or a
            directory that cannot be listed, is here under its own name, and not in the bank.
        remaining: images not reached, because the run was stopped.
        settled: how many of the bank's images have a feature or a failure now, from any run.
        failed: how many of these have a failure.
        listed: how many images the bank is for; if only a part of the dataset was loaded, that part's.
        seconds: the duration, without loading the model.
        bytes_written: of features.
        times: seconds spent waiting for each stage.
        advice: how to make the stage that bounds the run faster; None if the run was too short to say.
        notes: what a user should know about this run, one sentence each.
        warnings: of the decoders about images that were read all the same, each kind in a line.
    """

    bank: Path
    images: int
    already_done: int
    failures: dict[str, str]
    remaining: int
    settled: int
    failed: int
    listed: int
    seconds: float
    bytes_written: int
    times: StageTimes
    advice: str | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """This run's features per second, without failures."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


def extract(
    dataset: Dataset,
    out: str | Path,
    config: ExtractConfig | None = None,
    *,
    encoder: EncoderSpec | None = None,
    progress: Progress | bool | None = None,
    stop: Event | None = None,
) -> ExtractSummary:
    """Extract a dataset's patch tokens into the bank `out`, or complete an existing bank.

    Args:
        dataset: from `load_dataset`.
        out: the bank's directory, or an object store's URL (``s3://bucket/bank``).
        config: the options; None means `ExtractConfig`'s defaults, which are the original scripts'.
        encoder: the encoder (`patchbank.encoders.base.EncoderSpec`); None finds the configuration's model.
        progress: True draws a bar, False none, None one in an interactive session such as a notebook. Or an object that
            receives the run's stages and counts (`patchbank.extraction.progress.Progress`).
        stop: set it to end the run early; what is committed stays, and the next run continues.

    Returns:
        The summary. Images that cannot be read are in its ``failures``; they raise no error.

    Raises:
        PatchbankError: the setup is wrong (ConfigError, DatasetError, WeightsError, BankError), before anything is
            written; or the disk is full (BankError), after which the same call continues.
    """
    with reporting(progress) as reports:
        reports.stage("looking at weights and bank")
        plan = make_plan(dataset, locate(out), config or ExtractConfig(), encoder=encoder)
        if plan.todo and len(plan.devices.names) > 1:
            from patchbank.extraction import processes

            processes.require_importable()
        check_places([plan])
        if plan.todo and plan.encoder.weights is None:
            reports.stage("downloading weights")
        plan = obtain_weights(plan)
        return execute(plan, load_runner(plan, progress=reports), progress=reports, stop=stop)


def obtain_weights(plan: ExtractPlan, progress: DownloadProgress | None = None) -> ExtractPlan:
    """The plan with its encoder's weights on this machine; downloads them if necessary. Raises WeightsError."""
    return replace(plan, encoder=plan.encoder.obtain(progress)) if plan.todo else plan


def load_runner(plan: ExtractPlan, loaded: Runner | None = None, progress: Progress = _SILENT) -> Runner | None:
    """The encoder that a plan needs in this process; None if there is nothing to do, or other processes do it.

    Returns `loaded`, the encoder of an earlier plan, if it is the same. Raises WeightsError.
    """
    if not plan.todo or plan.devices.shared:
        return None
    from patchbank.encoders.runner import Runner

    batch_size, compiled = plan.manifest.batch_size, plan.manifest.compiled
    if loaded and (loaded.spec, loaded.batch_size, loaded.compiled) == (plan.encoder, batch_size, compiled):
        return loaded
    return Runner(plan.encoder, plan.devices.first, batch_size=batch_size, compiled=compiled, stage=progress.stage)


def execute(
    plan: ExtractPlan,
    runner: Runner | None,
    *,
    progress: Progress = _SILENT,
    stop: Event | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractSummary:
    """Carry out a plan, with the encoder from `load_runner`.

    Args:
        say: called with messages for the user during the run.

    Raises BankError if the bank cannot be written, DatasetError if the images are gone; what was committed stays.
    """
    stop = stop or Event()
    began, date = time.perf_counter(), datetime.now(UTC)
    failures: dict[str, str] = {}
    written, helpers_bytes = 0, 0
    times, notes, warned = StageTimes(), list[str](), Warned()
    gone: DatasetError | None = None

    def added(count: int, failed: Sequence[Failure]) -> None:
        nonlocal written
        written += count
        failures.update(failed)
        progress.advance(count, failed)

    def done(outcome: Outcome) -> None:
        nonlocal helpers_bytes
        helpers_bytes += outcome.bytes_written
        times.add(outcome.times)
        notes.extend(note for note in outcome.notes if note not in notes)
        warned.merge(outcome.warned)
        added(outcome.images, outcome.failures)

    positions = {sample.key: sample.position for sample in plan.dataset.samples}
    wanted = plan.manifest if plan.resumed or runner is None else replace(plan.manifest, compiled=runner.compiled)
    progress.stage("opening the bank")
    overwrite, about = plan.config.overwrite, describe_run(plan.config)
    with BankWriter(plan.out, wanted, positions, overwrite=overwrite, known=plan.state, about=about) as bank:
        manifest = bank.manifest
        todo = without(plan.selected, bank.done)
        progress.start(len(todo))
        if runner is not None:
            times, notes, gone = encode_into(
                bank, runner, todo, plan.config, added=added, stop=stop.is_set, warned=warned
            )
        elif todo and plan.devices.shared:
            current = replace(plan, manifest=manifest, todo=todo, state=bank.state)
            _share_out(current, done, stop.is_set, say or (lambda _: None))
            bank.sweep()
        progress.stage("finishing the bank")
    if gone:
        raise gone
    advice = advise(times.bound, manifest, plan.config) if written >= _ENOUGH * manifest.batch_size else None
    summary = ExtractSummary(
        bank=plan.out,
        images=written,
        already_done=len(plan.selected) - len(todo),
        failures={**plan.dataset.damaged, **failures},
        remaining=len(todo) - written - len(failures),
        settled=bank.settled,
        failed=bank.failed,
        listed=len(positions),
        seconds=time.perf_counter() - began,
        bytes_written=bank.bytes_written + helpers_bytes,
        times=times,
        advice=advice and with_options(advice),
        notes=list(map(with_options, bank.notes + notes + _notes(plan, manifest, bool(todo)))) + _about(warned),
        warnings=warned.lines(),
    )
    if todo:
        _note_run(plan, summary, date)
    if overwrite and not summary.remaining and (kept := bank.replace({sample.key for sample in plan.selected})):
        summary.failures[str(plan.out)] = f"not replaced: {kept}"
    return summary


def _note_run(plan: ExtractPlan, summary: ExtractSummary, began: datetime) -> None:
    """Write the run log; ignore failures."""
    folder = relative(plan.dataset.images, plan.place) if plan.dataset.name == "folder" else ""
    example = next((sample.key for sample in plan.todo if sample.key not in summary.failures), "")
    run = Run(
        began=began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(summary.seconds, 3),
        images=summary.images,
        failures=len(summary.failures),
        remaining=summary.remaining,
        bytes_written=summary.bytes_written,
        waited={stage: round(seconds, 3) for stage, seconds in asdict(summary.times).items()},
        bound=summary.times.bound,
        device=plan.config.device if plan.devices.shared else plan.devices.names[0],
        engine=plan.config.engine,
        partition=str(plan.config.partition),
        versions=library_versions(packages(plan.encoder.name)),
        warnings=summary.warnings,
        untrained=plan.encoder.untrained,
        folder=folder,
        example=example,
        seal=seal(folder, example),
    )
    try:
        write_run(plan.place, run)
    except OSError as error:
        summary.notes.append(f"The run log in {plan.out / RUNS} could not be written: {error.strerror or error}.")


def _share_out(
    plan: ExtractPlan, done: Callable[[Outcome], None], stop: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Have other processes do the work."""
    from patchbank.extraction import processes
    from patchbank.extraction.work import Task, units_of

    units = units_of(plan, plan.devices.workers or len(plan.devices.names))
    task = Task(plan.place, plan.config, plan.encoder, plan.manifest, plan.devices)
    if plan.config.engine == "ray":
        from patchbank.extraction import ray  # its package is an extra

        ray.run(task, units, done, stop, say)
    else:
        processes.run(task, units, done, stop)


def _about(warned: Warned) -> list[str]:
    kinds = warned.lines()
    if not kinds:
        return []
    more = f"; and {len(kinds) - _KINDS} more kinds, in the run log" if len(kinds) > _KINDS else ""
    count = f"{warned.images:,} image{' was' if warned.images == 1 else 's were'}"
    return [f"{count} read, but the decoder warned: {'; '.join(kinds[:_KINDS])}{more}."]


def _notes(plan: ExtractPlan, manifest: Manifest, worked: bool) -> list[str]:
    if not plan.selected and plan.dataset.part != WHOLE:
        return [f"Part {plan.dataset.part} is empty: parts are whole files."]
    if not plan.selected and (size := plan.manifest.atom) > 1:
        return [f"Part {plan.config.partition} is empty: parts are whole shards, of {size:,} {manifest.noun}s each."]
    if not worked:
        return []
    notes = []
    asked = plan.config.batch_size
    if asked and asked != manifest.batch_size:
        notes.append(f"The bank was begun with --batch-size {manifest.batch_size}; that was kept, not {asked}.")
    if plan.resumed and plan.config.compile in ("on", "off") and manifest.compiled != (plan.config.compile == "on"):
        notes.append(f"The bank was begun {'' if manifest.compiled else 'un'}compiled; that was kept.")
    if manifest.atom not in (1, samples_a_shard(manifest.outputs, plan.config.shard_size)):
        notes.append(f"The bank was begun with {manifest.part_size:,} {manifest.noun}s a shard; that was kept.")
    if plan.resumed and manifest.device not in (UNKNOWN, device := plan.devices.kind):
        notes.append(
            f"The bank was begun on {manifest.device}, this is {device}: the last bits of its features may differ."
        )
    now = library_versions(packages(plan.encoder.name))
    changed = [f"{name} {was} -> {now[name]}" for name, was in manifest.versions.items() if now.get(name, was) != was]
    if plan.resumed and changed:
        notes.append(f"Versions have changed since the bank was begun: {', '.join(changed)}.")
    return notes
