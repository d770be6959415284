"""A bank's card for the Hugging Face hub, a README.md: what manifest and index say, and what is left to fill in.

Texts from a bank become code spans or Python literals, so that a name in data is neither Markdown, HTML nor YAML.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank import __version__, hub
from patchbank.bank.packing import SCALE
from patchbank.bank.runs import read_runs
from patchbank.encoders import known_weights, licence_of
from patchbank.errors import BankError
from patchbank.files import bytes_text
from patchbank.locations import is_remote, of_hub
from patchbank.regions import image_of
from patchbank.show.names import plain, weights_of

if TYPE_CHECKING:
    from patchbank.bank.manifest import Manifest
    from patchbank.bank.reader import Bank

# The greatest relative error of an image's features that docs/reference/bank-format.md has of a stored dtype.
ERRORS = {"float16": "2.3e-4", "bfloat16": "1.8e-3", "int8": "8.5e-3"}
_TITLES = {"hicodet": "HICO-DET", "vcoco": "V-COCO"}
_SOURCES = {"hicodet": ["extended|other-HICO-DET"], "vcoco": ["extended|other-V-COCO", "extended|other-MS-COCO"]}
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_FAILURES = 10  # that are named; the others are counted


def card_of(bank: Bank, root: Path, repo: str = "", licence: str = "") -> str:
    """The text of a bank's card.

    Args:
        root: the card's directory, which is the repository's root.
        repo: ``ORG/NAME`` of the repository; empty if it is not known.
        licence: of the features, by its name on the hub (``cc-by-4.0``); empty if it is to be filled in.

    Raises BankError if the bank has no feature.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    if (key := next(iter(bank), None)) is None:
        raise BankError(f"{bank.path} holds no feature: there is nothing to describe.")
    made, inner = bank.manifest, _inside(bank.path, root)
    at = {revision: f"hf://datasets/{repo}{revision}/{inner}".rstrip("/") for revision in ("", "@COMMIT")}
    name = bank.path.name.partition("@")[0] if is_remote(bank.path) else bank.path.resolve().name
    readable = bool(repo) and made.layout == "shards"
    address = str(bank.path) if of_hub(bank.path) else at[""] if readable else inner or "."
    title = repo.partition("/")[2] or name
    if made.dataset in _TITLES and (made.split or "all").isalpha():
        title = Markup(f"{_TITLES[made.dataset]} {made.split or ''}".strip())
    untrained = weights_of(made, read_runs(bank.path))[0] == "untrained"
    file = bank.file(key)
    context = {
        "address": address,
        "bank": bank,
        "dataset": f"{made.dataset} {made.split}" if made.split else made.dataset,
        "error": ERRORS if made.reduction is None else {},
        "failures": list(islice(bank.failures.items(), _FAILURES)),
        "file": f"{inner}/{str(file).removeprefix(str(bank.path))}".replace("//", "/").removeprefix("/"),
        "grid": made.main if made.main in made.grids else next(iter(made.grids), None),
        "images": len({*map(image_of, bank)}) if made.input.cut else len(bank),
        "key": key,
        "known": _known(made),
        "licence": licence,
        "made": made,
        "main": made.outputs[made.main],
        "pinned": at["@COMMIT"] if readable else "",
        "repo": repo,
        "scale": SCALE,
        "size": Markup(bytes_text(bank.bytes_on_disk())),
        "title": title,
        "untrained": untrained,
        "version": Markup(__version__),
        "weights_licence": Markup(licence_of(made.identity)),
    }
    environment = Environment(
        loader=PackageLoader("patchbank.show"),
        finalize=lambda value: value if not isinstance(value, str) or isinstance(value, Markup) else code(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": lambda number: Markup(f"{number:,}"),
        "ours": Markup,
        "literal": lambda text: Markup(repr(text)),
        "several": lambda texts: Markup(", ".join(map(code, texts))),
    }
    page: str = environment.get_template("card.md").render(context)
    return _front_matter(bank, title, licence) + page


def code(text: object) -> str:
    """A text from data as a code span of Markdown, whatever it contains."""
    shown = plain(text) or " "
    ticks = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " * ("`" in (shown[0], shown[-1]))
    return f"{ticks}{space}{shown}{space}{ticks}"


def _known(made: Manifest) -> str:
    """What the text of the weights is, for people."""
    name, weights = known_weights(made.identity), made.identity.get("weights", "")
    return ", ".join(filter(None, ["SHA-256" * bool(re.fullmatch("[0-9a-f]{64}", weights)), name]))


def _front_matter(bank: Bank, title: str, licence: str) -> str:
    """The metadata that the hub reads: YAML, of which JSON is a part."""
    made = bank.manifest
    values = {
        "license": licence or "unknown",
        "pretty_name": f"{plain(title)}: features of {plain(made.model)}",
        "source_datasets": _SOURCES.get(made.dataset),
        "size_categories": [_SIZES[min(max(len(str(len(bank))) - 3, 0), len(_SIZES) - 1)]],
        "task_categories": ["image-feature-extraction"],
        "tags": ["patchbank", "patch-features", *(["human-object-interaction"] if made.dataset in _TITLES else [])],
        "viewer": False,  # of tables, which a bank is not
    }
    lines = (
        f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items() if value is not None
    )
    return f"---\n{''.join(lines)}---\n\n"


def _inside(bank: Path, root: Path) -> str:
    """The way from the repository's root to the bank; empty if it is the root itself. Elsewhere: the bank's name."""
    if is_remote(bank):
        return hub.inside(str(bank)) if of_hub(bank) else bank.name
    place, outer = bank.resolve(), root.resolve()
    if not place.is_relative_to(outer):
        return place.name
    return "" if place == outer else place.relative_to(outer).as_posix()
