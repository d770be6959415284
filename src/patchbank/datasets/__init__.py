"""Datasets: which images there are. `load_dataset` reads annotation files once and gives samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from patchbank.budget import without_collection
from patchbank.config import ARCHIVES, WHOLE, Partition
from patchbank.datasets import folder, hicodet, parquet, tar, vcoco
from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.samples import Dataset, Sample, require_directory
from patchbank.errors import ConfigError
from patchbank.locations import is_place, is_remote, locate

__all__ = [
    "SPLITS",
    "Dataset",
    "Sample",
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
    root: str | Path | Sequence[str | Path] = ".",
    split: str | None = None,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    partition: Partition = WHOLE,
    prefix: bool = False,
    image_column: str = "image",
    key_column: str | None = None,
) -> Dataset:
    """The images of one split, in the order of its annotation file, each listed once.

    Args:
        name: ``hicodet``, ``vcoco``, ``folder``, ``tar`` or ``parquet``.
        root: the EZ-HOI checkout; for ``folder`` the directory of images, searched recursively. For ``tar`` and
            ``parquet`` one or several files, as paths, URLs, or patterns such as ``shards/{000..099}.tar``.
        split: ``train`` or ``test`` (hicodet), ``train`` or ``val`` (vcoco); None for the others.
        images: another image directory than the dataset's own.
        annotations: another annotation file than the dataset's own; its kind is recognised by its structure.
        partition: for ``tar`` and ``parquet``, only this part of the files; the others are not opened. `extract` takes
            it for the run's partition. Other data sets are parted by `ExtractConfig.partition` alone.
        prefix: for ``tar`` and ``parquet``, put the file's name, without its extension, before every key.
        image_column, key_column: for ``parquet``, the columns that hold the images' bytes and their keys.

    Raises:
        DatasetError: the annotation file is missing, is of another structure, or lists a name that leaves the image
            directory; or `images` is no directory. The dataset's own directory is not looked for: training needs only
            the features. Of tars and tables: none is there, there is no image in them, or two have the same key. One
            that is damaged or missing beside others is in ``damaged`` instead.
        ConfigError: there is no such dataset, split or column, or a package is not installed.
    """
    if name in ARCHIVES:
        if split or images or annotations:
            raise ConfigError(f"{name} has no splits, annotations or image directory: give only its files.")
        files = [root] if is_place(root) else list(root)  # type: ignore[arg-type]
        if name == "tar":
            return tar.load(files, part=partition, prefix=prefix)
        return parquet.load(files, image_column, key_column, part=partition, prefix=prefix)
    if partition != WHOLE or prefix or not is_place(root):
        raise ConfigError(f"{name} has one root, no prefix, and is parted by the run: ExtractConfig(partition=...).")
    if name == "folder":
        if split or images or annotations:
            raise ConfigError("A folder has no splits, annotations or image directory: give only its root.")
        return folder.load(locate(root))
    if name not in _LOADERS:
        raise ConfigError(f"There is no dataset {name!r}. Choose from: {', '.join([*_LOADERS, 'folder', *ARCHIVES])}.")
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
