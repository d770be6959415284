"""``patchbank extract hicodet | vcoco | folder | tar | parquet``."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.budget import keep_freed_memory
from patchbank.cli import options
from patchbank.cli.console import (
    FAILURES_SHOWN,
    busy,
    count_text,
    duration_text,
    results_alone_on_stdout,
    say,
    show_json,
    show_note,
)
from patchbank.cli.options import DEFAULTS
from patchbank.cli.progress import DownloadProgress, ImageProgress
from patchbank.cli.signals import StopOnSignal
from patchbank.config import WHOLE, ExtractConfig
from patchbank.encoders.openai.registry import EZHOI_MODELS, get_model
from patchbank.errors import ConfigError
from patchbank.files import bytes_text
from patchbank.locations import is_remote, locate

if TYPE_CHECKING:
    from patchbank.datasets import Dataset
    from patchbank.extraction.plan import ExtractPlan
    from patchbank.extraction.run import ExtractSummary

app = typer.Typer(
    help="Extract patch features into banks. A run that was cut short goes on where it stopped.",
    no_args_is_help=True,
)


def _register(dataset: str, title: str, splits: tuple[str, str]) -> None:
    """Add the command of a data set that has splits and annotation files."""

    def command(
        *,
        root: options.Root = Path(),
        split: Annotated[
            list[str] | None,
            typer.Option(
                metavar="SPLIT", help=f"{' or '.join(splits)}; may be given several times.", rich_help_panel="What"
            ),
        ] = None,
        images: options.Images = None,
        annotations: options.Annotations = None,
        out: Annotated[
            Path | None,
            typer.Option(
                parser=locate,
                metavar="DIR",
                help=f"Where the banks lie, or a URL (s3://...); by default ROOT/{dataset}_pkl_files, or "
                f"ROOT/{dataset}_shards.",
                rich_help_panel="What",
            ),
        ] = None,
        run: options.RunOptions,
    ) -> None:
        from patchbank.bank.ezhoi import bank_directory, bank_name
        from patchbank.datasets import load_splits

        root = root.expanduser()
        models = run.models_or(list(EZHOI_MODELS))
        layout = run.config.layout or "ezhoi"
        banks = bank_directory(root, dataset, layout) if out is None else out
        jobs = [
            (
                loaded,
                banks / bank_name(get_model(name).bank_prefix, dataset, loaded.split or ""),
                replace(run.config, model=name),
            )
            for loaded in load_splits(dataset, root, split or [], images, annotations)
            for name in models
        ]
        run_jobs(jobs, dry_run=run.dry_run, json=run.json, pages=run.report)

    help_text = f"Extract {title}: by default both splits, with both {' and '.join(EZHOI_MODELS)}."
    app.command(dataset, help=help_text)(options.with_run_options(command))


Out = Annotated[
    Path,
    typer.Option(parser=locate, metavar="BANK", help="The bank, or its URL (s3://...).", rich_help_panel="What"),
]

Prefix = Annotated[
    bool,
    options.flag("--prefix", "Begin each key with its file's name, less the extension: FILE/KEY.", "What"),
]

_register("hicodet", "HICO-DET", ("train", "test"))
_register("vcoco", "V-COCO", ("train (trainval list, COCO train2014)", "val (test list, COCO val2014)"))


@app.command("folder")
@options.with_run_options
def _folder(
    *,
    images: Annotated[
        Path,
        typer.Argument(
            parser=locate, metavar="IMAGES", help="A directory of images, or its URL, searched recursively."
        ),
    ],
    out: Out,
    run: options.RunOptions,
) -> None:
    """Extract any directory of images, by default with ViT-B/16."""
    from patchbank.datasets import load_dataset

    config = _one_model(run)
    run_jobs([(load_dataset("folder", images), out, config)], dry_run=run.dry_run, json=run.json, pages=run.report)


@app.command("tar")
@options.with_run_options
def _tar(
    *,
    tars: Annotated[
        list[str],
        typer.Argument(metavar="TARS...", help="Tars: paths, URLs, or patterns: 'shards/{000..099}.tar'."),
    ],
    out: Out,
    prefix: Prefix = False,
    run: options.RunOptions,
) -> None:
    """Extract the images in WebDataset tars, by default with ViT-B/16. Nothing is unpacked."""
    from patchbank.datasets import load_dataset

    config = _one_model(run)
    with busy("Reading the tars' headers"):
        dataset = load_dataset("tar", tars, partition=config.partition, prefix=prefix)
    run_jobs([(dataset, out, config)], dry_run=run.dry_run, json=run.json, pages=run.report)


@app.command("parquet")
@options.with_run_options
def _parquet(
    *,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILES...", help="Parquet files: paths, URLs, or patterns: 'data/*.parquet'."),
    ],
    out: Out,
    key_column: Annotated[
        str, typer.Option(metavar="NAME", help="The column of the images' names.", rich_help_panel="What")
    ],
    image_column: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The column of their bytes, or of structs with `bytes`.", rich_help_panel="What"
        ),
    ] = "image",
    prefix: Prefix = False,
    run: options.RunOptions,
) -> None:
    """Extract the images in Parquet files, by default with ViT-B/16."""
    from patchbank.datasets import load_dataset

    config = _one_model(run)
    with busy("Reading the files' keys"):
        dataset = load_dataset(
            "parquet",
            files,
            partition=config.partition,
            prefix=prefix,
            image_column=image_column,
            key_column=key_column,
        )
    run_jobs([(dataset, out, config)], dry_run=run.dry_run, json=run.json, pages=run.report)


def _one_model(run: options.RunOptions) -> ExtractConfig:
    """What to do, for a bank that --out names itself. Raises ConfigError on several models."""
    from patchbank.encoders.openai.checkpoints import CHECKPOINTS

    models = run.models_or([DEFAULTS.model])
    if len(models) != 1:
        raise ConfigError("These features go into one bank, so they are of one model: give --model once.")
    config = replace(run.config, model=models[0])
    if config.checkpoints is None and CHECKPOINTS.is_dir():  # in an EZ-HOI checkout
        config = replace(config, checkpoints=CHECKPOINTS)
    return config


def run_jobs(
    jobs: list[tuple["Dataset", Path, ExtractConfig]],
    *,
    dry_run: bool,
    json: bool,
    pages: bool = False,
    report: Callable[[list[dict[str, Any]]], Any] = lambda summaries: summaries,
) -> None:
    """Plan every bank, then make them one after the other. Raises typer.Exit with the command's code.

    Args:
        pages: whether a page about each bank is written at the end.
        report: what ``--json`` prints, of the banks' summaries.
    """
    keep_freed_memory()
    if any(config.engine == "ray" for _, _, config in jobs):
        # What Ray says of its workers. Until the process ends, for it may say so at any time.
        ExitStack().enter_context(results_alone_on_stdout())
    with busy("Looking at data set, weights and bank"):
        from patchbank.extraction.plan import check_disk, make_plan
        from patchbank.extraction.run import execute, load_encoder, obtain_weights

        plans = [make_plan(*job) for job in jobs]
    if dry_run:
        show_json([_plan_dict(plan) for plan in plans]) if json else _show_plans(plans)
    check_disk(plans)
    if dry_run:
        raise typer.Exit(0)

    # All weights before the first feature, and model by model, so that each is loaded once.
    for number, plan in enumerate(plans):
        with DownloadProgress(f"Downloading {plan.model.name}") as downloading:
            plans[number] = obtain_weights(plan, downloading)
    for plan in plans:
        for note in plan.notes:
            show_note(note)
    order = list(dict.fromkeys(plan.model for plan in plans))
    plans.sort(key=lambda plan: order.index(plan.model))
    summaries: list[ExtractSummary] = []
    encoder, exit_code = None, None
    for plan in plans:
        with busy(f"Loading {plan.model.name}"):
            encoder = load_encoder(plan, encoder) or encoder
        title = f"{plan.dataset.title}, {plan.model.name}"
        with StopOnSignal() as signals, ImageProgress(title, len(plan.todo)) as progress:
            summary = execute(
                plan, encoder if plan.todo else None, on_progress=progress.advance, stop=signals.stop, say=show_note
            )
        summaries.append(summary)
        if not json:
            show_summary(plan, summary)
        if (exit_code := signals.exit_code) is not None:
            show_note("stopped; what is committed is safe, and the same command goes on from here.")
            break
    if json:
        show_json(report([_summary_dict(*pair) for pair in zip(plans, summaries, strict=False)]))
    if pages and exit_code is None:
        _write_pages(plans, json=json)
    if exit_code is None:
        exit_code = 1 if any(summary.failures for summary in summaries) else 0
    raise typer.Exit(exit_code)


def _write_pages(plans: list["ExtractPlan"], *, json: bool) -> None:
    """A page about each bank, beside it."""
    from patchbank.bank.reader import open_bank
    from patchbank.cli import report

    for plan in plans:
        written = report.write(open_bank(plan.out), report.beside(plan.out), plan.dataset)
        if not json:
            report.show_written(written)


def _show_plans(plans: list["ExtractPlan"]) -> None:
    from patchbank.files import free_bytes

    for plan in plans:
        done = len(plan.selected) - len(plan.todo)
        part = "" if plan.config.partition == WHOLE else f"part {plan.config.partition}: "
        weights = plan.checkpoint.path if plan.checkpoint else f"to be downloaded from {plan.model.url}"
        say(str(plan.out), "bold")
        say(
            f"  {plan.model.name}, {part}{count_text(len(plan.selected), 'image')}, {done:,} done, "
            f"{len(plan.todo):,} to do, "
            f"{bytes_text(plan.bytes_needed)}"
        )
        if plan.failed_before:
            say(f"  {plan.failed_before:,} of those failed before: patchbank info {plan.out} --failures")
        if plan.dataset.damaged:
            _show_failures("damaged", plan.dataset.damaged)
        if plan.to_delete:
            say(f"  {len(plan.to_delete):,} features that are there will be deleted ({bytes_text(plan.bytes_freed)})")
        say(f"  weights: {weights}")
    total = sum(plan.bytes_needed for plan in plans)
    free = "" if is_remote(plans[0].out) else f", {bytes_text(free_bytes(plans[0].out))} free"
    say(f"{bytes_text(total)} to write{free}. Nothing was written.")


def _plan_dict(plan: "ExtractPlan") -> dict[str, Any]:
    from patchbank.files import free_bytes

    return {
        **_identity(plan),
        "done": len(plan.selected) - len(plan.todo),
        "todo": len(plan.todo),
        "failed_before": plan.failed_before,
        "to_delete": len(plan.to_delete),
        "damaged": dict(plan.dataset.damaged),
        "bytes": plan.bytes_needed,
        "free_bytes": None if is_remote(plan.out) else free_bytes(plan.out),
        "weights": str(plan.checkpoint.path) if plan.checkpoint else None,
    }


def show_summary(plan: "ExtractPlan", summary: "ExtractSummary") -> None:
    """What a run did, for people: notes first, then the figures, then what failed."""
    for note in summary.notes:
        show_note(note)
    facts = [f"{count_text(summary.images, 'feature')} written ({bytes_text(summary.bytes_written)})"]
    if summary.already_done:
        facts.append(f"{summary.already_done:,} already there")
    if summary.failures:
        facts.append(f"{len(summary.failures):,} failed")
    if summary.remaining:
        facts.append(f"{summary.remaining:,} left to do")
    if summary.images:
        facts.append(f"{summary.images_per_second:.1f} images/s for {duration_text(summary.seconds)}")
    say(str(summary.bank), "bold")
    say(f"  {', '.join(facts)}")
    what = "the bank" if plan.dataset.part == WHOLE else f"part {plan.dataset.part}"
    failed = f", {summary.failed:,} failed" if summary.failed else ""
    if summary.settled < summary.listed:
        say(f"  {what} has {summary.settled - summary.failed:,} of {summary.listed:,} images{failed}")
    elif plan.config.partition != WHOLE:
        say(f"  {what} is complete: {count_text(summary.settled - summary.failed, 'image')}{failed}")
    if summary.advice:
        say(f"  {summary.times.bound}-bound; faster with {summary.advice}")
    _show_failures("failed", summary.failures, f": patchbank info {summary.bank} --failures")


def _show_failures(state: str, reasons: Mapping[str, str], where: str = "") -> None:
    for key, reason in list(reasons.items())[:FAILURES_SHOWN]:
        say(f"  {state}: {key}: {reason}", "red")
    if (more := len(reasons) - FAILURES_SHOWN) > 0:
        say(f"  and {more:,} more{where}", "red")


def _identity(plan: "ExtractPlan") -> dict[str, Any]:
    return {
        "bank": str(plan.out),
        "dataset": plan.dataset.name,
        "split": plan.dataset.split,
        "model": plan.model.name,
        "selected": len(plan.selected),
    }


def _summary_dict(plan: "ExtractPlan", summary: "ExtractSummary") -> dict[str, Any]:
    return {
        **_identity(plan),
        **{name: value for name, value in asdict(summary).items() if name != "bank"},
        "images_per_second": summary.images_per_second,
        "bound": summary.times.bound,
    }
