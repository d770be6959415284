"""A sample is one image to encode; a source is what it lies in; a dataset is a named list of samples."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from patchbank.config import WHOLE, Partition
from patchbank.errors import DatasetError
from patchbank.files import is_plain
from patchbank.locations import is_remote, remotely

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from patchbank.datasets.hoi import HOIAnnotations, HOIClasses, HOITarget

RARE = 10  # HICO-DET calls a class with fewer annotated pairs in its training split rare


class Sample(NamedTuple):
    """One image to encode.

    Attributes:
        key: its ``file_name`` as the annotations give it: a relative POSIX path with its extension.
        source: what it lies in.
        position: its place in the data set, which decides its place in a batch and its shard. There may be gaps.
        place: where in the source, if that is a file: of an archive (offset, size), of a table (row group, row).
    """

    key: str
    source: Source
    position: int
    place: tuple[int, int] | None = None

    @property
    def path(self) -> Path:
        """Where it lies, for people and as a file of a directory. Made when it is asked for: a million take seconds."""
        return self.source.location / self.key

    def exists(self) -> bool:
        """Whether the image is there."""
        return self.source.exists(self)


class Source(Protocol):
    """Something that images lie in. Small, and sent to other processes with every run of samples.

    Attributes:
        location: the directory, or the file, that they lie in.
        remote: whether reading waits for a network.
    """

    @property
    def location(self) -> Path: ...
    @property
    def remote(self) -> bool: ...

    def content(self, sample: Sample) -> Path | BinaryIO:
        """An image's file, or its bytes. Raises OSError where they cannot be had."""

    def exists(self, sample: Sample) -> bool:
        """Whether the image is there."""

    def require(self) -> None:
        """Raise DatasetError where nothing of it is there (any more)."""


@dataclass(frozen=True)
class Directory:
    """A directory of image files; a key is a path in it."""

    location: Path

    @property
    def remote(self) -> bool:
        """As `Source` says."""
        return is_remote(self.location)

    def content(self, sample: Sample) -> Path | BinaryIO:
        """As `Source` says."""
        path = sample.path
        if self.remote:
            content: bytes = remotely(path, lambda files, name: files.cat_file(name))
            if not content:
                raise OSError("the file is empty")
            return BytesIO(content)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size == 0:
            raise OSError("the file is empty")
        return path

    def exists(self, sample: Sample) -> bool:
        """As `Source` says."""
        try:
            return sample.path.exists()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # no file has such a name
                return False
            raise

    def require(self) -> None:
        """As `Source` says."""
        if not self.remote and not _holds_something(self.location):
            raise DatasetError(
                f"{self.location}, the directory of the images, is gone. What was committed is safe: when it is there "
                "again, the same command goes on from here."
            )


def _holds_something(directory: Path) -> bool:
    """Whether a directory is there, with anything in it: of a disk that is not mounted an empty one is left."""
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is not None
    except OSError:
        return os.path.isdir(directory)  # noqa: PTH112  # it may not be listed, or not just now


class Decoded(NamedTuple):
    """One image, ready for the encoder.

    Attributes:
        key: the sample's.
        pixels: (h, w, 3) uint8 RGB.
        size: (width, height) of the original, in pixels.
    """

    key: str
    pixels: NDArray[np.uint8]
    size: tuple[int, int]


