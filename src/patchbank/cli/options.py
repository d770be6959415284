"""Typer options made from dataclass fields: `ExtractConfig`, and what else several commands share."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from patchbank import encoders
from patchbank.cli.completion import keys_beginning_with
from patchbank.config import ExtractConfig, Option, checked, choices, flag, option
from patchbank.errors import ConfigError
from patchbank.locations import locate

DEFAULTS = ExtractConfig()

# Fields of ExtractConfig: all but the model (RunOptions.model takes several), and those that describe a bank.
CONFIG = tuple(each.name for each in fields(ExtractConfig) if each.name not in ("model", "crop"))
REGIONS = tuple(
    each.name for each in fields(ExtractConfig) if each.name not in ("model", "layout", "resize", "pool_grid")
)
BANK = CONFIG[: CONFIG.index("engine")]
EZHOI = {  # what is said otherwise of EZ-HOI's datasets
    "model": {"default_text": " and ".join(encoders.EZHOI_MODELS)},
    "layout": {"default_text": "ezhoi; shards for an object store"},
}

Bank = Annotated[Path, typer.Argument(parser=locate, metavar="BANK", help="Bank directory or URL.")]
Key = Annotated[
    str, typer.Argument(metavar="KEY", help="The image's key: its file name.", autocompletion=keys_beginning_with)
]
MODELS = tuple(encoders.names())
_FAMILIES = tuple(f"{family}/" for family in encoders.FAMILIES if find_spec(family))  # installed, and not imported
MODEL_VALUES = (*MODELS, *_FAMILIES)
MODEL_HELP = f"{', '.join(MODELS)}, or one of `patchbank models`"
JSON = option(False, "Print the result as JSON.")
OUTPUT = option(
    None,
    "Stored output to show, a grid of patches; `patchbank info` lists them.",
    metavar="NAME",
    default_text="patch_tokens, else the first",
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a run beside the configuration of its banks."""

    model: list[str] | None = option(None, f"{MODEL_HELP}; repeatable.", "Model", values=MODEL_VALUES)
    dry_run: bool = option(False, "Print what would be done, and stop.")
    report: bool = option(False, "Write a bank's page beside it too, as `patchbank report` does.")
    json: bool = JSON

    def models(self, config: ExtractConfig, default: Sequence[str]) -> list[str]:
        """The models' names, given or default. Raises ConfigError on unknown ones, or several with --weights."""
        names = list(dict.fromkeys(map(encoders.model_name, self.model or default)))
        if config.weights is not None and len(names) != 1:
            raise ConfigError("--weights is the checkpoint of one model: name it with one --model.")
        return names


def takes(
    defaults: Mapping[str, Any] | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    **chosen: Sequence[str],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command's options from its parameters.

    A parameter with an `option(...)` as its default becomes that option. One annotated with a dataclass of options
    becomes all of these, and the command gets an instance of the dataclass. All values are checked.

    Args:
        defaults: of fields, instead of the dataclass's.
        details: of fields, attributes of `Option` instead of the dataclass's.
        chosen: parameter -> the names of the fields that the command takes; all if absent.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        kinds: dict[str, Any] = {name: each.annotation for name, each in signature.parameters.items()}
        stated: dict[str, list[Field[Any]]] = {}
        parameters: list[inspect.Parameter] = []
        for name, each in signature.parameters.items():
            if is_dataclass(kind := kinds[name]):
                names, types = chosen.get(name), get_type_hints(kind)
                stated[name] = [
                    _changed(
                        one,
                        (details or {}).get(one.name, {}),
                        type=types[one.name],
                        default=(defaults or {}).get(one.name, one.default),
                    )
                    for one in fields(kind)
                    if names is None or one.name in names
                ]
            elif isinstance(each.default, Field):
                stated[name] = [_changed(each.default, {}, name=name, type=each.annotation)]
            parameters += [_parameter(one) for one in stated[name]] if name in stated else [each]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            for name, options in stated.items():
                given = {each.name: _value(each, values.pop(each.name)) for each in options}
                values[name] = kinds[name](**given) if is_dataclass(kinds[name]) else given[name]
            command(**values)

        keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        wrapper.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in keywords}
        return wrapper

    return decorate


def without_rounding(names: Sequence[str]) -> list[str]:
    """The names of fields less that of rounding: the weights for EZ-HOI's datasets always are."""
    return [name for name in names if name != "round_weights"]


def like(name: str, default: Any, default_text: str | None = None, **details: Any) -> Any:
    """The `option(...)` of a field of `ExtractConfig`, with another default."""
    stated = Option.of(ExtractConfig.__dataclass_fields__[name])
    return field(default=default, metadata={"option": replace(stated, default_text=default_text, **details)})


def _changed(each: Field[Any], details: Mapping[str, Any], **attributes: Any) -> Field[Any]:
    """A copy of a field, with other `details` of its option. A new default replaces the old one's text."""
    changed = copy.copy(each)
    if attributes.get("default", each.default) != each.default:
        details = {"default_text": None, **details}
    attributes["metadata"] = {"option": replace(Option.of(each), **details)}
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed


def _value(each: Field[Any], given: Any) -> Any:
    return each.default if given is None else checked(each, given)


def _parameter(each: Field[Any]) -> inspect.Parameter:
    """The command's parameter, from which typer makes an option."""
    stated, allowed, kind, default = Option.of(each), choices(each.type), each.type, each.default
    values = list(allowed if stated.values is None else stated.values)
    shown = stated.default_text
    if shown is None:
        shown = "" if default is None or default is False or default is ... else str(default)
    if allowed or stated.parse:  # text until checked
        kind, default = str | None, default if allowed or default is ... else None
    if get_args(kind)[1:] == (...,):
        kind, default = list[str] | None, None
    number = {int, float} & {kind, *get_args(kind)}
    info = typer.Option(
        flag(each.name),
        *([stated.short] if stated.short else []),
        metavar="" if kind is bool else stated.metavar or ("N" if number else each.name.upper()),
        help=stated.help,
        show_default=(shown(each.default) if callable(shown) else shown) or False,
        rich_help_panel=stated.panel,
        autocompletion=(lambda: values) if values else None,
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(each.name, keyword, default=default, annotation=Annotated[kind, info])
