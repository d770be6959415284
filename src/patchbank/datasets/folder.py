"""Any directory of images, searched recursively."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from patchbank.datasets.samples import Dataset, make_samples, require_directory
from patchbank.errors import DatasetError
from patchbank.images import image_extensions, open_image
from patchbank.locations import is_remote, remotely


def load(root: Path) -> Dataset:
    """The images under `root`, ordered by path, without hidden files and directories.

    Files with an image's extension are listed even if they are damaged, so that their failure shows; other local files
    are listed if their first bytes are an image's. Raises DatasetError if there is no image.
    """
    if is_remote(root):
        keys = sorted(filter(has_image_name, _objects(root)))  # by name alone: opening each would be a request
    else:
        require_directory(root, "a directory of images", "Name an existing one.")
        keys = sorted(key for key in _files(root) if has_image_name(key) or _is_image(root / key))
    if not keys:
        raise DatasetError(f"There are no images under {root}.")
    return Dataset("folder", None, root, make_samples(keys, root, root))


def has_image_name(key: str) -> bool:
    """Whether a name has an extension of images that are read."""
    return os.path.splitext(key)[1].lower() in image_extensions()  # noqa: PTH122


def is_hidden(key: str) -> bool:
    """Whether a file or one of its directories is hidden. ``..`` is not: it is an error, and not to be skipped."""
    return any(part.startswith(".") and part not in (".", "..") for part in key.split("/"))


def _files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of all regular files. Symbolic links are followed; no directory is entered twice."""
    entered: set[str] = set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in entered:
            subdirectories.clear()
            continue
        entered.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in names:
            path = Path(directory, name)
            if not name.startswith(".") and (path.is_file() or path.is_symlink()):
                yield path.relative_to(root).as_posix()


def _objects(root: Path) -> list[str]:
    """Names below an object store's prefix. Raises DatasetError if they cannot be listed."""
    try:
        found: tuple[str, list[str]] = remotely(root, lambda files, path: (path, files.find(path)))
    except OSError as error:
        raise DatasetError(f"{root} cannot be listed: {error.strerror or error}.") from error
    prefix = found[0].strip("/") + "/"
    names = [name.strip("/").removeprefix(prefix) for name in found[1]]
    return [name for name in names if not is_hidden(name)]


def _is_image(path: Path) -> bool:
    """Whether the file's header is an image's. Decodes nothing."""
    try:
        if not path.is_file():  # a link to a pipe would wait for a writer for ever
            return False
        with open_image(path):
            return True
    except OSError:
        return False
