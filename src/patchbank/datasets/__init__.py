"""Datasets: which images there are. `load_dataset` reads annotation files once and gives records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from patchbank.budget import without_collection
from patchbank.datasets import folder, hicodet, vcoco
from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.records import Dataset, Record, require_directory
from patchbank.errors import ConfigError
from patchbank.locations import is_remote, locate

__all__ = [
    "SPLITS",
    "Dataset",
    "Record",
    "find_annotations",
    "load_dataset",
    "load_splits",
    "read_file_names",
    "require_images",
]

# A registry: each annotated dataset's loader, and its splits in the order of the original scripts.
_LOADERS: dict[str, Callable[[Path, str, Path | None, Path | None], Dataset]] = {
    "hicodet": hicodet.load,
    "vcoco": vcoco.load,
}
SPLITS: dict[str, tuple[str, ...]] = {"hicodet": hicodet.SPLITS, "vcoco": vcoco.SPLITS}


@without_collection()
def load_dataset(
    name: str,
    root: str | Path = ".",
    split: str | None = None,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
) -> Dataset:
    """The images of one split, in the order of its annotation file, each listed once.

    Args:
        name: ``hicodet``, ``vcoco`` or ``folder``.
        root: the EZ-HOI checkout; for ``folder`` the directory of images, searched recursively.
        split: ``train`` or ``test`` (hicodet), ``train`` or ``val`` (vcoco); None for ``folder``.
        images: another image directory than the dataset's own.
        annotations: another annotation file than the dataset's own; its kind is recognised by its structure.

    Raises:
        DatasetError: the annotation file is missing, is of another structure, or lists a name that leaves the image
            directory; or `images` is no directory. The dataset's own directory is not looked for: training needs only
            the features.
        ConfigError: there is no such dataset or split.
    """
    if name == "folder":
        if split or images or annotations:
            raise ConfigError("A folder has no splits, annotations or image directory: give only its root.")
        return folder.load(locate(root))
    if name not in _LOADERS:
        raise ConfigError(f"There is no dataset {name!r}. Choose from: {', '.join([*_LOADERS, 'folder'])}.")
    if split not in SPLITS[name]:
        wrong = "Name a split of" if split is None else f"There is no split {split!r} of"
        raise ConfigError(f"{wrong} {name}. Choose from: {', '.join(SPLITS[name])}.")
    dataset = _LOADERS[name](
        Path(root).expanduser(),
        split,
        None if images is None else locate(images),
        None if annotations is None else Path(annotations).expanduser(),
    )
    if images is not None:
        require_images(dataset)
    return dataset


def require_images(dataset: Dataset) -> None:
    """Raise DatasetError where a dataset's image directory is not there. An object store has no directories."""
    if is_remote(dataset.images):
        return
    require_directory(
        dataset.images,
        f"the image directory of {dataset.title}",
        "Is --root an EZ-HOI checkout? Else name the directory with --images.",
    )


def find_annotations(name: str, root: Path, split: str) -> Path:
    """The annotation file of a split in an EZ-HOI checkout. Raises DatasetError where the data set needs one."""
    return {"hicodet": hicodet.find_annotations, "vcoco": vcoco.find_annotations}[name](root, split)


def load_splits(
    name: str, root: Path, splits: list[str], images: Path | None, annotations: Path | None
) -> Iterator[Dataset]:
    """Several splits of one dataset; none given means all.

    Raises what `load_dataset` does, and ConfigError where `images` or `annotations` would serve two splits.
    """
    chosen = list(dict.fromkeys(splits)) or list(SPLITS[name])
    if len(chosen) != 1 and (images or annotations):
        raise ConfigError("--images and --annotations stand for one split: say which with --split.")
    return (load_dataset(name, root, split, images=images, annotations=annotations) for split in chosen)
