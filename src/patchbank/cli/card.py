"""``patchbank card BANK``: a bank's card for the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from patchbank.cli import options
from patchbank.cli.console import count_text, say, show_json, show_note
from patchbank.cli.progress import busy
from patchbank.config import as_path, option
from patchbank.errors import ConfigError
from patchbank.files import bytes_text, write_whole
from patchbank.locations import is_remote

_MOST_FILES = 10_000  # of a directory, by the hub's advice


def as_repo(text: object) -> str:
    """``ORG/NAME``. Raises ValueError if it is something else."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(text), re.ASCII):
        raise ValueError(f"{text!r} is no repository: give ORG/NAME")
    return str(text)


def as_licence(text: object) -> str:
    """A licence's name on the hub. Raises ValueError if it cannot be one."""
    if not re.fullmatch("[a-z0-9.-]+", str(text)):
        raise ValueError(f"{text!r} is no name of a licence on the hub: give one such as cc-by-4.0, mit or other")
    return str(text)


@options.takes()
def card(
    bank: options.Bank,
    *,
    out: Path | None = option(
        None,
        "The card, at the root of what is uploaded: the bank's directory, or one around it.",
        metavar="FILE",
        short="-o",
        default_text="README.md in the bank; for a URL, in this directory",
        parse=as_path,
    ),
    repo: str | None = option(
        None, "Repository that the bank is for, to say how it is read.", metavar="ORG/NAME", parse=as_repo
    ),
    license: str | None = option(
        None,
        "Licence of the features, by its name on the hub: cc-by-4.0.",
        metavar="NAME",
        default_text="unknown",
        parse=as_licence,
    ),
    overwrite: bool = option(False, "Replace an existing card."),
    json: bool = options.JSON,
) -> None:
    """Write a bank's dataset card for the Hugging Face hub: what it holds, how it was made, how to read it, a checksum.

    It is made of the bank alone. What that does not say is marked "to be filled in": licences, citations.

    patchbank card BANK --repo ORG/NAME
    """
    target = out or (Path() if is_remote(bank) else bank) / "README.md"
    if target.is_dir():
        raise ConfigError(f"{target} is a directory: name the card's file, such as {target / 'README.md'}.")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists: --overwrite replaces it, with what was written by hand.")
    with busy("describing the bank"):
        from patchbank.bank.reader import open_bank
        from patchbank.show.card import card_of

        opened = open_bank(bank)
        content = card_of(opened, target.parent, repo or "", license or "").encode("utf-8", "backslashreplace")
    try:
        write_whole(target, content)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}.") from error
    if json:
        show_json({"path": str(target), "bytes": len(content), "checksum": opened.digest})
        return
    if opened.manifest.layout == "ezhoi" and len(opened) > _MOST_FILES:
        show_note(
            f"{count_text(len(opened), 'pickle')} are more than the {_MOST_FILES:,} files of a directory that the hub "
            "advises: `patchbank convert BANK NEW --layout shards` makes few."
        )
    say(f"{target} ({bytes_text(len(content))}): fill in what it leaves open")
