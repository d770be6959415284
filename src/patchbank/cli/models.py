"""``patchbank models [PATTERN]``: which models there are, by the names that ``--model`` takes."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from patchbank import encoders
from patchbank.cli import options
from patchbank.cli.console import say, say_prose, show_json, stdout
from patchbank.cli.progress import busy
from patchbank.config import ExtractConfig
from patchbank.errors import ConfigError

_HEAD = f"{'input':>9}  {'grid':>7}  {'dim':>5}  {'prefix':>6}  text"
_HOW = {
    "timm": "patchbank models 'timm/*dinov3*'",
    "open_clip": "patchbank models 'open_clip/ViT-B-16*'",
    "transformers": "patchbank models transformers/ORG/NAME, of the Hugging Face hub",
}


@options.takes()
def models(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="A name, or several with * and ?.", show_default=False)
    ] = None,
    *,
    json: bool = options.JSON,
) -> None:
    """List models: input, grid, width of a patch token, tokens before the patches, whether texts are encoded.

    Without a pattern: OpenAI's, and the families of others. A pattern is matched with the names of all of them.

    patchbank models 'timm/*dinov3*'
    """
    with busy("looking up names"):
        names, missing = (encoders.names(), []) if pattern is None else encoders.matching(pattern)
        families = [_family(name) for name in encoders.FAMILIES] if pattern is None else []
    found: list[dict[str, Any]] = []
    width = max(map(len, names))
    for name in names:
        if (made := encoders.describe(name)) is None:
            continue
        if not json:
            if not found:
                say(f"{'model':{width}}  {_HEAD}", "bold")
            h, w = made.size
            rows, columns = made.grid
            facts = f"{f'{h}x{w}':>9}  {f'{rows}x{columns}':>7}  {made.dim:5}  {made.prefix:6}"
            say(f"{name:{width}}  {facts}{'  yes' * made.text}")
            stdout.file.flush()  # the next one may take a while
        found.append(made._asdict())
    if not found:
        if len(names) == 1:
            encoders.random(ExtractConfig(model=names[0]))  # raises the reason
        raise ConfigError(f"{pattern}: there is no such vision transformer. `patchbank models` lists the families.")
    if json:
        more = {"families": families, "not_searched": missing}
        show_json({"models": found, **{name: value for name, value in more.items() if value}})
        return
    for family in missing:
        say_prose(f"\n{encoders.not_searched(family)}")
    for each in families:
        state = each["error"] if "error" in each else f"{each['names']:,} known by name. {each['list']}"
        say_prose(f"\n{each['family']}/: {state}")


def _family(name: str) -> dict[str, Any]:
    """The version of its package, how many models it knows by name and how to list them; or that it is missing."""
    try:
        count = len(encoders.known(name))
    except ConfigError as error:
        return {"family": name, "error": str(error)}
    version = getattr(sys.modules.get(name), "__version__", None)
    return {"family": name, "version": version, "names": count, "list": _HOW.get(name, f"patchbank models '{name}/*'")}
