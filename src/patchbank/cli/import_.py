"""``patchbank import PICKLES BANK --model M``: a new bank, made of third-party pickles or of ADA-CM's one."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from patchbank.cli import options
from patchbank.cli.completing import show_completing
from patchbank.cli.console import (
    say,
    say_prose,
    show_facts,
    show_failures,
    show_json,
    show_note,
    some,
    written_text,
)
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import StopOnSignal
from patchbank.cli.verify import comparison
from patchbank.config import ExtractConfig, Layout, as_path, option
from patchbank.errors import BankError, ConfigError, PatchbankError
from patchbank.features import GRID, UNKNOWN, Input, Output
from patchbank.listing import Listing, ListingOptions, find_listing, options_needed
from patchbank.locations import locate_new

if TYPE_CHECKING:
    from patchbank.bank.check import Report, SizeOf
    from patchbank.bank.convert import Imported
    from patchbank.bank.manifest import Manifest
    from patchbank.encoders.base import EncoderSpec
    from patchbank.encoders.runner import Runner


@options.takes(
    details={"layout": {"default_text": "ezhoi; shards for ADA-CM's file"}},
    config=(
        *("weights", "checkpoints", "input_size", "pool_grid", "layout", "shard_size", "resize", "device", "overwrite"),
    ),
)
def import_(
    source: Annotated[
        Path, typer.Argument(parser=as_path, metavar="PICKLES", help="Directory of pickles, or ADA-CM's file.")
    ],
    target: Annotated[Path, typer.Argument(parser=locate_new, metavar="BANK", help="New bank's directory or URL.")],
    *,
    model: str = options.like("model", ..., values=options.MODEL_VALUES),
    asked: ListingOptions,
    sample: int = option(0, "First compare N features with a fresh extraction of their images.", minimum=0),
    config: ExtractConfig,
    json: bool = options.JSON,
) -> None:
    """Make a bank of pickles that other code wrote. Each is checked without executing it; PICKLES is not changed.

    GPU tensors become CPU tensors, views shrink to their own storage, a [CLS] row is dropped, half precision becomes
    float32. Unusable pickles are left out and listed as failures. If the features of --sample agree with a fresh
    extraction, `patchbank repair BANK --extract` can complete the bank.

    Exit codes: 0 all pickles are imported, 1 some are left out.

    ADA-CM's file becomes a bank of regions, as `patchbank extract pairs` makes one, in float16.

    patchbank import clipbase_img_hicodet_train BANK --model ViT-B/16
    """
    if source.is_file():
        _import_pairs(source, target, asked, replace(config, model=model), sample, json=json)
    with busy("looking at the pickles"):
        from patchbank import encoders
        from patchbank.bank.convert import import_pickles

        found = find_listing(source, None, asked, "--sample" if sample else None)
        keys = found.keys() if found else None
        made = replace(config, model=model)
        spec = encoders.find(made, found.root if found else None, rounding=True)
        layout = made.layout or "ezhoi"
        wanted = _wanted(spec, made, found, layout, {GRID: spec.outputs[GRID]}, spec.input.resized_by(made.resize))
        compare = comparison(wanted, found, made, sample) if found and sample else None
    if found is None:
        show_note(
            "no list of images: keys are the files' names without the images' extensions, and boxes cannot be mapped. "
            f"To have both, add{options_needed(None)}, or --images DIR."
        )
    with StopOnSignal() as signals, Activity() as activity:
        done = import_pickles(
            source,
            target,
            wanted,
            keys,
            size_of=_sizes(found),
            confirm=(lambda report: _confirmed(report, wanted, compare)) if compare else None,
            models_with=encoders.models_with,
            overwrite=config.overwrite,
            progress=activity.counter(f"checking {source.name}"),
            writing=activity.counter(f"writing {target.name}"),
            stop=signals.stop,
        )
    show_json(_imported_dict(done)) if json else _show(done, source, found, config.weights)
    signals.end(1 if done.left_out or done.written.damaged or done.written.kept else 0)


def _import_pairs(
    source: Path, target: Path, asked: ListingOptions, config: ExtractConfig, sample: int, *, json: bool
) -> NoReturn:
    wrong = {"--sample": sample, "--resize": config.resize, "--pool-grid": config.pool_grid > 1}
    wrong["--layout ezhoi"] = config.layout == "ezhoi"
    if given := [name for name, value in wrong.items() if value]:
        raise ConfigError(f"{given[0]} is for EZ-HOI's pickles, and {source} is one file of pairs: leave it out.")
    with busy("looking at the file"):
        from patchbank.bank.ada_cm_reading import import_pairs
        from patchbank.bank.manifest import stored_outputs
        from patchbank.extraction.plan import find_encoder

        found = find_listing(source, None, asked)
        annotated = found.pairs() if found else None
        config = replace(config, crop="pad")
        spec = find_encoder(config, found.root if found else None, rounding=True)
        outputs = stored_outputs(spec.outputs, "shards", "float16")
        made = replace(spec.input.resized_by("squash"), cut="pad")
        wanted = _wanted(spec, config, found, "shards", outputs, made)
    with StopOnSignal() as signals, Activity() as activity:
        done = import_pairs(
            source,
            target,
            replace(wanted, imported="from ADA-CM's file of pairs"),
            annotated,
            overwrite=config.overwrite,
            progress=activity.counter(f"checking {source.name}", bytes=True),
            writing=activity.counter(f"writing {target.name}", "region"),
            stop=signals.stop,
        )
    show_json(_imported_dict(done)) if json else _show(done, source, None, config.weights)
    signals.end(1 if done.left_out or done.written.damaged or done.written.kept else 0)


def _wanted(
    spec: EncoderSpec,
    config: ExtractConfig,
    found: Listing | None,
    layout: Layout,
    outputs: dict[str, Output],
    made: Input,
) -> Manifest:
    """The new bank's manifest: the model's shapes and input; the rest of its identity is unknown."""
    from patchbank.bank.manifest import Manifest
    from patchbank.bank.parts import part_size
    from patchbank.encoders.defaults import auto_batch_size
    from patchbank.encoders.device import resolve_device

    known = {name: spec.identity[name] for name in ("family", "model") if name in spec.identity}
    return Manifest(
        layout=layout,
        dataset=(found.dataset if found else None) or UNKNOWN,
        split=found.split if found else None,
        outputs=outputs,
        identity={name: known.get(name, UNKNOWN) for name in spec.identity},
        input=made,
        part_size=part_size(layout, outputs, config.shard_size),
        # Of the extraction that completes the bank: pickles are not made again.
        batch_size=auto_batch_size(spec.input.patches, resolve_device(config.device, config.precision).type),
        device=UNKNOWN,
        versions={},
        imported="from pickles of other code",
    )


def _confirmed(report: Report, wanted: Manifest, compare: Callable[[Report], Runner]) -> Manifest:
    """The manifest with the model's identity, if features agree with a fresh extraction. Raises BankError if not."""
    runner = compare(report)
    different = [finding for finding in report.findings if finding.kind == "pixels"]
    if different:
        raise BankError(
            f"The pickles in {report.bank} differ from a fresh extraction with {runner.spec.weights}: "
            f"{different[0].name} has a {different[0].detail}. Were they made with other weights (--weights) or "
            "another --resize? Nothing was written."
        )
    if not report.sample:
        raise BankError("--sample found no image to extract: none of the available ones has a sound pickle.")
    worst = max(report.sample.values())
    evidence = f"{len(report.sample)} features agree with a fresh extraction to a relative error of {worst:.1e}"
    return replace(wanted, identity=dict(runner.spec.identity), imported=f"{wanted.imported}; {evidence}")