class Failure(NamedTuple):
    """One image that could not be had, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """The images of one split, and what is annotated on them. The pairs are read when they are first asked for.

    Attributes:
        name: ``hicodet``, ``vcoco``, ``folder``, ``tar`` or ``parquet``.
        split: the split's name; None where there are no splits.
        images: the directory the keys are relative to; of tars and tables the one that the first lies in.
        samples: every listed image once, with or without annotated pairs.
        annotations: the file the list was read from; None for a folder.
        root: the EZ-HOI checkout, whose ``checkpoints/`` are looked in; None for a folder.
        chosen: the pairs, where they were read before, or some of them left out.
        part: the part of its files that it was loaded for; the others were not looked into.
        damaged: files of many images -> why some of their images, or all, are not in `samples`.
    """

    name: str
    split: str | None
    images: Path
    samples: tuple[Sample, ...] = field(repr=False)
    annotations: Path | None = None
    root: Path | None = None
    chosen: HOIAnnotations | None = field(default=None, repr=False)
    part: Partition = WHOLE
    damaged: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def title(self) -> str:
        """``hicodet train``, ``folder``: for people."""
        return f"{self.name} {self.split}" if self.split else self.name

    @cached_property
    def pairs(self) -> HOIAnnotations:
        """All annotated pairs. Raises DatasetError where there are none to be had, or an entry is malformed."""
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
        """The names behind the targets' numbers. Raises DatasetError where the annotations do not tell them."""
        return self.pairs.known_classes

    def target(self, key: str) -> HOITarget:
        """The annotated pairs of one image; none for many an image. Its tensors are the caller's own.

        The image's size is the annotations', or the image's where it is at hand (without EXIF rotation).

        Raises:
            DatasetError: the image is not listed; or as `pairs`.
        """
        if key not in self._keys:
            raise DatasetError(f"{self.title} has no image {key!r}. Its keys look like {self.samples[0].key!r}.")
        target = self.pairs.target(key)
        return target if target.size else replace(target, size=image_size(self.images / key))

    def with_pairs(self) -> Dataset:
        """The images with at least one pair, as EZ-HOI and UPT train on."""
        return self.of(each for each in self.samples if len(self.pairs.rows[each.key]))

    def of(self, samples: Iterable[Sample]) -> Dataset:
        """Some of the images only, with the pairs that were read for all."""
        return replace(self, samples=tuple(samples), chosen=self.pairs)

    def without_hois(self, hois: Iterable[int] | str | Path) -> Dataset:
        """The same without the pairs of some hoi classes, and without the images that have no pair then.

        Args:
            hois: 0-based classes, or a file of them (`read_indices`): a zero-shot setting's unseen ones, say.

        Raises:
            DatasetError: the annotations do not tell hoi classes, one of these is none, or nothing is left.
        """
        left = replace(self, chosen=self.pairs.without_hois(hois)).with_pairs()
        if not left.samples:
            raise DatasetError(f"{self.title} has no image with a pair of any other class than these.")
        return left

    def hoi_counts(self) -> NDArray[np.int64]:
        """(600,): how many pairs of each hoi class are annotated. Raises DatasetError where that is not told."""
        return self.pairs.hoi_counts()

    def rare_hois(self, fewer_than: int = RARE) -> list[int]:
        """HICO-DET's rare classes: with fewer pairs than this in the training split, which this must be.

        Raises DatasetError where it is another split, or hoi classes are not told.
        """
        if self.pairs.filtered:
            raise DatasetError("Rare classes are counted before any are left out: ask the whole data set.")
        if (self.name, self.split) != ("hicodet", "train"):
            raise DatasetError(f"Rare classes are counted in HICO-DET's training split; this is {self.title}.")
        return [int(hoi) for hoi in (self.hoi_counts() < fewer_than).nonzero()[0]]

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(sample.key for sample in self.samples)


def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image as Pillow opens it, without EXIF rotation; None where it cannot be opened."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def make_records(names: Iterable[str], images: Path, source: Path) -> tuple[Sample, ...]:
    """Samples for file names under `images`, repeated names once, in order of first appearance.

    Raises DatasetError on a name that is no plain relative path: it could lead out of the image directory.
    """
    directory = Directory(images)
    return tuple(
        Sample(checked(name, source), directory, position) for position, name in enumerate(dict.fromkeys(names))
    )


def checked(name: str, source: Path) -> str:
    if not is_plain(name):
        raise DatasetError(
            f"{source} lists the file_name {name!r}, which is not a plain path inside the image directory. "
            f"Nothing was read or written; correct that entry."
        )
    return name


def require_directory(path: Path, what: str, mend: str) -> Path:
    """`path`, or DatasetError saying what it should be and how to mend it."""
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise DatasetError(f"{path} {state}; it should be {what}. {mend}")
    return path
