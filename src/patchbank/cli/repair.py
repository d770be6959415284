"""``patchbank repair BANK``: mend in place what can be mended, and extract the rest again if asked to."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli import listing, options
from patchbank.cli.console import FAILURES_SHOWN, busy, count_text, interruptible, say, show_json, show_note
from patchbank.cli.extract import run_jobs
from patchbank.cli.listing import Listing, find_listing, options_needed
from patchbank.cli.options import DEFAULTS, flag
from patchbank.cli.progress import CountProgress, DownloadProgress
from patchbank.config import ARCHIVES, UNKNOWN, ExtractConfig, ResizeMode
from patchbank.encoders.openai.registry import get_model
from patchbank.errors import BankError, ConfigError, WeightsError
from patchbank.locations import is_remote, locate

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.bank.repair import Repaired, SizeOf
    from patchbank.datasets import Dataset

_COMPARED = 5  # features of an adopted bank that are computed anew before others are put beside them


def repair(
    bank: Annotated[
        Path, typer.Argument(parser=locate, metavar="BANK", help="A bank, or a directory of EZ-HOI's pickles.")
    ],
    *,
    dataset: listing.DatasetName = None,
    split: listing.Split = None,
    root: listing.Root = None,
    images: listing.Images = None,
    annotations: listing.Annotations = None,
    extract: Annotated[bool, flag("--extract", "Extract again what cannot be mended, and what is missing.")] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="For --extract, a checkpoint that is not the official."),
    ] = None,
    checkpoints: options.Checkpoints = None,
    device: options.Device = DEFAULTS.device,
    workers: options.Workers = DEFAULTS.workers,
    resize: Annotated[
        ResizeMode, typer.Option("--resize", help="How the images of pickles that are adopted became square.")
    ] = DEFAULTS.resize,
    json: Annotated[bool, flag("--json", "The result as JSON on standard output.")] = False,
) -> None:
    """Mend a bank in place, as far as that is possible without the images; of EZ-HOI's pickles, make a bank.

    GPU tensors become CPU tensors, views shrink to their own storage, a [CLS] row is dropped, half precision becomes
    float32, and the small files are written that tell what the bank is. What cannot be mended is set aside as
    *.damaged and listed; --extract makes it anew. Exit code 0: all is well now. 1: something is left to extract.
    """
    with busy("Looking at the bank"):
        from patchbank.bank.layouts import manifest_in
        from patchbank.bank.repair import repair

        if is_remote(bank):
            raise ConfigError(
                f"{bank}: repair works on directories. Of a bank in an object store, delete the shards that `patchbank "
                "verify` names, and extract again: what they held is made anew."
            )
        before = manifest_in(bank)
        found = find_listing(
            bank, before, dataset=dataset, split=split, root=root, images=images, annotations=annotations
        )
        if extract and before is not None and before.dataset in ARCHIVES:
            raise ConfigError(
                f"--extract does not read {before.dataset} files. "
                f"What is missing, `patchbank extract {before.dataset}` makes, given the files again."
            )
        if extract and found is None:
            raise ConfigError(f"--extract needs the images: add{options_needed(before)}.")
        loaded = found.load() if found and extract else None
        keys = found.keys() if found else None
        if loaded is not None and before is not None:
            _check_weights(before, loaded, _config(before, loaded, weights, checkpoints, device, workers))
    with (
        interruptible("nothing is lost: the same command goes on."),
        CountProgress(f"Looking at {bank.name}") as progress,
        CountProgress(f"Mending {bank.name}") as mending,
    ):
        done = repair(
            bank,
            keys,
            dataset=(found.dataset if found else None) or UNKNOWN,
            split=found.split if found else None,
            resize=resize,
            size_of=_sizes(found),
            progress=progress,
            mending=mending,
        )
    if not json:
        show_repaired(done, found, extracting=extract)
    elif not extract:
        show_json(_repaired_dict(done))
    if loaded is None:
        raise typer.Exit(1 if done.to_extract or done.unread else 0)
    manifest = manifest_in(bank)
    if manifest is None:  # every shard of it was damaged: nothing is left that says what it was
        raise BankError(f"Nothing in {bank} says any more what it was. Extract it anew with `patchbank extract`.")
    config = _config(manifest, loaded, weights, checkpoints, device, workers)
    if manifest.adopted and manifest.fingerprint.weights_sha256 == UNKNOWN:
        _confirm(bank, manifest, loaded, config)
    run_jobs(
        [(loaded, bank, config)],
        dry_run=False,
        json=json,
        report=lambda extracted: {"repaired": _repaired_dict(done), "extracted": extracted},
    )


def _check_weights(manifest: Manifest, dataset: Dataset, config: ExtractConfig) -> None:
    """Raise WeightsError, before anything is done, where the weights at hand are not the bank's."""
    from patchbank.encoders.openai.checkpoints import CHECKPOINTS, find_checkpoint

    known = manifest.fingerprint.weights_sha256
    model = get_model(manifest.fingerprint.model)
    checkpoints = config.checkpoints or (dataset.root and dataset.root / CHECKPOINTS)
    checkpoint = find_checkpoint(model, config.weights, checkpoints)
    sha256 = checkpoint.sha256 if checkpoint else model.sha256
    if known not in (UNKNOWN, sha256):
        others = checkpoint.path if checkpoint else "the official ones"
        raise WeightsError(
            f"The bank was made with other weights than {others} (their SHA-256 is {known}): "
            "give the file with --weights. Nothing was changed."
        )


