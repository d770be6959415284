"""Any directory of images, searched recursively: every file that Pillow opens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from patchbank.datasets.samples import Dataset, make_records, require_directory
from patchbank.errors import DatasetError
from patchbank.locations import is_remote, remotely

# Pillow identifies these but cannot decode them by itself: films, plots and scientific containers.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def load(root: Path) -> Dataset:
    """The images under `root`, ordered by their path. Hidden files and directories are passed over.

    A file with an image's extension is listed even if it turns out to be damaged, so that its failure shows; any
    other local file is listed if Pillow recognises it by its first bytes. Raises DatasetError where there is none.
    """
    if is_remote(root):
        keys = sorted(filter(has_image_name, _objects(root)))  # by name alone: a look into each would be a request
    else:
        require_directory(root, "a directory of images", "Name one that is there.")
        keys = sorted(key for key in _files(root) if has_image_name(key) or _is_image(root / key))
    if not keys:
        raise DatasetError(f"There are no images under {root}.")
    return Dataset("folder", None, root, make_records(keys, root, root))


@cache
def _extensions() -> frozenset[str]:
    Image.init()
    registered = Image.registered_extensions().items()
    return frozenset(extension for extension, name in registered if name in Image.OPEN and name not in _STUBS)


def has_image_name(key: str) -> bool:
    """Whether a name has the extension of images that Pillow decodes."""
    return os.path.splitext(key)[1].lower() in _extensions()  # noqa: PTH122


def is_hidden(key: str) -> bool:
    """Whether a file, or a directory it lies in, is hidden. ``..`` is not: it is refused, not passed over."""
    return any(part.startswith(".") and part not in (".", "..") for part in key.split("/"))


def _files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of all regular files; symbolic links are followed, but no directory is entered twice."""
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
    """Names below an object store's prefix. Raises DatasetError where they cannot be listed."""
    try:
        found: tuple[str, list[str]] = remotely(root, lambda files, path: (path, files.find(path)))
    except OSError as error:
        raise DatasetError(f"{root} cannot be listed: {error.strerror or error}.") from error
    prefix = found[0].strip("/") + "/"
    names = [name.strip("/").removeprefix(prefix) for name in found[1]]
    return [name for name in names if not is_hidden(name)]


def _is_image(path: Path) -> bool:
    """Whether Pillow recognises the file by its header. Reads a few bytes, decodes nothing."""
    try:
        with Image.open(path) as image:
            return image.format not in _STUBS
    except Exception:  # whatever a plugin makes of a foreign file, it is not an image
        return False
