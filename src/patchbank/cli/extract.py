"""``patchbank extract hicodet | vcoco | folder``."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli import options
from patchbank.cli.console import busy, duration_text, say, show_json, show_note, size_text
from patchbank.cli.options import DEFAULTS
from patchbank.cli.progress import DownloadProgress, ImageProgress
from patchbank.cli.signals import StopOnSignal
from patchbank.config import ExtractConfig
from patchbank.errors import ConfigError
from patchbank.models import EZHOI_MODELS, get_model

if TYPE_CHECKING:
    from patchbank.datasets import Dataset
    from patchbank.extraction import ExtractSummary
    from patchbank.plan import ExtractPlan

_FAILURES_SHOWN = 20

app = typer.Typer(
    help="Extract patch features into banks. A run that was cut short goes on where it stopped.",
    no_args_is_help=True,
)


def _register(dataset: str, splits: str) -> None:
    """Add the command of a data set that has splits and annotation files."""

    def command(
        *,
        root: options.Root = Path(),
        split: options.Splits = None,
        images: options.Images = None,
        annotations: options.Annotations = None,
        out: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help=f"The directory that holds the banks; by default ROOT/{dataset}_pkl_files.",
                rich_help_panel="What",
            ),
        ] = None,
        run: options.RunOptions,
    ) -> None:
        from patchbank.bank.ezhoi import bank_directory, bank_name
        from patchbank.datasets import load_splits

        root = root.expanduser()
        checkpoints = run.config.checkpoints or root / "checkpoints" / "pretrained_CLIP"
        models = run.models_or(list(EZHOI_MODELS))
        banks = bank_directory(root, dataset) if out is None else out.expanduser()
        jobs = [
            (
                loaded,
                banks / bank_name(get_model(name).bank_prefix, dataset, loaded.split or ""),
                replace(run.config, model=name, checkpoints=checkpoints),
            )
            for loaded in load_splits(dataset, root, split or [], images, annotations)
            for name in models
        ]
        _run(jobs, dry_run=run.dry_run, json=run.json)

    help_text = f"Extract {splits}: by default all of it, with {' and '.join(EZHOI_MODELS)}."
    app.command(dataset, help=help_text)(options.with_run_options(command))


_register("hicodet", "HICO-DET, splits train and test")
_register("vcoco", "V-COCO, splits train (trainval list, COCO train2014) and val (test list, COCO val2014)")


@app.command("folder")
@options.with_run_options
def _folder(
    *,
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A directory of images, searched recursively.")],
    out: Annotated[Path, typer.Option(metavar="BANK", help="The bank.", rich_help_panel="What")],
    run: options.RunOptions,
) -> None:
    """Extract any directory of images, by default with ViT-B/16."""
    from patchbank.datasets import load_dataset

    models = run.models_or([DEFAULTS.model])
    if len(models) != 1:
        raise ConfigError("A folder's features go into one bank, so they are of one model: give --model once.")
    checkpoints = run.config.checkpoints or Path("checkpoints/pretrained_CLIP")
    config = replace(run.config, model=models[0], checkpoints=checkpoints)
    _run([(load_dataset("folder", images), out.expanduser(), config)], dry_run=run.dry_run, json=run.json)


def _run(jobs: list[tuple["Dataset", Path, ExtractConfig]], *, dry_run: bool, json: bool) -> None:
    """Plan every bank, then make them one after the other. Raises typer.Exit with the command's code."""
    with busy("Looking at data set, weights and bank"):
        from patchbank.extraction import execute, load_encoder, obtain_weights
        from patchbank.plan import check_disk, make_plan

        plans = [make_plan(*job) for job in jobs]
    if dry_run:
        show_json([_plan_dict(plan) for plan in plans]) if json else _show_plans(plans)
    check_disk(plans)
    if dry_run:
        raise typer.Exit(0)

    # All weights before the first feature, and model by model, so that each is loaded once.
    plans = [obtain_weights(plan, DownloadProgress(f"Downloading {plan.model.name}")) for plan in plans]
    order = list(dict.fromkeys(plan.model for plan in plans))
    plans.sort(key=lambda plan: order.index(plan.model))
    summaries: list[ExtractSummary] = []
    encoder, exit_code = None, None
    for plan in plans:
        with busy(f"Loading {plan.model.name}"):
            encoder = load_encoder(plan, encoder) or encoder
        title = f"{plan.dataset.title}, {plan.model.name}"
        with StopOnSignal() as signals, ImageProgress(title, len(plan.todo)) as progress:
            summary = execute(plan, encoder if plan.todo else None, on_commit=progress.advance, stop=signals.stop)
        summaries.append(summary)
        if not json:
            show_summary(summary)
        if (exit_code := signals.exit_code) is not None:
            show_note("stopped; what is committed is safe, and the same command goes on from here.")
            break
    if json:
        show_json([_summary_dict(summary) for summary in summaries])
    if exit_code is None:
        exit_code = 1 if any(summary.failures for summary in summaries) else 0
    raise typer.Exit(exit_code)


def _show_plans(plans: list["ExtractPlan"]) -> None:
    from patchbank.files import free_bytes

    for plan in plans:
        done = len(plan.selected) - len(plan.todo)
        weights = plan.checkpoint.path if plan.checkpoint else f"to be downloaded from {plan.model.url}"
        say(str(plan.out), "bold")
        say(
            f"  {plan.model.name}, {len(plan.selected):,} images, {done:,} done, {len(plan.todo):,} to do, "
            f"{size_text(plan.bytes_needed)}"
        )
        say(f"  weights: {weights}")
    total = sum(plan.bytes_needed for plan in plans)
    say(f"{size_text(total)} to write, {size_text(free_bytes(plans[0].out))} free. Nothing was written.")


def _plan_dict(plan: "ExtractPlan") -> dict[str, Any]:
    from patchbank.files import free_bytes

    return {
        "bank": str(plan.out),
        "model": plan.model.name,
        "images": len(plan.selected),
        "done": len(plan.selected) - len(plan.todo),
        "todo": len(plan.todo),
        "bytes": plan.bytes_needed,
        "free_bytes": free_bytes(plan.out),
        "weights": str(plan.checkpoint.path) if plan.checkpoint else None,
    }


def show_summary(summary: "ExtractSummary") -> None:
    """What a run did, for people: notes first, then the figures, then what failed."""
    for note in summary.notes:
        show_note(note)
    facts = [f"{summary.images:,} features written ({size_text(summary.bytes_written)})"]
    if summary.already_done:
        facts.append(f"{summary.already_done:,} already there")
    if summary.failures:
        facts.append(f"{len(summary.failures):,} failed")
    if summary.remaining:
        facts.append(f"{summary.remaining:,} left to do")
    if summary.images:
        facts.append(
            f"{summary.images_per_second:.1f} images/s for {duration_text(summary.seconds)}, "
            f"bound by {summary.times.bound}"
        )
    say(str(summary.bank), "bold")
    say(f"  {', '.join(facts)}")
    for key, reason in list(summary.failures.items())[:_FAILURES_SHOWN]:
        say(f"  failed: {key}: {reason}", "red")
    if (more := len(summary.failures) - _FAILURES_SHOWN) > 0:
        say(f"  and {more:,} more: patchbank info {summary.bank} --failures", "red")


def _summary_dict(summary: "ExtractSummary") -> dict[str, Any]:
    return {
        **asdict(summary),
        "bank": str(summary.bank),
        "images_per_second": summary.images_per_second,
        "bound": summary.times.bound,
    }
