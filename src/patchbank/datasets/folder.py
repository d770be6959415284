"""Any directory of images, searched recursively."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePath

from patchbank.datasets.samples import NOT_PLAIN, Dataset, make_samples, require_directory
from patchbank.errors import DatasetError
from patchbank.files import is_plain
from patchbank.images import image_extensions, open_image
from patchbank.locations import is_remote, remotely

_KINDS = 5  # of files that are passed over; the others are counted


def load(root: Path) -> Dataset:
    """The images under `root`, ordered by path, without hidden files and directories.

    Files with an image's extension are listed even if they are damaged, so that their failure shows; other local files
    are listed if their first bytes are an image's. Directories that cannot be listed are `damaged`, and other files
    `passed_over`. Raises DatasetError if there is no image, or `root` itself cannot be listed.
    """
    damaged: dict[str, str] = {}
    if is_remote(root):
        found = _objects(root)
        damaged |= {f"{root}/{key}": NOT_PLAIN for key in found if has_image_name(key) and not is_plain(key)}
        keys = sorted(key for key in found if has_image_name(key) and is_plain(key))  # opening each is a request
    else:
        require_directory(root, "a directory of images", "Name an existing one.")
        found = list(_files(root, damaged))
        keys = sorted(key for key in found if has_image_name(key) or _is_image(root / key))
    if str(root) in damaged:
        raise DatasetError(f"{root} {damaged[str(root)]}.")
    images = set(keys)
    passed_over = Counter(
        PurePath(key).suffix.lower() or "no extension" for key in found if key not in images and is_plain(key)
    )
    dataset = Dataset("folder", None, root, make_samples(keys, root, root), damaged=damaged, passed_over=passed_over)
    if not keys:
        reasons = "".join(f"\n  {place}: {reason}" for place, reason in list(damaged.items())[:5])
        raise DatasetError(f"There are no images under {root}. {passed_over_text(dataset)}".rstrip() + reasons)
    return dataset


def passed_over_text(dataset: Dataset) -> str:
    """How many files of a folder are no images that are read, by kind; empty if there are none."""
    if not (kinds := Counter(dataset.passed_over)):
        return ""
    named = [f"{kind} {count:,}" for kind, count in kinds.most_common(_KINDS)]
    others = [f"others {rest:,}"] if (rest := kinds.total() - sum(dict(kinds.most_common(_KINDS)).values())) else []
    heif = " Pillow reads .heic with pillow-heif: pip install pillow-heif." if kinds.keys() & {".heic", ".heif"} else ""
    one = kinds.total() == 1
    text = f"{kinds.total():,} {'file is not read as an image' if one else 'files are not read as images'}"
    return f"{text}: {', '.join(named + others)}.{heif}"


def has_image_name(key: str) -> bool:
    """Whether a name has an extension of images that are read."""
    return os.path.splitext(key)[1].lower() in image_extensions()  # noqa: PTH122


def is_hidden(key: str) -> bool:
    """Whether a file or one of its directories is hidden. ``..`` is not: it is an error, and not to be skipped."""
    return any(part.startswith(".") and part not in (".", "..") for part in key.split("/"))


def _files(root: Path, damaged: dict[str, str]) -> Iterator[str]:
    """Relative POSIX paths of all regular files; the reasons of directories that cannot be listed go to `damaged`.

    Symbolic links are followed after all real directories, so that a link takes no other's keys; no directory is
    entered twice.
    """

    def failed(error: OSError) -> None:
        damaged[str(error.filename)] = f"cannot be listed: {error.strerror or error}"

    entered: set[str] = set()
    tops = [os.fspath(root)]
    while tops:
        links: list[str] = []
        for directory, subdirectories, names in chain.from_iterable(os.walk(top, onerror=failed) for top in tops):
            real = os.path.realpath(directory)
            if real in entered:
                subdirectories.clear()
                continue
            entered.add(real)
            subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
            paths = [os.path.join(directory, name) for name in subdirectories]  # noqa: PTH118
            links += filter(os.path.islink, paths)
            for name in names:
                path = Path(directory, name)
                try:  # not `is_file`, which is False of every error since Python 3.14
                    kind = stat.S_IFMT(path.lstat().st_mode)
                except OSError as error:  # of a directory that may be listed, but not entered
                    damaged[directory] = f"cannot be read: {error.strerror or error}"
                    continue
                if not name.startswith(".") and kind in (stat.S_IFREG, stat.S_IFLNK):
                    yield path.relative_to(root).as_posix()
        tops = links


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
        with open_image(path):
            return True
    except OSError:
        return False