def _sizes(found: Listing | None) -> SizeOf:
    """A function that looks up the size of a listed image, where it can be had; of any other it says None."""
    from PIL import Image

    from patchbank.errors import PatchbankError

    try:
        samples = {} if found is None else {sample.key: sample for sample in found.load().samples}
    except PatchbankError as error:
        show_note(f"The images' sizes cannot be noted: {error}")
        samples = {}

    def size_of(key: str) -> tuple[int, int] | None:
        try:
            with Image.open((sample := samples[key]).source.content(sample)) as image:
                return image.size
        except Exception:  # not there, or damaged in one of the many ways in which a picture can be
            return None

    return size_of


def _config(
    manifest: Manifest,
    dataset: Dataset,
    weights: Path | None,
    checkpoints: Path | None,
    device: str,
    workers: int | None,
) -> ExtractConfig:
    """The configuration that the bank was made with, or would have been."""
    from patchbank.bank.packing import image_bytes
    from patchbank.encoders.openai.checkpoints import CHECKPOINTS

    fingerprint = manifest.fingerprint
    config = ExtractConfig(
        model=get_model(fingerprint.model).name,
        weights=weights,
        checkpoints=checkpoints,
        dtype=manifest.dtype,
        layout=manifest.layout,  # type: ignore[arg-type]
        shard_size=(manifest.shard_images or 1) * image_bytes(manifest),
        resize=manifest.resize,
        decode=manifest.decode,
        device=device,
        workers=workers,
    )
    if config.checkpoints is None and dataset.root is None and CHECKPOINTS.is_dir():
        config = replace(config, checkpoints=CHECKPOINTS)
    if manifest.adopted and fingerprint.precision == UNKNOWN:
        return config
    return replace(config, precision=fingerprint.precision)  # type: ignore[arg-type]


def _confirm(bank: Path, manifest: Manifest, dataset: Dataset, config: ExtractConfig) -> None:
    """Compute some adopted features anew; if they agree, write down what they are. Raises BankError if they do not."""
    from patchbank.bank.reader import open_bank
    from patchbank.bank.repair import confirm
    from patchbank.bank.verify import Report, compare_with_pixels
    from patchbank.encoders.openai.checkpoints import obtain_checkpoint
    from patchbank.extraction.plan import describe
    from patchbank.extraction.recompute import encoder_of, recompute

    model = get_model(config.model)
    with DownloadProgress(f"Downloading {model.name}") as downloading:
        obtain_checkpoint(model, config.weights, config.checkpoints, downloading)
    with busy(f"Comparing some features with what {model.name} gives"):
        encoder = encoder_of(
            model,
            manifest,
            dataset.root,
            weights=config.weights,
            checkpoints=config.checkpoints,
            device=config.device,
        )
        report = Report(bank, manifest.layout, manifest, model, sound=list(open_bank(bank)))
        keys = [sample.key for sample in dataset.samples if sample.exists()]
        compare_with_pixels(report, keys, _COMPARED, recompute(dataset, encoder, config.resize, config.decode))
    if different := [finding for finding in report.findings if finding.kind == "pixels"]:
        first = different[0]
        raise BankError(
            f"The features in {bank} are not what {model.name} with {encoder.checkpoint.path} gives: {first.name} has "
            f"a {first.detail}. Others cannot be put beside them. Were they made with other weights (--weights), or "
            "another --resize? Else extract all of them into another directory."
        )
    worst = max(report.sample.values(), default=0.0)
    evidence = f"{len(report.sample)} computed anew from their pixels agree to a relative error of {worst:.1e}"
    confirm(bank, manifest, describe(dataset, manifest.layout, config, encoder.checkpoint), evidence)


def show_repaired(done: Repaired, found: Listing | None, *, extracting: bool) -> None:
    """For people: what was mended, what was set aside, what is left to extract."""
    from patchbank.bank.examine import KINDS

    report = done.before
    say(str(report.bank), "bold")
    say(f"  {report.looked_at:,} features read")
    if done.adopted:
        say("  adopted: bank.json and index/ say now what they are, as far as that is known")
    for kind in KINDS:
        if count := sum(finding.kind == kind for finding in done.mended):
            say(f"  mended: {count:,} {KINDS[kind].says}", "green")
    if done.set_aside:
        where = f"{done.set_aside[0]} for one" if len(done.set_aside) > 1 else done.set_aside[0]
        say(f"  set aside: {count_text(len(done.set_aside), 'file')} ({where}); delete them when you like", "yellow")
    for finding in done.unread[:FAILURES_SHOWN]:
        say(f"  left as it is: {finding.name}: {KINDS[finding.kind].says} ({finding.detail})", "red")
    for finding in done.to_extract[:FAILURES_SHOWN]:
        reason = finding.detail if finding.kind == "failed" else KINDS[finding.kind].says
        detail = f" ({finding.detail})" if finding.detail and finding.kind != "failed" else ""
        say(f"  to extract: {finding.name}: {reason}{detail}", "red")
    if (more := len(done.to_extract) - FAILURES_SHOWN) > 0:
        say(f"  and {more:,} more to extract: --json names them all", "red")
    if done.to_extract and not extracting:
        how = f"--extract{found.options} does it" if found else f"--extract{options_needed(report.manifest)} does it"
        say(f"  {len(done.to_extract):,} to extract again: {how}")
    elif not done.to_extract:
        say("  nothing is left to extract", "green")


def _repaired_dict(done: Repaired) -> dict[str, Any]:
    return {
        "bank": str(done.before.bank),
        "features": done.before.looked_at,
        "adopted": done.adopted,
        "mended": [asdict(finding) for finding in done.mended],
        "set_aside": done.set_aside,
        "unread": [asdict(finding) for finding in done.unread],
        "to_extract": [asdict(finding) for finding in done.to_extract],
    }
