"""`extract`: a dataset's images to a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING

from patchbank.bank.manifest import Manifest, library_versions
from patchbank.bank.packing import samples_a_shard
from patchbank.bank.runs import DIRECTORY as RUNS
from patchbank.bank.runs import Run, relative, seal, write_run
from patchbank.bank.writer import BankWriter, disk_bytes
from patchbank.budget import machine_memory
from patchbank.config import WHOLE, ExtractConfig
from patchbank.datasets import Dataset
from patchbank.datasets.samples import Failure
from patchbank.decoder_warnings import Warned
from patchbank.encoders import packages
from patchbank.encoders.base import EncoderSpec
from patchbank.encoders.base import Progress as DownloadProgress
from patchbank.errors import PatchbankError, with_options
from patchbank.extraction.advice import advise
from patchbank.extraction.pipeline import StageTimes, bound_of, encode, lane_of, notes_of
from patchbank.extraction.plan import ExtractPlan, check_places, describe_run, make_plan, without
from patchbank.extraction.progress import Progress, reporting
from patchbank.features import UNKNOWN
from patchbank.files import bytes_text
from patchbank.locations import locate_new
from patchbank.notebook import facts, failed, shown

if TYPE_CHECKING:
    from patchbank.encoders.runner import Runner
    from patchbank.extraction.work import Outcome

_KINDS = 3  # of warnings in a note
_ENOUGH = 4  # batches of a run that can say which stage bounds it
_SILENT = Progress()


@dataclass(frozen=True, kw_only=True, repr=False)
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
        seconds: the duration, without loading the model; of all banks that were made together.
        bytes_written: of features.
        times: seconds spent waiting for each stage. Those for decoding are of all banks that were made together.
        bound: the stage that bounds the run: ``decode``, ``encode`` or ``write``; None if it did nothing.
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
    bound: str | None
    advice: str | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """This run's features per second, without failures."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def __repr__(self) -> str:
        counts = f"{self.images:,} features in {self.seconds:.1f} s, {self.already_done:,} done before"
        return f"<ExtractSummary {self.bank}: {counts}, {len(self.failures):,} failed>"

    def _repr_html_(self) -> str:
        values = {
            "features": f"{self.images:,} in {self.seconds:.1f} s, {bytes_text(self.bytes_written)}",
            "done before": self.already_done,
            "failed": failed(self.failures),
            "remaining": self.remaining,
            "notes": self.notes + [self.advice] * bool(self.advice),
        }
        return shown(f"ExtractSummary {self.bank}", facts(values))


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
        TypeError: `dataset` is a path or a name.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset is what load_dataset returns, not {dataset!r}")
    with reporting(progress) as reports:
        reports.stage("looking at weights and bank")
        plan = make_plan(dataset, locate_new(out), config or ExtractConfig(), encoder=encoder)
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


def load_runner(
    plan: ExtractPlan,
    loaded: Iterable[Runner | None] = (),
    progress: Progress = _SILENT,
    *,
    alone: bool = True,
) -> Runner | None:
    """The encoder that a plan needs in this process; None if there is nothing to do, or other processes do it.

    Returns one of `loaded`, the encoders of earlier plans, if it is the same; `alone` as in `Runner`. Raises
    WeightsError, and TogetherTooLargeError.
    """
    if not plan.todo or plan.devices.shared:
        return None
    from patchbank.encoders.runner import Runner

    batch_size, compiled = plan.manifest.batch_size, plan.manifest.compiled
    for each in filter(None, loaded):
        if (each.spec, each.batch_size, each.compiled) == (plan.encoder, batch_size, compiled):
            each.alone = alone
            return each
    return Runner(
        plan.encoder,
        plan.devices.first,
        batch_size=batch_size,
        compiled=compiled,
        alone=alone,
        stage=progress.stage,
    )


