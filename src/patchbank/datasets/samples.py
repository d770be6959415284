"""A sample is one image to encode; a dataset is a named list of samples, with their annotations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, repeat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from patchbank.config import WHOLE, Partition
from patchbank.datasets.sources import Directory, Source
from patchbank.errors import DatasetError
from patchbank.files import all_plain, is_plain
from patchbank.notebook import facts, failed, shown
from patchbank.regions import Region, image_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patchbank.datasets.hoi import HOIAnnotations, HOIClasses, HOITarget

NOT_PLAIN = "its name is not a plain relative path"
RARE = 10  # HICO-DET calls a class with fewer annotated pairs in its training split rare


class Sample(NamedTuple):
    """One image to encode, or one region of it.

    Attributes:
        key: its ``file_name`` as the annotations give it: a relative POSIX path with its extension. A region's is
            followed by its name: ``a.jpg#union-0``.
        source: what it lies in.
        position: its place in the dataset, which decides its place in a batch and its shard. Positions may have gaps.
        place: its place in a source that is a file: (offset, size) in a tar, (row group, row) in a table.
        region: the part of the image; None for an image.
    """

    key: str
    source: Source
    position: int
    place: tuple[int, int] | None = None
    region: Region | None = None

    @property
    def image(self) -> str:
        """The image's key."""
        return self.key if self.region is None else image_of(self.key)

    @property
    def path(self) -> Path:
        """The image's path, for messages and in a directory. Made on each access: a million take seconds."""
        return self.source.location / self.image

    def exists(self) -> bool:
        """Whether the image exists."""
        return self.source.exists(self)


class Decoded(NamedTuple):
    """One sample, ready for the encoder.

    Attributes:
        sample: what it is.
        pixels: (h, w, 3) uint8 RGB.
        size: (width, height) of the original image, in pixels.
    """

    sample: Sample
    pixels: NDArray[np.uint8]
    size: tuple[int, int]


class Failure(NamedTuple):
    """One image that cannot be extracted, and why."""

    key: str
    reason: str


