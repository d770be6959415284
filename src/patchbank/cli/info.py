"""``patchbank info BANK``: what a bank is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchbank.cli.console import FAILURES_SHOWN, say, show_json, stdout
from patchbank.cli.options import flag
from patchbank.config import UNKNOWN
from patchbank.files import bytes_text
from patchbank.locations import locate
from patchbank.models import MODELS

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank


def info(
    bank: Annotated[Path, typer.Argument(parser=locate, metavar="BANK", help="The bank's directory, or its URL.")],
    failures: Annotated[bool, flag("--failures", "List every image that failed, and why.")] = False,
    json: Annotated[bool, flag("--json", "All of it as JSON on standard output.")] = False,
) -> None:
    """Print what a bank is: model, shapes, counts, failures, bytes, fingerprint."""
    from patchbank.bank.reader import open_bank

    opened = open_bank(bank)
    if json:
        show_json(_facts(opened))
    else:
        _show(opened, all_failures=failures)


def _facts(bank: Bank) -> dict[str, Any]:
    manifest = bank.manifest
    return {
        "path": str(bank.path),
        **asdict(manifest),
        "versions": dict(manifest.versions),
        "dtype": manifest.dtype,
        "resize": manifest.resize,
        "shape": manifest.shape,
        "features": len(bank),
        "bytes": bank.bytes_on_disk(),
        "failures": bank.failures,
    }


def _show(bank: Bank, *, all_failures: bool) -> None:
    manifest = bank.manifest
    tokens, dim = manifest.shape
    rows, columns = manifest.grid

    def add(name: str, value: str) -> None:
        stdout.print(Text.assemble((f"{name:16}", "bold"), value), soft_wrap=True)

    add("bank", str(bank.path))
    add("dataset", manifest.title)
    add("model", manifest.fingerprint.model)
    add("features", f"{len(bank):,} x ({tokens}, {dim}) {manifest.dtype}, grid {rows} x {columns}")
    if manifest.cls:
        add("[CLS]", f"{len(bank):,} x ({dim},)")
    add("failures", f"{len(bank.failures):,}")
    add("bytes", f"{bytes_text(bank.bytes_on_disk())}, layout {manifest.layout}")
    if manifest.adopted:
        add("adopted", manifest.adopted)
    official = manifest.fingerprint.weights_sha256 in {known.sha256 for known in MODELS.values()}
    unknown = manifest.fingerprint.weights_sha256 == UNKNOWN
    own = "not known" if unknown else "a checkpoint of the user's, not OpenAI's official file"
    add("weights", "OpenAI's official file" if official else own)
    for name, value in manifest.fingerprint.to_dict().items():
        if name != "model":
            add(name.replace("_", " ").replace("sha256", "SHA-256"), value)
    if manifest.device != UNKNOWN:
        compiled = ", compiled" if manifest.compiled else ""
        add("made on", f"{manifest.device}, batch size {manifest.batch_size}{compiled}")
    if manifest.versions:
        add("made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    shown = list(bank.failures.items())[: None if all_failures else FAILURES_SHOWN]
    for key, reason in shown:
        say(f"failed: {key}: {reason}", "red")
    if (more := len(bank.failures) - len(shown)) > 0:
        say(f"and {more:,} more: --failures lists all", "red")
