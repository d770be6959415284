"""``patchbank stats BANK``: counts, means and covariances of annotated pairs' features, by class."""

from __future__ import annotations

from pathlib import Path

import typer

from patchbank.cli import options
from patchbank.cli.console import count_text, say, say_prose, show_json, show_note
from patchbank.cli.outputs import require_own
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import interruptible
from patchbank.config import as_path, option
from patchbank.errors import ConfigError
from patchbank.files import bytes_text

_KINDS = ("verb", "object", "hoi")


@options.takes()
def stats(
    bank: options.Bank,
    *,
    by: list[str] | None = option(
        None, "Classes: verb, object or hoi; repeatable.", metavar="KIND", values=_KINDS, default_text="all"
    ),
    of: str | None = option(
        None,
        "Whose features: human, object or union.",
        metavar="REGION",
        values=("human", "object", "union"),
        default_text="object by object, else union",
    ),
    covariance: bool = option(False, "Compute covariances too."),
    normalise: bool = option(False, "Divide each feature by its norm first."),
    output: str | None = option(None, "Stored output, a vector.", metavar="NAME", default_text="the first"),
    out: Path | None = option(
        None,
        "Where to write them: .safetensors or .pt.",
        metavar="FILE",
        short="-o",
        default_text="counts are printed alone",
        parse=as_path,
    ),
    json: bool = options.JSON,
) -> None:
    """Compute count, mean and covariance of the features of each verb, object and hoi class of a bank of pairs.

    The file holds verb.count (V,), verb.mean (V, D) and verb.covariance (V, D, D), and the same of object and hoi; a
    class without pairs has zeros. The bank is one of `patchbank extract pairs`; if it is not finished, the exit code is
    1.

    patchbank stats BANK --by verb --covariance --out verbs.safetensors
    """
    with busy("opening the bank"):
        from patchbank.bank.reader import open_bank
        from patchbank.bank.regions import unfinished
        from patchbank.statistics import FORMATS, MARK, region_statistics, write_statistics

        if out is not None:
            if out.suffix not in FORMATS:
                raise ConfigError(f"{out}: the file must end in {' or '.join(FORMATS)}.")
            require_own(out, MARK, "a file of `patchbank stats`")
        opened = open_bank(bank)
    with interruptible("nothing was written."), Activity() as activity:
        made = region_statistics(
            opened,
            by or (),
            of=of,
            covariance=covariance,
            normalise=normalise,
            output=output,
            progress=activity.counter(f"reading {opened.path.name}"),
        )
        if out is not None:
            try:
                write_statistics(out, made, opened.manifest, normalised=normalise)
            except OSError as error:
                raise ConfigError(f"{out} cannot be written: {error.strerror or error}.") from error
    note = unfinished(opened)
    if json:
        counts = {
            kind: {"of": each.of, "names": each.names, "count": each.count.tolist()} for kind, each in made.items()
        }
        show_json({"bank": str(bank), "file": None if out is None else str(out), **counts, "note": note})
        raise typer.Exit(1 if note else 0)
    if out is not None:
        say(f"{out} ({bytes_text(out.stat().st_size)})", "bold")
    for kind, each in made.items():
        some, pairs = int((each.count > 0).sum()), int(each.count.sum())
        say_prose(f"  {kind}: {count_text(pairs, 'pair')} of {some:,} of {len(each.count):,} classes, by {each.of}")
    if note:
        show_note(note)
        raise typer.Exit(1)