@dataclass(frozen=True, repr=False)
class Dataset(Sequence[Sample]):
    """The images of one split, and their annotations: a sequence of samples. The pairs are read on first use.

    Attributes:
        name: ``hicodet``, ``vcoco``, ``folder``, ``tar`` or ``parquet``; ``boxes`` of a detector's.
        split: the split's name; None without splits.
        images: the directory that keys are relative to; for tars and tables, the directory of the first file.
        samples: every listed image once, with or without annotated pairs.
        annotations: the file that lists the images; None for a folder, tars and tables.
        root: the EZ-HOI checkout, which may hold ``checkpoints/``; None for a folder, tars and tables.
        chosen: the pairs, if they were read before or filtered.
        part: the part of its files that was loaded; the others were not opened.
        damaged: tars, tables and directories -> why some or all of their images are not in `samples`.
        passed_over: extensions of a folder's other files -> how many there are.
        notes: what else a user should know of it, one sentence each.
    """

    name: str
    split: str | None
    images: Path
    samples: Sequence[Sample]
    annotations: Path | None = None
    root: Path | None = None
    chosen: HOIAnnotations | None = None
    part: Partition = WHOLE
    damaged: Mapping[str, str] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Dataset: ...

    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        """A sample; of a slice, the dataset of these samples."""
        return self.of(self.samples[index]) if isinstance(index, slice) else self.samples[index]

    def __contains__(self, item: object) -> bool:
        """Whether a sample, or the one of a key, is in it."""
        return item in self._keys if isinstance(item, str) else item in self.samples

    def __repr__(self) -> str:
        return f"<Dataset {self.title}: {len(self):,} images in {self.images}>"

    def _repr_html_(self) -> str:
        values = {
            "images": f"{len(self):,}, such as {self.samples[0].key}" if self.samples else "none",
            "directory": self.images,
            "annotations": self.annotations,
            "damaged": self.damaged and failed(self.damaged),
            "notes": list(self.notes),
        }
        return shown(f"Dataset {self.title}", facts(values))

    @property
    def title(self) -> str:
        """``hicodet train``, or ``folder``."""
        return f"{self.name} {self.split}" if self.split else self.name

    @property
    def regions(self) -> bool:
        """Whether its samples are regions of images."""
        return bool(self.samples) and self.samples[0].region is not None

    @property
    def has_pairs(self) -> bool:
        """Whether there are annotations."""
        return self.chosen is not None or self.annotations is not None

    @cached_property
    def pairs(self) -> HOIAnnotations:
        """All annotated pairs. Raises DatasetError without annotations, or if an entry is malformed."""
        from patchbank.datasets.hoi_files import read_hoi

        if self.chosen is not None:
            return self.chosen
        if self.annotations is None:
            name = "a folder" if self.name == "folder" else self.name
            raise DatasetError(
                f"{self.images} was loaded as {name}, without annotations. Load it as hicodet or vcoco, with "
                "images=... and annotations=...."
            )
        return read_hoi(self.annotations)

    @property
    def classes(self) -> HOIClasses:
        """The names of the targets' classes: the annotations', else HICO-DET's and V-COCO's own, without hoi classes.

        Raises DatasetError as `pairs` does.
        """
        from patchbank.datasets.classes import ACTIONS, OBJECTS, VERBS
        from patchbank.datasets.hoi import HOIClasses

        return self.pairs.classes or HOIClasses(OBJECTS, ACTIONS if self.name == "vcoco" else VERBS, (), ())

    def target(self, key: str) -> HOITarget:
        """The annotated pairs of one image, which may be none. Its tensors are the caller's own.

        The size is the annotations'; else the image's, if it can be opened (without EXIF rotation).

        Raises DatasetError if the image is not listed, or as `pairs`.
        """
        if key not in self._keys:
            example = f" Its keys look like {self.samples[0].key!r}." if self.samples else ""
            raise DatasetError(f"{self.title} has no image {key!r}.{example}")
        target = self.pairs.target(key)
        return target if target.size else replace(target, size=image_size(self.images / key))

    def with_pairs(self) -> Dataset:
        """The images with at least one pair, as EZ-HOI and UPT train on."""
        return self.of(each for each in self.samples if len(self.pairs.rows[each.key]))

    def of(self, samples: Iterable[Sample]) -> Dataset:
        """Only these images, with the pairs of all."""
        return replace(self, samples=tuple(samples), chosen=self.pairs if self.has_pairs else None)

    def without_hois(self, hois: Iterable[int] | str | Path) -> Dataset:
        """Leave out the pairs of some hoi classes, such as a zero-shot setting's unseen ones, and then empty images.

        Args:
            hois: 0-based classes, or a file of them (`read_indices`).

        Raises DatasetError if the annotations have no hoi classes, a class does not exist, or nothing is left.
        """
        left = replace(self, chosen=self.pairs.without_hois(hois)).with_pairs()
        if not left.samples:
            raise DatasetError(f"{self.title} has no image with a pair of any other class than these.")
        return left

    def hoi_counts(self) -> NDArray[np.int64]:
        """(600,): the number of annotated pairs of each hoi class. Raises DatasetError without hoi classes."""
        return self.pairs.hoi_counts()

    def rare_hois(self, fewer_than: int = RARE) -> list[int]:
        """HICO-DET's rare classes: those with fewer pairs than this in its training split.

        Raises DatasetError on another or a filtered dataset, or without hoi classes.
        """
        if self.pairs.filtered:
            raise DatasetError("Rare classes are counted before any are left out: ask the whole dataset.")
        if (self.name, self.split) != ("hicodet", "train"):
            raise DatasetError(f"Rare classes are counted in HICO-DET's training split; this is {self.title}.")
        return [int(hoi) for hoi in (self.hoi_counts() < fewer_than).nonzero()[0]]

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(sample.key for sample in self.samples)


def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image as Pillow opens it, without EXIF rotation; None if it cannot be opened."""
    from patchbank.images import open_image

    try:
        with open_image(path) as image:
            return image.size
    except OSError:
        return None


def make_samples(names: Iterable[str], images: Path, source: Path) -> tuple[Sample, ...]:
    """Samples of file names under `images`: repeated names once, in order of first appearance.

    Raises DatasetError as `checked`.
    """
    unique = dict.fromkeys(names)
    if not all_plain(unique):
        for name in unique:
            checked(name, source)
    return tuple(map(Sample, unique, repeat(Directory(images)), count()))


def checked(name: str, source: Path) -> str:
    """The name, if it is a plain relative path. Raises DatasetError if it could lead out of the image directory."""
    if not is_plain(name):
        raise DatasetError(
            f"{source} lists the file_name {name!r}, which is not a plain path inside the image directory. "
            "Nothing was read or written; correct that entry."
        )
    return name


def require_directory(path: Path, what: str, fix: str) -> None:
    """Raise DatasetError if `path` is not a directory. The message says what it should be, and what to do."""
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise DatasetError(f"{path} {state}; it should be {what}. {fix}")