def load_runners(
    plans: Sequence[ExtractPlan], loaded: list[Runner | None], progress: Progress = _SILENT
) -> list[Runner | None]:
    """The encoders of plans that are carried out together. `loaded` gets them in the place of earlier plans'.

    Raises WeightsError, and TogetherTooLargeError.
    """
    wanted = [plan.encoder for plan in plans if plan.todo]
    loaded[:] = [each for each in loaded if each and each.spec in wanted]  # others leave room
    alone = len(wanted) < 2
    loaded[:] = [load_runner(plan, loaded, progress, alone=alone) for plan in plans]
    return loaded


def passes(plans: Sequence[ExtractPlan], *, together: bool = True) -> list[list[ExtractPlan]]:
    """The plans of each pass over images: those of a dataset, as far as the CPU's memory holds them at once.

    If not `together`, or if other processes do the work, one plan a pass, in an order that loads each model once.
    """
    if not together or any(plan.devices.shared for plan in plans):
        models = list(dict.fromkeys(plan.encoder.name for plan in plans))
        return [[plan] for plan in sorted(plans, key=lambda plan: models.index(plan.encoder.name))]
    room = machine_memory() // 2
    found: list[list[ExtractPlan]] = []
    for plan in plans:
        same = bool(found) and found[-1][0].dataset is plan.dataset
        if same and (plan.devices.kind != "cpu" or sum(map(_memory, [*found[-1], plan])) <= room):
            found[-1].append(plan)
        else:
            found.append([plan])
    return found


def _memory(plan: ExtractPlan) -> int:
    """About the bytes that a plan takes on the CPU: of weights, a batch, and the shard that is being filled."""
    if not plan.todo:
        return 0
    manifest, encoder = plan.manifest, plan.encoder
    weights = sum(4 * each.times * each.inner * each.columns for each in encoder.products if each.kind == "linear")
    return weights + manifest.batch_size * encoder.sample_bytes + disk_bytes(manifest.atom, manifest)


