"""``patchbank extract hicodet | vcoco | folder | tar | parquet``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank import encoders
from patchbank.budget import keep_freed_memory
from patchbank.cli import options
from patchbank.cli.console import (
    count_text,
    duration_text,
    results_alone_on_stdout,
    say,
    say_prose,
    show_facts,
    show_failures,
    show_json,
    show_note,
    some,
    written_text,
)
from patchbank.cli.help import Group, add_command
from patchbank.cli.options import DEFAULTS, RunOptions
from patchbank.cli.progress import Activity
from patchbank.cli.signals import StopOnSignal
from patchbank.config import WHOLE, ExtractConfig, option
from patchbank.encoders import EZHOI_MODELS
from patchbank.encoders.base import flops
from patchbank.errors import ConfigError, TogetherTooLargeError
from patchbank.files import bytes_text, free_bytes
from patchbank.listing import ListingOptions
from patchbank.locations import is_remote, locate, locate_new
from patchbank.show.names import page_beside

if TYPE_CHECKING:
    from patchbank.datasets import Dataset
    from patchbank.encoders.runner import Runner
    from patchbank.extraction.plan import ExtractPlan
    from patchbank.extraction.run import ExtractSummary

app = typer.Typer(
    cls=Group,
    help="Extract patch features into banks. The same command continues an interrupted run.",
    epilog="Example: patchbank extract hicodet --root EZ-HOI --dry-run",
    no_args_is_help=True,
)

_DATA = "Data"
OUT = option(..., "Bank directory or URL (s3://...).", _DATA, metavar="BANK", parse=locate_new)
_PREFIX = option(False, "Begin keys with their file's name, less the extension.", _DATA)


_ONE = {  # what is said otherwise of commands that make one bank
    "model": {"help": f"{options.MODEL_HELP}.", "default_text": DEFAULTS.model},
    "checkpoints": {"default_text": "checkpoints/pretrained_CLIP, else ~/.cache/clip"},
    "layout": {"default_text": "shards"},
}


def _command(name: str, text: str = "") -> Callable[[Callable[..., None]], None]:
    """Add a command; its help is `text`, or else its docstring. A dataset with splits has a text."""
    asked = "root", "images", "annotations"
    config = options.without_rounding(options.CONFIG) if text else options.CONFIG
    take = options.takes({"root": Path()}, options.EZHOI if text else _ONE, asked=asked, config=config)
    return lambda command: add_command(app, name, take(command), text or command.__doc__)


def _register(dataset: str, title: str, splits: tuple[str, str]) -> None:
    """Add the command of a dataset that has splits and annotation files."""
    each, names = f"{' or '.join(splits)}; repeatable.", tuple(split.split()[0] for split in splits)
    where = f"ROOT/{dataset}_pkl_files, or ROOT/{dataset}_shards"

    @_command(
        dataset,
        f"Extract {title}: both splits with both {' and '.join(EZHOI_MODELS)}, unless you choose.\n\n"
        f"patchbank extract {dataset} --root EZ-HOI --split {names[0]}",
    )
    def command(
        *,
        asked: ListingOptions,
        split: list[str] | None = option(None, each, _DATA, default_text="both", values=names),
        out: Path | None = option(
            None,
            "Directory or URL (s3://...) of the banks.",
            _DATA,
            metavar="DIR",
            default_text=where,
            parse=locate_new,
        ),
        run: RunOptions,
        config: ExtractConfig,
    ) -> None:
        from patchbank.bank.parts import find_payload, third_party
        from patchbank.bank.pickles import bank_directory, bank_name
        from patchbank.datasets import load_splits

        root = asked.root or Path()
        banks = bank_directory(root, dataset, config.layout or "ezhoi") if out is None else out
        models = run.models(config, EZHOI_MODELS)
        if out is not None and (third_party(out) or find_payload(out) is not None):
            raise ConfigError(
                f"--out {out} is a bank itself, and not the directory of the banks. Did you mean --out {out.parent}? "
                f"A bank of any name is completed with `patchbank repair {out} --extract`."
            )
        run_jobs(
            lambda: [
                (
                    loaded,
                    banks / bank_name(encoders.bank_prefix(name), dataset, loaded.split or "", config.variant),
                    replace(config, model=name),
                )
                for loaded in load_splits(dataset, root, split or [], asked.images, asked.annotations)
                for name in models
            ],
            run,
        )


_register("hicodet", "HICO-DET", ("train", "test"))
_register("vcoco", "V-COCO", ("train (trainval list, COCO train2014)", "val (test list, COCO val2014)"))


@_command("folder")
def _folder(
    *,
    images: Annotated[
        Path, typer.Argument(parser=locate, metavar="IMAGES", help="Directory or URL, searched recursively.")
    ],
    out: Path = OUT,
    run: RunOptions,
    config: ExtractConfig,
) -> None:
    """Extract any directory of images, with ViT-B/16 unless you choose.

    patchbank extract folder IMAGES --out BANK --dtype float16
    """
    _run_one(run, config, out, "folder", images)


@_command("tar")
def _tar(
    *,
    tars: Annotated[
        list[str],
        typer.Argument(metavar="TARS", help="Tar files: paths, URLs or patterns such as 'shards/{000..099}.tar'."),
    ],
    out: Path = OUT,
    prefix: bool = _PREFIX,
    run: RunOptions,
    config: ExtractConfig,
) -> None:
    """Extract the images in WebDataset tars, with ViT-B/16 unless you choose. Nothing is unpacked.

    patchbank extract tar 'shards/{000..099}.tar' --out BANK
    """
    _run_one(run, config, out, "tar", tars, partition=config.partition, prefix=prefix)


@_command("parquet")
def _parquet(
    *,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES", help="Parquet files: paths, URLs or patterns such as 'data/*.parquet'."),
    ],
    out: Path = OUT,
    image_column: str | None = option(
        None,
        "Column of the images: bytes, or structs with `bytes`.",
        _DATA,
        metavar="COLUMN",
        default_text="the only one, or image",
    ),
    key_column: str | None = option(
        None,
        "Column of their names; :row numbers the rows, with --prefix.",
        _DATA,
        metavar="COLUMN",
        default_text="IMAGE_COLUMN.path, if there is one",
    ),
    prefix: bool = _PREFIX,
    run: RunOptions,
    config: ExtractConfig,
) -> None:
    """Extract the images in Parquet files, with ViT-B/16 unless you choose.

    patchbank extract parquet 'data/*.parquet' --out BANK
    """
    columns = {"image_column": image_column, "key_column": key_column}
    _run_one(run, config, out, "parquet", files, partition=config.partition, prefix=prefix, **columns)


def run_one(load: Callable[[], "Dataset"], out: Path, run: RunOptions, config: ExtractConfig) -> None:
    """Load a dataset of one bank, and make the bank. Raises ConfigError on several models."""
    models = run.models(config, [DEFAULTS.model])
    if len(models) != 1:
        raise ConfigError("This command writes one bank; pass --model once.")
    run_jobs(lambda: [(load(), out, replace(config, model=models[0]))], run)


def _run_one(run: RunOptions, config: ExtractConfig, out: Path, kind: str, place: Any, **details: Any) -> None:
    from patchbank.datasets import load_dataset

    run_one(lambda: load_dataset(kind, place, **details), out, run, config)


def run_jobs(
    load: Callable[[], list[tuple["Dataset", Path, ExtractConfig]]],
    run: RunOptions,
    report: Callable[[list[dict[str, Any]]], Any] = lambda summaries: summaries,
) -> None:
    """Plan every bank, then make those of each dataset together. Raises typer.Exit with the command's code.

    Args:
        load: lists the images: each bank's dataset, its place, its configuration.
        report: makes what ``--json`` prints from the banks' summaries.
    """
    keep_freed_memory()
    with Activity() as activity:
        activity.stage("listing images")
        jobs = load()
        if any(config.engine == "ray" for _, _, config in jobs):
            results_alone_on_stdout()  # until the process ends: Ray may print at any time
        activity.stage("looking at weights and banks")
        from patchbank.extraction.devices import assume, decide
        from patchbank.extraction.plan import check_places, make_plan

        # A cluster is asked once: jobs differ in the model alone. Of this machine, torch is asked if there is work.
        config = jobs[0][2]
        devices = assume(config) if run.dry_run else decide(config) if config.engine == "ray" else None
        plans = [make_plan(*job, devices) for job in jobs]
    if run.report and any(plan.manifest.main not in plan.manifest.grids for plan in plans):
        raise ConfigError("--report shows a grid of patches: add --output patch_tokens, or leave it out.")
    for note in (note for plan in plans for note in plan.notes):
        show_note(note)
    if run.dry_run:
        show_json([_plan_dict(plan) for plan in plans]) if run.json else _show_plans(plans)
    check_places(plans)
    if run.dry_run:
        raise typer.Exit(0)

    # All weights before the first feature.
    with activity:
        from patchbank.extraction.run import execute_all, load_runners, obtain_weights, passes

        plans = [
            obtain_weights(plan, activity.counter(f"downloading {plan.encoder.name}", bytes=True)) for plan in plans
        ]
    done: list[tuple[ExtractPlan, ExtractSummary]] = []
    runners: list[Runner | None] = []
    signals, groups = StopOnSignal(), passes(plans)
    while groups and signals.exit_code is None:
        now, *later = groups
        rest = list(chain.from_iterable(later))
        with activity:
            name_banks(activity, now, rest, len(plans))
            try:
                load_runners(now, runners, activity)
                with signals:
                    summaries = execute_all(now, runners, progress=activity, stop=signals.stop, say=show_note)
            except TogetherTooLargeError:  # what was committed stays
                runners.clear()
                groups = passes([*now, *rest], together=False)
                continue
        groups = later
        done += zip(now, summaries, strict=True)
        if not run.json:
            for each in zip(now, summaries, strict=True):
                show_summary(*each)
    if run.json:
        show_json(report([_summary_dict(*each) for each in done]))
    if run.report and signals.exit_code is None:
        _write_pages(plans, json=run.json)
    signals.end(1 if any(summary.failures for _, summary in done) else 0)


def name_banks(activity: Activity, plans: Sequence["ExtractPlan"], later: Sequence["ExtractPlan"], count: int) -> None:
    """Have an activity say which of `count` banks are made, and know the work of them and of those that follow."""
    last, todo = count - len(later), sum(len(plan.todo) for plan in plans)
    which = f"bank {last}" if len(plans) == 1 else f"banks {last - len(plans) + 1}-{last}"
    title = f"{plans[0].dataset.title}, {', '.join(plan.encoder.name for plan in plans)}"
    work, rest = (sum((flops(plan.encoder) or 1) * len(plan.todo) for plan in each) for each in (plans, later))
    what = plans[0].manifest.noun if len(plans) == 1 else "feature"
    activity.bank(f"{which} of {count}, {title}" if count > 1 else title, todo, work / max(todo, 1), rest, what)


def _write_pages(plans: list["ExtractPlan"], *, json: bool) -> None:
    """Write a page about each bank beside it."""
    from patchbank.bank.reader import open_bank
    from patchbank.cli import report

    for plan in plans:
        written = report.write(open_bank(plan.out), page_beside(plan.out), plan.dataset)
        if not json:
            report.show_written(written)


def _show_plans(plans: list["ExtractPlan"]) -> None:
    for plan in plans:
        done = len(plan.selected) - len(plan.todo)
        part = "" if plan.config.partition == WHOLE else f"part {plan.config.partition}: "
        weights = plan.encoder.weights or "to be downloaded"
        say(str(plan.out), "bold")
        say_prose(
            f"  {plan.encoder.name}, {part}{count_text(len(plan.selected), plan.manifest.noun)}, {done:,} done, "
            f"{len(plan.todo):,} to do, {bytes_text(plan.bytes_needed)}"
        )
        if plan.failed_before:
            say(f"  {plan.failed_before:,} of those failed before: patchbank info {plan.out} --failures")
        if plan.dataset.damaged:
            show_failures("damaged", plan.dataset.damaged, "")
        if plan.to_delete:
            size = bytes_text(plan.bytes_freed)
            say_prose(f"  the existing features ({size}) will be replaced; until then the disk holds both")
        say_prose(f"  weights: {weights}")
    total = sum(plan.bytes_needed for plan in plans)
    free = "" if is_remote(plans[0].out) else f", {bytes_text(free_bytes(plans[0].out))} free"
    say_prose(f"{bytes_text(total)} to write{free}. Nothing was written.")


def _plan_dict(plan: "ExtractPlan") -> dict[str, Any]:
    return {
        **_identity(plan),
        "done": len(plan.selected) - len(plan.todo),
        "todo": len(plan.todo),
        "failed_before": plan.failed_before,
        "to_delete": len(plan.to_delete),
        "damaged": dict(plan.dataset.damaged),
        "bytes": plan.bytes_needed,
        "free_bytes": None if is_remote(plan.out) else free_bytes(plan.out),
        "weights": plan.encoder.weights,
        "notes": list(plan.notes),
    }


def show_summary(plan: "ExtractPlan", summary: "ExtractSummary") -> None:
    """Print what a run did: notes, figures, failures."""
    for note in summary.notes:
        show_note(note)
    show_facts(
        summary.bank,
        written_text(summary.images, summary.bytes_written),
        some(summary.already_done, "already there"),
        some(len(summary.failures), "failed"),
        some(summary.remaining, "left to do"),
        f"{summary.images_per_second:.1f} {plan.manifest.noun}s/s for {duration_text(summary.seconds)}"
        if summary.images
        else "",
    )
    new = "the new bank" if plan.config.overwrite and summary.remaining else "the bank"
    what = new if plan.dataset.part == WHOLE else f"part {plan.dataset.part}"
    done, failed = summary.settled - summary.failed, count_text(summary.failed, plan.manifest.noun)
    if done < summary.listed and (summary.settled < summary.listed or plan.config.partition != WHOLE):
        also = f"; {failed} failed" if summary.failed else ""
        say_prose(f"  {what} has {done:,} of {summary.listed:,} features{also}")
    elif plan.config.partition != WHOLE:
        say(f"  {what} is complete: {count_text(done, 'feature')}")
    if summary.advice:
        say_prose(f"  {summary.bound}-bound; faster with {summary.advice}")
    show_failures("failed", summary.failures, f": patchbank info {summary.bank} --failures")


def _identity(plan: "ExtractPlan") -> dict[str, Any]:
    return {
        "bank": str(plan.out),
        "dataset": plan.dataset.name,
        "split": plan.dataset.split,
        "model": plan.encoder.name,
        "selected": len(plan.selected),
    }


def _summary_dict(plan: "ExtractPlan", summary: "ExtractSummary") -> dict[str, Any]:
    return {
        **_identity(plan),
        **{name: value for name, value in asdict(summary).items() if name != "bank"},
        "images_per_second": summary.images_per_second,
    }
