"""``patchbank extract regions BANK``: features of boxes pooled from a bank's grids."""

from dataclasses import replace
from pathlib import Path

from patchbank.cli import options
from patchbank.cli.boxes import BoxOptions
from patchbank.cli.console import show_failures, show_json, show_note
from patchbank.cli.convert import converted_dict, show_converted
from patchbank.cli.extract import OUT
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import StopOnSignal
from patchbank.config import ExtractConfig, StoredDtype, option
from patchbank.errors import ConfigError
from patchbank.listing import ListingOptions, find_listing


@options.takes(config=("shard_size", "overwrite"))
def regions(
    bank: options.Bank,
    *,
    pairs: bool = option(False, "The boxes of the annotated pairs of the bank's dataset.", "Data"),
    detected: BoxOptions,
    asked: ListingOptions,
    out: Path = OUT,
    dtype: StoredDtype | None = options.like("dtype", None, "BANK's; float16 of int8"),
    config: ExtractConfig,
    json: bool = options.JSON,
) -> None:
    """Pool a bank's grids over boxes, without images or a model. An interrupted run continues with the same command.

    Exit code 0: all boxes have a feature. 1: some have none, such as boxes outside of their image; they are listed.

    patchbank extract regions BANK --pairs --out REGIONS
    """
    with busy("looking at the bank"):
        from patchbank.bank.reader import open_bank
        from patchbank.datasets.boxes import annotated_pairs
        from patchbank.extraction.regions import images_of, pool_into

        source = open_bank(bank)
        images = images_of(source)
        if pairs == (detected.boxes is not None):
            raise ConfigError("Say which boxes: --pairs, the annotated ones of hicodet and vcoco, or --boxes FILE.")
        if pairs:
            found = find_listing(bank, source.manifest, asked, "--pairs")
            assert found is not None
            dataset = annotated_pairs(found.load())
        else:
            dataset = detected.of(images, asked.annotations)
        for note in dataset.notes:
            show_note(note)
    with StopOnSignal() as signals, Activity() as activity:
        done = pool_into(
            source,
            dataset,
            out,
            dtype=dtype,
            shard_size=config.shard_size,
            overwrite=config.overwrite,
            progress=activity.counter(f"pooling {source.path.name}", "region"),
            stop=signals.stop,
        )
    failures = open_bank(out).failures if done.failures else {}
    if json:
        show_json({**converted_dict(done), "failures": failures})
    else:
        show_converted(replace(done, failures=0))
        show_failures("failed", failures, f": patchbank info {out} --failures")
    signals.end(1 if done.damaged or done.refused or done.failures or done.kept else 0)