def execute(
    plan: ExtractPlan,
    runner: Runner | None,
    *,
    progress: Progress = _SILENT,
    stop: Event | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractSummary:
    """Carry out one plan: see `execute_all`."""
    [summary] = execute_all([plan], [runner], progress=progress, stop=stop, say=say)
    return summary


def execute_all(
    plans: Sequence[ExtractPlan],
    runners: Sequence[Runner | None],
    *,
    progress: Progress = _SILENT,
    stop: Event | None = None,
    say: Callable[[str], None] | None = None,
) -> list[ExtractSummary]:
    """Carry out plans of one dataset together, with their encoders from `load_runner`: each image is decoded once.

    Args:
        say: called with messages for the user during the run.

    Raises BankError if a bank cannot be written, DatasetError if the images are gone; what was committed stays.
    """
    stop = stop or Event()
    began, date = time.perf_counter(), datetime.now(UTC)
    positions = {sample.key: sample.position for sample in plans[0].dataset.samples}
    progress.stage("opening the bank" if len(plans) == 1 else "opening the banks")
    with ExitStack() as stack:
        jobs = [_Job(*each, positions, stack, progress) for each in zip(plans, runners, strict=True)]
        progress.start(sum(len(job.todo) for job in jobs))
        gone = encode([job.lane for job in jobs if job.lane], plans[0].config, stop.is_set)
        for job in jobs:
            job.share_out(stop.is_set, say or (lambda _: None))
        progress.stage("finishing the bank" if len(plans) == 1 else "finishing the banks")
    if gone:
        raise gone
    seconds, bound = time.perf_counter() - began, bound_of([job.times for job in jobs])
    return [job.end(date, seconds, bound) for job in jobs]


class _Job:
    """A plan that is carried out.

    Attributes:
        todo: its samples without a feature.
        lane: that of its samples; None if there are none, or other processes do them.
        times: seconds waited for each stage.
    """

    def __init__(
        self,
        plan: ExtractPlan,
        runner: Runner | None,
        positions: Mapping[str, int],
        stack: ExitStack,
        progress: Progress,
    ) -> None:
        """Open the bank until `stack` ends."""
        wanted = plan.manifest if plan.resumed or runner is None else replace(plan.manifest, compiled=runner.compiled)
        overwrite, about = plan.config.overwrite, describe_run(plan.config)
        bank = BankWriter(plan.out, wanted, positions, overwrite=overwrite, known=plan.state, about=about)
        self._bank = bank.__enter__()
        stack.push(self._close)
        self._plan, self._runner, self._listed, self._progress = plan, runner, len(positions), progress
        self._failures: dict[str, str] = {}
        self._written, self._helpers_bytes, self._notes = 0, 0, list[str]()
        self.todo = without(plan.selected, self._bank.done)
        self.lane = lane_of(self._bank, runner, self.todo, self._added) if runner and self.todo else None
        self.times = self.lane.times if self.lane else StageTimes()
        self._warned = self.lane.warned if self.lane else Warned()

    def _close(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the bank. An error of another one keeps nothing of this one from being committed."""
        if isinstance(error, PatchbankError) and self.lane and not self.lane.failed:
            kind = error = traceback = None
        self._bank.__exit__(kind, error, traceback)

    def share_out(self, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
        """If the plan is for several devices or a cluster, have other processes do the work."""
        if self._runner or not (self.todo and self._plan.devices.shared):
            return
        from patchbank.extraction import processes
        from patchbank.extraction.work import Task, units_of

        plan = replace(self._plan, manifest=self._bank.manifest, todo=self.todo, state=self._bank.state)
        units = units_of(plan, plan.devices.workers or len(plan.devices.names))
        task = Task(plan.place, plan.config, plan.encoder, plan.manifest, plan.devices)
        if plan.config.engine == "ray":
            from patchbank.extraction import ray  # its package is an extra

            ray.run(task, units, self._done, stop, say)
        else:
            processes.run(task, units, self._done, stop)
        self._bank.sweep()

    def _added(self, count: int, failed: Sequence[Failure]) -> None:
        self._written += count
        self._failures.update(failed)
        self._progress.advance(count, failed)

    def _done(self, outcome: Outcome) -> None:
        self._helpers_bytes += outcome.bytes_written
        self.times.add(outcome.times)
        self._notes.extend(note for note in outcome.notes if note not in self._notes)
        self._warned.merge(outcome.warned)
        self._added(outcome.images, outcome.failures)

    def end(self, began: datetime, seconds: float, bound: str | None) -> ExtractSummary:
        """When the bank is closed: log the run, and put a bank that overwrites another in its place."""
        plan, bank, manifest = self._plan, self._bank, self._bank.manifest
        if self.lane and self._runner:
            self._notes += notes_of(bank, self._runner)
        advice = advise(bound, manifest, plan.config) if self._written >= _ENOUGH * manifest.batch_size else None
        notes = bank.notes + self._notes + _notes(plan, manifest, bool(self.todo))
        summary = ExtractSummary(
            bank=plan.out,
            images=self._written,
            already_done=len(plan.selected) - len(self.todo),
            failures={**plan.dataset.damaged, **self._failures},
            remaining=len(self.todo) - self._written - len(self._failures),
            settled=bank.settled,
            failed=bank.failed,
            listed=self._listed,
            seconds=seconds,
            bytes_written=bank.bytes_written + self._helpers_bytes,
            times=self.times,
            bound=bound,
            advice=advice and with_options(advice),
            notes=list(map(with_options, notes)) + _about(self._warned),
            warnings=self._warned.lines(),
        )
        if self.todo:
            _note_run(plan, summary, began)
        keys = {sample.key for sample in plan.selected} if plan.config.overwrite and not summary.remaining else None
        if keys is not None and (kept := bank.replace(keys)):
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
        bound=summary.bound,
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
