"""Local paths, and URLs of object stores. fsspec accesses the stores, through universal_pathlib.

A remote location is a `upath.UPath`, which has `pathlib.Path`'s methods and is annotated as one; `is_remote`
distinguishes them. The store's own library finds the credentials (environment, configuration files, the machine's
role). A URL must have none, so that none can get into a log or a bank.

A repository of the Hugging Face hub (``hf://datasets/ORG/NAME/BANK``) is read-only, at the commit that `locate` finds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeGuard, cast
from urllib.parse import unquote

from patchbank import hub
from patchbank.errors import ConfigError, first_line, install
from patchbank.files import open_regular

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", hub.SCHEME: "hf"}  # scheme -> the extra with its library
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_QUERY = re.compile(r"\?[^/?]*=")
_ACCOUNT = re.compile(r"[a-z0-9$-]+@[a-z0-9.-]+")  # a container and its account, in Azure's URLs
_AZURE = {"abfs", "abfss", "az"}


def locate(text: str | PurePath) -> Path:
    """A path, or a URL such as ``s3://bucket/bank``, ``gs://...``, ``memory://...``; ``file://`` is a path.

    ``hf://`` is asked for the commit of its branch or tag, which the location then names.

    Raises ConfigError if the store is unknown, its library is not installed, the URL may contain credentials, or the
    hub does not give the commit.
    """
    if not isinstance(text, str) and not of_hub(text):
        return cast(Path, text).expanduser() if isinstance(text, PurePath) else text
    if not (text := str(text)):
        raise ConfigError("A path is empty. Was a variable of the shell not set?")
    if "::" in text and "://" in text:
        raise ConfigError("A URL must not chain file systems (::): what follows may contain credentials.")
    if (match := _URL.fullmatch(text)) is None:
        return Path(text).expanduser()
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return Path(unquote(rest) if rest.startswith("/") else rest).expanduser()
    if not rest.strip("/"):
        raise ConfigError(f"{text} names no bucket: {scheme}://BUCKET/DIRECTORY.")
    first = rest.partition("/")[0]
    if "@" in first and not (scheme in _AZURE and _ACCOUNT.fullmatch(first)):
        raise ConfigError(
            f"A {scheme}:// URL must contain no credentials: they would be printed and stored. Use environment "
            "variables, a configuration file, or the machine's role, as for the store's own tools."
        )
    if _QUERY.search(rest):
        raise ConfigError(
            f"A {scheme}:// URL must have no query (?name=value): it may contain a signature, which would be printed "
            "and stored. Give credentials as for the store's own tools."
        )
    try:
        from fsspec import get_filesystem_class

        get_filesystem_class(scheme)
        from upath import UPath
    except ValueError:
        raise ConfigError(f"{text}: {scheme}:// is unknown. Use s3://, gs://, hf://, or a path.") from None
    except ImportError as error:
        how = f"pip install universal-pathlib, and the store's fsspec package ({error})"
        if scheme in _EXTRAS:
            how = install(_EXTRAS[scheme])
        raise ConfigError(f"{text} needs further packages: {how}") from None
    url = f"{scheme}://{rest}".rstrip("/")
    return cast(Path, UPath(hub.pinned(url) if scheme == hub.SCHEME else url))


def locate_new(text: str | PurePath) -> Path:
    """The same, of what is to be written. Raises ConfigError for the hub too, which is read-only."""
    if of_hub(text):
        raise ConfigError(
            f"{text} cannot be written to: write to a directory, and upload it with `hf upload ORG/NAME DIRECTORY "
            "--repo-type dataset`, or `hf upload-large-folder` of huggingface_hub 1 (docs/guides/sharing.md)."
        )
    return locate(text)


def of_hub(location: str | PurePath) -> bool:
    """Whether it is a place on the Hugging Face hub."""
    return str(location)[: len(hub.SCHEME) + 3].lower() == f"{hub.SCHEME}://"


def is_place(value: object) -> TypeGuard[str | Path]:
    """Whether the value is one path or URL, and not several."""
    return isinstance(value, str | PurePath) or hasattr(value, "joinpath")


def is_remote(location: Path) -> bool:
    """Whether the location is a store's URL, and not a path."""
    return not isinstance(location, PurePath)


def filesystem(location: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote location, and the location's path in it.

    fsspec keeps one of each kind for each process: a forked one must not use its parent's connections. Listings are not
    cached, since other processes write to the same place.
    """
    from fsspec import get_filesystem_class

    # Not fsspec's url_to_fs: to it, the name a.jpg::file.jpg is a chain of two file systems.
    text = str(location)
    kind: Any = get_filesystem_class(text.partition("://")[0])
    return kind(**kind._get_kwargs_from_urls(text), use_listings_cache=False), kind._strip_protocol(text)


@contextmanager
def remote_errors(location: Path) -> Iterator[None]:
    """Turn any error of a store's library into an OSError with the location and the error's first line.

    Of a local path, errors stay as they are.
    """
    if not is_remote(location):
        yield
        return
    if of_hub(location):
        try:
            with hub.asking():
                yield
        except Exception as error:
            raise hub.as_os_error(error, str(location)) from error
        return
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(location)
        raise
    except Exception as error:
        raise OSError(f"{location}: {first_line(error)}") from error


@contextmanager
def open_file(location: Path, block: int) -> Iterator[Any]:
    """A file, open for reading and seeking. Raises OSError; of a pipe or a device too.

    Args:
        block: bytes that one request to a store brings.
    """
    if not is_remote(location):
        with open_regular(location) as file:
            yield file
        return
    with remote_errors(location):
        files, path = filesystem(location)
        file = files.open(path, "rb", block_size=block)
    with file:
        yield file


def remotely(location: Path, action: Callable[[Any, str], Any]) -> Any:
    """The result of an action with the location's file system and path. Raises OSError on any error of the store."""
    with remote_errors(location):
        return action(*filesystem(location))
