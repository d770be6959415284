"""Where things lie: a local path, or an object store's URL. Object stores are fsspec's, through universal_pathlib.

A remote location is a `upath.UPath`, which has `pathlib.Path`'s methods, and is annotated as one; `is_remote` tells the
two apart. Credentials are those that the store's own library finds (environment, configuration files, the machine's
role): none are taken in a URL, so that none can end up in a log or a bank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeGuard, cast
from urllib.parse import unquote

from patchbank.errors import ConfigError

INSTALL = 'pip install "patchbank[remote]"'
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_QUERY = re.compile(r"\?[^/?]*=")


def locate(text: str | PurePath) -> Path:
    """A path, or a URL such as ``s3://bucket/bank``, ``gs://...``, ``memory://...``; ``file://`` is a path.

    Raises ConfigError where there is no such store, its library is not installed, or the URL could hold credentials.
    """
    if not isinstance(text, str):
        return cast(Path, text).expanduser() if isinstance(text, PurePath) else text
    if (match := _URL.fullmatch(text)) is None:
        return Path(text).expanduser()
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return Path(unquote(rest) if rest.startswith("/") else rest).expanduser()
    if "@" in rest.partition("/")[0]:
        raise ConfigError(
            f"A {scheme}:// URL must hold no credentials: they would be printed and stored. Give them as the store's "
            "own tools take them: environment variables, a configuration file, or the machine's role."
        )
    if _QUERY.search(rest):
        raise ConfigError(
            f"A {scheme}:// URL must have no query (?name=value): signatures stand there, and would be printed and "
            "stored. Give credentials as the store's own tools take them."
        )
    try:
        from fsspec import get_filesystem_class
        from upath import UPath
    except ImportError as error:
        raise ConfigError(f"{text} needs further packages: {INSTALL} (there is no {error.name}).") from None
    try:
        get_filesystem_class(scheme)
    except ValueError:
        raise ConfigError(f"{text}: there is no store {scheme}://. Take s3://, gs://, or a path.") from None
    except ImportError:
        raise ConfigError(f"{text} needs the library of {scheme}://: {INSTALL}, or what fsspec names for it.") from None
    return cast(Path, UPath(text.rstrip("/")))


def is_place(value: object) -> TypeGuard[str | Path]:
    """Whether it is one path or URL, and not several."""
    return isinstance(value, str | PurePath) or hasattr(value, "joinpath")


def is_remote(location: Path) -> bool:
    """Whether it is a store's URL, and not a path."""
    return not isinstance(location, PurePath)


def filesystem(location: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote location, and the location's path in it.

    Made in this process: a forked one must not use its parent's connections. fsspec keeps one of each kind a process.
    What it lists it does not remember: others write to the same place.
    """
    from fsspec.core import url_to_fs

    return cast("tuple[Any, str]", url_to_fs(str(location), use_listings_cache=False))


@contextmanager
def remote_errors(location: Path) -> Iterator[None]:
    """Whatever a store's library raises becomes an OSError that names the location; its first line says why."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(location)
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{location}: {reason}") from error


def remotely(location: Path, action: Callable[[Any, str], Any]) -> Any:
    """What an action gives that is told the file system and the path. Raises OSError where the store refuses."""
    with remote_errors(location):
        return action(*filesystem(location))