def _sizes(found: Listing | None) -> SizeOf:
    """A function of a key that gives the image's size; None if the image cannot be read."""
    from patchbank.images import open_image

    try:
        samples = {} if found is None else {each.key: each for each in found.load().samples}
    except PatchbankError as error:
        show_note(f"The images' sizes are unknown: {error}")
        samples = {}

    def size_of(key: str) -> tuple[int, int] | None:
        try:
            with open_image((sample := samples[key]).source.content(sample)) as image:
                return image.size
        except Exception:  # missing or damaged: decoders raise anything
            return None

    return size_of


def _show(done: Imported, source: Path, found: Listing | None, weights: Path | None) -> None:
    from patchbank.bank.check import KINDS

    written = done.written
    show_facts(
        written.bank,
        written_text(written.features, written.bytes_written),
        some(written.already_done, "already there"),
        some(len(done.left_out), "left out"),
        some(written.remaining, "left to do"),
    )
    if written.manifest.imported:
        say_prose(f"  imported {written.manifest.imported}")
    for kind in KINDS:
        if count := sum(finding.kind == kind for finding in done.fixed):
            say(f"  fixed: {count:,} {KINDS[kind].says}", "green")
    left_out = {finding.name: finding.reason for finding in done.left_out}
    show_failures("left out", left_out | written.damaged, f": patchbank info {written.bank} --failures")
    if written.kept:
        show_note(f"{written.bank} was not replaced: {written.kept}.")
    if found is not None and left_out:
        place, bank = shlex.quote(str(source)), written.bank
        show_completing("Extract what is missing:", bank, written.manifest, found.named, weights, place)


def _imported_dict(done: Imported) -> dict[str, Any]:
    written = {name: value for name, value in asdict(done.written).items() if name not in ("bank", "manifest")}
    return {
        "bank": str(done.written.bank),
        "layout": done.written.manifest.layout,
        "imported": done.written.manifest.imported,
        **written,
        "fixed": [asdict(finding) for finding in done.fixed],
        "left_out": [asdict(finding) for finding in done.left_out],
    }
