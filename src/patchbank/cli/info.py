"""``patchbank info BANK``: what a bank is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from patchbank.cli import options
from patchbank.cli.console import (
    FAILURES_SHOWN,
    count_text,
    one_line,
    say,
    say_beside,
    show_failures,
    show_json,
    some,
    stdout,
)
from patchbank.config import Partition, option
from patchbank.errors import ConfigError
from patchbank.features import UNKNOWN
from patchbank.files import bytes_text
from patchbank.listing import ListingOptions, find_listing
from patchbank.regions import GRID_CUT, image_of

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset


@options.takes()
def info(
    bank: options.Bank,
    *,
    keys: bool = option(False, "Print only the keys that have features, one per line."),
    failures: bool = option(False, "List every failure with its reason."),
    partitions: int | None = option(None, "Print how complete each of N partitions of the images is.", minimum=1),
    asked: ListingOptions,
    json: bool = options.JSON,
) -> None:
    """Print what a bank is: model, shapes, counts, failures, bytes, identity.

    patchbank info BANK --failures
    """
    from patchbank.bank.reader import open_bank

    opened = open_bank(bank)
    if keys:
        if json:
            show_json(list(opened))
        else:
            for key in opened:
                say(one_line(key))
        return
    found = None
    if partitions is not None or asked.given:
        found = find_listing(bank, opened.manifest, asked)
        if found is None:
            raise ConfigError("Say which images the bank is of: --images DIR, or --dataset, --split and --root.")
    parts = _parts(opened, found.load(), partitions or 1) if found else []
    if json:
        show_json(_facts(opened) | ({"partitions": parts} if parts else {}))
        return
    _show(opened, all_failures=failures)
    for part in parts:
        name = "coverage" if len(parts) == 1 else f"part {part['partition']}"
        facts = (
            f"{part['done']:,} of {part['listed']:,} {opened.manifest.noun}s",
            some(part["failed"], "failed"),
            some(part["left"], "left"),
        )
        say(f"{name:16}{', '.join(filter(None, facts))}")


def _parts(bank: Bank, dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """How complete each of `count` partitions is: the numbers of images listed, done, failed, and left to do."""
    from patchbank.extraction.plan import share_of

    parts = []
    for index in range(count):
        part = Partition(index, count)
        keys = [sample.key for sample in share_of(dataset.samples, part, bank.manifest)]
        done, failed = (sum(key in held for key in keys) for held in (bank, bank.failures))
        left = len(keys) - done - failed
        parts.append({"partition": str(part), "listed": len(keys), "done": done, "failed": failed, "left": left})
    return parts


def _facts(bank: Bank) -> dict[str, Any]:
    manifest = bank.manifest
    return {
        "path": str(bank.path),
        **asdict(manifest),
        "versions": dict(manifest.versions),
        "dtype": manifest.dtype,
        "resize": manifest.input.resize,
        "shape": manifest.shape,
        "features": len(bank),
        "bytes": bank.bytes_on_disk(),
        "checksum": bank.digest,
        "failures": bank.failures,
    }


def _show(bank: Bank, *, all_failures: bool) -> None:
    from patchbank.bank.runs import read_runs
    from patchbank.show.names import output_text, weights_of

    manifest = bank.manifest

    def add(name: str, value: str) -> None:
        say_beside(Text(f"{one_line(name):16}", "bold"), one_line(value), wrapped=stdout.is_terminal)

    add("bank", str(bank.path))
    add("dataset", manifest.title)
    add("model", manifest.model)
    add("features", f"{len(bank):,}")
    for name, output in manifest.outputs.items():
        add(f"  {name}", output_text(output))
    add("failures", f"{len(bank.failures):,}")
    add("size", f"{bytes_text(bank.bytes_on_disk())}, layout {manifest.layout}")
    add("checksum", bank.digest)
    if manifest.imported:
        add("imported", manifest.imported)
    kind, weights = weights_of(manifest, read_runs(bank.path))
    if kind != "other":  # of which only the SHA-256 is known, below
        add("weights", weights)
    for name, value in manifest.identity.items():
        if name != "model":
            add("SHA-256" if name == "weights" else name, value)
    made = manifest.input
    pooled = f", the mean of each {made.pool} x {made.pool} of them" if made.pool > 1 else ""
    h, w = made.size
    size = f"{h}x{w} (height x width), patch {made.patch}{pooled}, grid {made.grid[0]} x {made.grid[1]}"
    cover = f" of {made.cover[0]}x{made.cover[1]}" if made.cover else ""
    add("input", f"{size}, {made.resize}{cover}, {made.interpolation}, decoder {made.decoder}")
    if made.cut:
        images = len({image_of(key) for key in bank})
        how = "pooled from grids" if made.cut == GRID_CUT else f"cut out with {made.cut}"
        add("regions", f"of {count_text(images, 'image')}, {how}; patchbank.open_regions reads them image by image")
    if reduction := manifest.reduction:
        add("reduced", f"{reduction}, {reduction.explained:.2%} of the variance: {', '.join(reduction.outputs)}")
    if manifest.rounded:
        add("rounded before", " > ".join(manifest.rounded))
    if manifest.device != UNKNOWN:
        compiled = ", compiled" if manifest.compiled else ""
        add("made on", f"{manifest.device}, batch size {manifest.batch_size}{compiled}")
    if manifest.versions:
        add("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    show_failures("failed", bank.failures, ": --failures lists all", None if all_failures else FAILURES_SHOWN)
