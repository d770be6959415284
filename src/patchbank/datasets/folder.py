"""Any directory of images, searched recursively: every file that Pillow opens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from patchbank.datasets.records import Dataset, make_records, require_directory
from patchbank.errors import DatasetError

# Pillow identifies these but cannot decode them by itself: films, plots and scientific containers.
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def load(root: Path) -> Dataset:
    """The images under `root`, ordered by their path. Hidden files and directories are passed over.

    A file with an image's extension is listed even if it turns out to be damaged, so that its failure shows; any
    other file is listed if Pillow recognises it by its first bytes. Raises DatasetError where there is none.
    """
    require_directory(root, "a directory of images", "Name one that is there.")
    Image.init()
    extensions = {
        extension
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _STUBS
    }
    keys = sorted(
        key
        for key in _files(root)
        if (os.path.splitext(key)[1].lower() in extensions or _is_image(root / key))  # noqa: PTH122
    )
    if not keys:
        raise DatasetError(f"There are no images under {root}.")
    return Dataset("folder", None, root, make_records(keys, root, root))


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


def _is_image(path: Path) -> bool:
    """Whether Pillow recognises the file by its header. Reads a few bytes, decodes nothing."""
    try:
        with Image.open(path) as image:
            return image.format not in _STUBS
    except Exception:  # whatever a plugin makes of a foreign file, it is not an image
        return False
