"""Datasets: lists of images. `load_dataset` reads an annotation file once and gives samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from patchbank.budget import without_collection
from patchbank.config import ARCHIVES, WHOLE, Partition
from patchbank.datasets import folder, parquet, tar
from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.samples import Dataset, Sample, make_samples, require_directory
from patchbank.datasets.several import expand, gather
from patchbank.errors import ConfigError, DatasetError
from patchbank.locations import is_place, is_remote, locate

__all__ = [
    "ANNOTATIONS",
    "SPLITS",
    "Dataset",
    "Sample",
    "find_annotations",
    "load_dataset",
    "load_splits",
    "read_file_names",
    "require_images",
]

# The annotated datasets in an EZ-HOI checkout: each split's image directory, in the original scripts' order. V-COCO's
# ``val`` is its test list, on the images of COCO's val2014.
IMAGES = {
    "hicodet": {split: f"hicodet/hico_20160224_det/images/{split}2015" for split in ("train", "test")},
    "vcoco": {split: f"vcoco/mscoco2014/{split}2014" for split in ("train", "val")},
}
# The first existing file counts: the list that the original script reads, else that of UPT's `hicodet` repository.
ANNOTATIONS = {
    "hicodet": {
        "train": ["hicodet/trainval_hico.json", "hicodet/instances_train2015.json"],
        "test": ["hicodet/test_hico.json", "hicodet/instances_test2015.json"],
    },
    "vcoco": {"train": ["vcoco/instances_vcoco_trainval.json"], "val": ["vcoco/instances_vcoco_test.json"]},
}
SPLITS = {name: tuple(images) for name, images in IMAGES.items()}


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
    image_column: str | None = None,
    key_column: str | None = None,
) -> Dataset:
    """The images of one split, in the order of its annotation file, each once.

    Args:
        name: ``hicodet``, ``vcoco``, ``folder``, ``tar`` or ``parquet``.
        root: the EZ-HOI checkout; for ``folder`` the directory of images, searched recursively. For ``tar`` and
            ``parquet`` one or several files, as paths, URLs, or patterns such as ``shards/{000..099}.tar``.
        split: ``train`` or ``test`` (hicodet), ``train`` or ``val`` (vcoco); None for the others.
        images: another image directory than the dataset's own.
        annotations: another annotation file than the dataset's own; its kind is recognised by its structure.
        partition: for ``tar`` and ``parquet``, only this part of the files; the others are not opened. `extract` then
            takes it as the run's partition. For other datasets use `ExtractConfig.partition`.
        prefix: for ``tar`` and ``parquet``, put the file's name, without its extension, before every key.
        image_column: for ``parquet``, the column of the images: bytes, or structs with a field ``bytes``, as Hugging
            Face writes them. None is the only such column, or ``image``.
        key_column: for ``parquet``, the column of the keys, texts or whole numbers; of a struct's field,
            ``image.path``, which is the default where it exists. ``:row`` numbers the rows, and sets `prefix`.

    Raises:
        DatasetError: the annotation file is missing, has another structure, or lists a name that leaves the image
            directory; or `images` is not a directory. The dataset's own directory is not checked: training needs only
            the features. For tars and tables: all are missing, they have no image, or two images have the same key.
            ``Dataset.damaged`` lists files that are damaged or missing beside others, and directories of a folder
            that cannot be listed.
        ConfigError: the dataset, split or column does not exist, or a package is not installed.
    """
    if name in ("folder", *ARCHIVES) and (split or images or annotations):
        given = "root" if name == "folder" else "files"
        raise ConfigError(f"{name} has no splits, annotations or image directory: give only its {given}.")
    if name in ARCHIVES:
        read = tar.read_tar if name == "tar" else parquet.reader(image_column, key_column)
        places = expand([root] if is_place(root) else root)  # type: ignore[arg-type]
        return gather(name, places, read, part=partition, prefix=prefix or key_column == parquet.ROW)
    if partition != WHOLE or prefix or not is_place(root):
        raise ConfigError(f"{name} has one root, no prefix, and no partition: use ExtractConfig(partition=...).")
    if name == "folder":
        return folder.load(locate(root))
    if name not in SPLITS:
        raise ConfigError(f"There is no dataset {name!r}. Choose from: {', '.join([*SPLITS, 'folder', *ARCHIVES])}.")
    if split not in SPLITS[name]:
        wrong = "Name a split of" if split is None else f"There is no split {split!r} of"
        raise ConfigError(f"{wrong} {name}. Choose from: {', '.join(SPLITS[name])}.")
    root = Path(root).expanduser()
    source = find_annotations(name, root, split) if annotations is None else Path(annotations).expanduser()
    directory = root / IMAGES[name][split] if images is None else locate(images)
    listed = make_samples(read_file_names(source), directory, source)
    dataset = Dataset(name, split, directory, listed, source, root)
    if images is not None:
        require_images(dataset)
    return dataset


def require_images(dataset: Dataset) -> None:
    """Raise DatasetError if a dataset's image directory does not exist. An object store has no directories."""
    if is_remote(dataset.images):
        return
    require_directory(
        dataset.images,
        f"the image directory of {dataset.title}",
        "Is --root an EZ-HOI checkout? Else name the directory with --images.",
    )


def find_annotations(name: str, root: Path, split: str) -> Path:
    """The annotation file of a split in an EZ-HOI checkout. Raises DatasetError if there is none."""
    places = [root / place for place in ANNOTATIONS[name][split]]
    if found := next((place for place in places if place.exists()), None):
        return found
    raise DatasetError(
        f"There is no annotation file of {name} {split}: no {' and no '.join(map(str, places))}. "
        "Is --root an EZ-HOI checkout? Else name the file with --annotations."
    )


def load_splits(
    name: str, root: Path, splits: list[str], images: Path | None, annotations: Path | None
) -> Iterator[Dataset]:
    """Several splits of one dataset; all if none is given.

    Raises as `load_dataset`, and ConfigError if `images` or `annotations` would serve two splits.
    """
    chosen = list(dict.fromkeys(splits)) or list(SPLITS[name])
    if len(chosen) != 1 and (images or annotations):
        raise ConfigError("--images and --annotations belong to one split: name it with --split.")
    return (load_dataset(name, root, split, images=images, annotations=annotations) for split in chosen)
