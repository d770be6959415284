"""A bank and its annotated pairs as a torch Dataset, for training loops."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from patchbank.bank.reader import Bank, open_bank
from patchbank.bank.regions import Regions
from patchbank.boxes import union_boxes
from patchbank.config import ARCHIVES, BOXES
from patchbank.datasets import Dataset
from patchbank.datasets import Sample as Listed
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.hoi import HOIAnnotations, HOITarget
from patchbank.errors import ConfigError, DatasetError
from patchbank.features import UNKNOWN
from patchbank.pool import pool_regions
from patchbank.regions import HUMAN, IMAGE, OBJECT, UNION, image_of, name_of, pair_name, region_key
from patchbank.transform import ImageTransform

REGIONS = (HUMAN, OBJECT, UNION)

Sample = tuple[Tensor, HOITarget | str]

_NAMED = 20  # images in an error
_ROUNDED = 1e-3  # of an image's longer side: how far imported boxes, which float16 rounded, may be off


class FeatureDataset(torch.utils.data.Dataset[Sample]):
    """The features of images, with their human-object pairs or their keys: map-style, for any DataLoader and sampler.

    A DataLoader over pairs needs ``collate_fn=patchbank.collate``, since images differ in their number of pairs.

    A DataLoader reads whole batches by ``__getitems__``; the ``__getitem__`` of a subclass is called all the same. Of a
    wrapper that passes attributes on (``__getattr__``) it finds this class's ``__getitems__``, and never calls the
    wrapper's ``__getitem__``: define ``__getitems__`` there too, or pass `transform` instead.

    Attributes:
        bank: of the features.
        dataset: the images; None without one.
        keys: of the images, in this order.
    """

    def __init__(
        self,
        bank: Bank | str | Path,
        dataset: Dataset | None = None,
        regions: str | Iterable[str] | None = None,
        transform: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None,
        *,
        output: str | None = None,
        dtype: torch.dtype | None = torch.float32,
        output_size: int = 7,
        missing: Literal["raise", "skip"] = "raise",
        features: Literal["image", "crops"] = "image",
    ) -> None:
        """
        Args:
            bank: an open one, or its directory; of either layout.
            dataset: from `load_dataset`; ``.with_pairs()`` leaves out images without pairs. None: the whole bank.
            regions: the boxes of each pair to pool: some of ``human,object,union``; None for none. Of crops, those to
                read; None for all.
            transform: called with tokens and target before regions are pooled, such as `RandomHorizontalFlip`.
                The target is the image's key where there are no annotations.
            output: which of the bank's outputs to give; None: the main one, its patch tokens if it stores them.
            dtype: of the tokens; None keeps the bank's.
            output_size: bins a side of a region, as in `pool_regions`.
            missing: whether to raise on images without a feature, or to skip them. Of crops, to skip pairs.
            features: ``image``: of the whole image. ``crops``: the bank is one of annotated pairs (``patchbank extract
                pairs``): a sample is the whole image's feature, and ``target.regions`` holds those of the pairs' boxes,
                (K, D) each. Images without a pair are left out.

        Raises:
            DatasetError: the bank is of another split or dataset; or lacks features and `missing` is ``raise``; or was
                made of images of other sizes than the annotations', so that boxes would be misplaced; or of other
                boxes; or the annotations are malformed.
            BankError: the bank does not exist, or does not store the output; or regions are to be pooled of an output
                that is no grid; or crops are to be read of a bank of images.
            ConfigError: a region does not exist, or there are no annotated pairs for it; or the bank holds crops and
                images are asked for; or crops are to be flipped.
            TypeError: `dataset` is a path or a name.
        """
        if dataset is not None and not isinstance(dataset, Dataset):
            raise TypeError(f"dataset is what load_dataset returns, not {dataset!r}")
        self.bank = bank if isinstance(bank, Bank) else open_bank(bank)
        names = [name.strip() for name in (regions.split(",") if isinstance(regions, str) else regions or ())]
        if missing not in ("raise", "skip"):
            raise ConfigError(f"missing is raise or skip, not {missing!r}.")
        if wrong := [name for name in names if name not in REGIONS]:
            raise ConfigError(f"There is no region {wrong[0]!r}. Choose from: {', '.join(REGIONS)}.")
        if features not in ("image", "crops"):
            raise ConfigError(f"features is image or crops, not {features!r}.")
        crops = features == "crops"
        if crops and (transform is horizontal_flip or isinstance(transform, RandomHorizontalFlip)):
            raise ConfigError("Features of crops cannot be flipped: leave the transform out.")
        self._regions = [name for name in REGIONS if name in names or (crops and not names)]
        self._output = self.bank.grid_name(output) if names and not crops else self.bank.output_name(output)
        self._crops = Regions(self.bank, [self._output]) if crops else None
        self._transform = transform
        self._dtype = self.bank.batch([], self._output, dtype=dtype).dtype
        self._output_size = output_size
        self._pairs: HOIAnnotations | None = None
        self._transforms: dict[tuple[int, int], ImageTransform] = {}  # by the image's size, which many share
        self.dataset = dataset
        if (crops or names) and (dataset is None or not dataset.has_pairs):
            what = "crops" if crops else "regions"
            raise ConfigError(f"{what} are the boxes of annotated pairs: give a dataset with annotations.")
        if dataset is None:
            self.keys = list(self.bank)
            return
        if self.bank.manifest.input.cut and not crops:
            raise ConfigError(f'{self.bank.path} holds features of regions: pass features="crops".')
        if crops and self.bank.manifest.dataset == BOXES:
            raise ConfigError(f"{self.bank.path} holds a detector's boxes, not pairs: open_regions reads it.")
        _require_same(self.bank, dataset)
        planned = _crops_of(dataset, self._regions) if crops else dataset.samples
        lacking = {sample.key for sample in planned if sample.key not in self.bank}
        if lacking and (missing == "raise" or (crops and len(lacking) == len(planned))):
            first = next(sample.key for sample in planned if sample.key in lacking)
            why = f" ({self.bank.failures[first]})" if first in self.bank.failures else ""
            raise DatasetError(
                f"The bank {self.bank.path} lacks {len(lacking):,} of the {len(planned):,} "
                f"{'crops' if crops else 'images'} of {dataset.title}, {first}{why} for one. Extract them, or pass "
                'missing="skip" to leave them out.'
            )
        if crops:
            _require_boxes(self.bank, dataset, planned)
            dataset = _with_crops(dataset, self._regions, lacking)
        elif lacking:
            dataset = dataset.of(each for each in dataset if each.key not in lacking)
        self.dataset = dataset
        self.keys = [sample.key for sample in dataset]
        if dataset.has_pairs:
            self._pairs = dataset.pairs  # read now, so that data-loader workers do not read it
            _require_sizes(self.bank, dataset, self._size)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        """The output, patch tokens (N, D), on the CPU, not normalised; and the image's pairs, or its key without them.

        Of crops, the whole image's feature (D,), and the pairs with theirs.

        Raises BankError if the image's size is unknown and there are regions to pool.
        """
        return self._read([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples, as a DataLoader asks for a batch's: their features are read at once.

        Tokens are rows of one tensor, which stays in memory as long as any of them; `collate` gives it as it is.
        """
        if type(self).__getitem__ is not FeatureDataset.__getitem__:  # a subclass changes samples one by one
            return [self[index] for index in indices]
        return self._read(indices, shared=get_worker_info() is not None and self._transform is None)

    def _read(self, indices: Sequence[int], *, shared: bool = False) -> list[Sample]:
        """The samples; on request in shared memory, of which each read is a file that is open while its tokens live."""
        keys = [self.keys[operator.index(index)] for index in indices]
        if self._crops is not None:
            return [self._read_crops(key, self._crops) for key in keys]
        out = None
        if shared:
            out = _shared((len(keys), *self.bank.manifest.outputs[self._output].shape), self._dtype)
        tokens = self.bank.batch(keys, self._output, dtype=self._dtype, out=out)
        samples: list[Sample] = list(zip(tokens, map(self._target, keys), strict=True))
        if self._transform is not None:
            samples = [self._transform(*sample) for sample in samples]
        alike: dict[object, list[int]] = {}  # what is pooled together: a transform may give others, or no pairs
        for number, (row, target) in enumerate(samples):
            if self._regions and isinstance(target, HOITarget):
                kind = row.shape, row.dtype, target.transform and target.transform.grid
                alike.setdefault(kind, []).append(number)
        for numbers in alike.values():
            pooled = self._pooled([samples[number] for number in numbers])
            for number, sample in zip(numbers, pooled, strict=True):
                samples[number] = sample
        return samples

    def __repr__(self) -> str:
        output = self.bank.manifest.outputs[self._output]
        dtype = str(self._dtype).removeprefix("torch.")
        regions = f", regions {', '.join(self._regions)}" if self._regions else ""
        of = self.dataset.title if self.dataset else "keys"
        return (
            f"<FeatureDataset {of}: {len(self):,} x {self._output} {output.shape} {dtype}{regions}, "
            f"from {self.bank.path}>"
        )

    def _target(self, key: str) -> Any:
        """The image's pairs with its size and transform from the bank; its key without pairs."""
        if self._pairs is None:
            return key
        size = self._size(key) or self._pairs.sizes.get(key)
        if size is None or self._crops is not None:
            return self._pairs.target(key, size)
        if (transform := self._transforms.get(size)) is None:
            transform = self._transforms[size] = self.bank.manifest.transform(size)
        return self._pairs.target(key, size, transform)

    def _size(self, key: str) -> tuple[int, int] | None:
        return self.bank.size(key if self._crops is None else region_key(key, IMAGE))

    def _read_crops(self, key: str, crops: Regions) -> Sample:
        """The whole image's feature, and the pairs with the features of their boxes."""
        assert self._pairs is not None
        found, numbers = crops[key], list(self._pairs.numbers(key))
        features, pairs = found.features[self._output], found.pairs(self._output)
        features = features.to(self._dtype)
        regions = {name: getattr(pairs, name)[numbers].to(features.dtype) for name in self._regions}
        target = replace(self._target(key), regions=regions)
        feature = features[found.names.index(IMAGE)].clone()
        return self._transform(feature, target) if self._transform is not None else (feature, target)

    def _pooled(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the regions of their pairs, pooled at once."""
        tokens, found = collate(samples)
        targets = cast("list[HOITarget]", found)
        boxes, transforms = [], []
        for target in targets:
            of_kind = {HUMAN: target.boxes_h, OBJECT: target.boxes_o}
            if UNION in self._regions:
                of_kind[UNION] = union_boxes(target.boxes_h, target.boxes_o)
            boxes.append(torch.cat([of_kind[name] for name in self._regions]))
            transforms.append(target.transform or self.bank.transform(target.key))  # whose error says what to do
        together = pool_regions(tokens, boxes, transforms, self._output_size)
        pooled: list[Sample] = []
        for row, target, features in zip(tokens, targets, torch.split(together, [*map(len, boxes)]), strict=True):
            parts = features.view(len(self._regions), len(target), tokens.shape[-1])
            pooled.append((row, replace(target, regions=dict(zip(self._regions, parts, strict=True)))))
        return pooled


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[HOITarget | str]]:
    """Make a batch: tokens (B, N, D), of crops (B, D), and a list of B targets or keys. A DataLoader's `collate_fn`.

    Tokens that are all rows of one tensor, in order, become that tensor without a copy. What a transform gives instead
    of tokens becomes what torch's `default_collate` makes of it.
    """
    rows: list[Any] = [tokens for tokens, _ in samples]
    whole = rows[0]._base if isinstance(rows[0], Tensor) else None
    if whole is None or whole.shape[:1] != (len(rows),) or not all(map(_same, rows, whole)):
        whole = default_collate(rows)  # in a worker, directly in shared memory
    return whole, [target for _, target in samples]


def _same(one: Any, other: Tensor) -> bool:
    """Whether the one is a tensor too, and the same view of the same memory."""
    return type(one) is type(other) and one.is_set_to(other) and one.dtype == other.dtype


def _shared(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in shared memory, as `default_collate` makes it: a data-loader worker sends it without a copy."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage).resize_(tuple(shape))


def horizontal_flip(patch_tokens: Tensor, target: HOITarget) -> Sample:
    """Flip an image's grid and boxes left to right, together.

    A flipped grid is not the grid of the flipped image: CLIP distinguishes left and right, by its position embeddings
    and its learned filters. It has the same features at mirrored places: an augmentation for models that pool boxes.

    Args:
        patch_tokens: (N, D), row-major.
        target: with its `transform`, as from `FeatureDataset`.

    Raises:
        ValueError: the target has no transform, as of crops, so that the grid and the image's width are unknown; or
            the tokens are no grid.
    """
    if not isinstance(target, HOITarget) or target.transform is None:
        raise ValueError(f"{target!r} has no transform, without which its boxes cannot be flipped")
    rows, columns = target.transform.grid
    if patch_tokens.shape[:-1] != (rows * columns,):
        raise ValueError(f"patch tokens ({rows * columns}, D) can be flipped, not {tuple(patch_tokens.shape)}")
    grid = patch_tokens.unflatten(0, (rows, columns))  # type: ignore[no-untyped-call]
    flipped = replace(
        target,
        boxes_h=_mirrored(target.boxes_h, target.transform.width),
        boxes_o=_mirrored(target.boxes_o, target.transform.width),
        transform=target.transform.mirror(),
    )
    return grid.flip(1).flatten(0, 1), flipped


class RandomHorizontalFlip:
    """`horizontal_flip` with a probability, from torch's random numbers. A `transform` of `FeatureDataset`."""

    def __init__(self, probability: float = 0.5) -> None:
        """Raises ValueError if it is not a probability."""
        if not 0 <= probability <= 1:
            raise ValueError(f"a probability is from 0 to 1, not {probability}")
        self.probability = probability

    def __call__(self, patch_tokens: Tensor, target: HOITarget) -> Sample:
        """The sample, flipped or unchanged."""
        if float(torch.rand(())) < self.probability:
            return horizontal_flip(patch_tokens, target)
        return patch_tokens, target


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def _require_same(bank: Bank, dataset: Dataset) -> None:
    """Raise DatasetError if the bank is of another dataset or split."""
    made_of = bank.manifest.dataset, bank.manifest.split
    anything = ("folder", BOXES, *ARCHIVES, UNKNOWN)
    if made_of[0] in anything or dataset.name in anything or made_of == (dataset.name, dataset.split):
        return
    raise DatasetError(
        f"The bank {bank.path} is of {' '.join(filter(None, made_of))}, and the dataset is {dataset.title}. "
        "Open the bank of that split, or load the dataset's other one."
    )


def _crops_of(dataset: Dataset, kinds: Sequence[str]) -> list[Listed]:
    """The regions of a dataset's pairs of these kinds, and the whole images."""
    wanted = (IMAGE, *kinds)
    read = dataset.of(dataset)  # the pairs that are checked and used below, instead of reading the file again
    return [each for each in annotated_pairs(read).samples if name_of(each.key).partition("-")[0] in wanted]


def _with_crops(dataset: Dataset, kinds: Sequence[str], lacking: set[str]) -> Dataset:
    """The pairs of which no region is lacking, and the images with some."""
    pairs = dataset.pairs
    wanted = np.ones(len(pairs.verb), np.bool_)
    for key in {image_of(each) for each in lacking}:
        for row, number in zip(pairs.rows[key], pairs.numbers(key), strict=True):
            names = (IMAGE, *(pair_name(kind, number) for kind in kinds))
            wanted[row] = lacking.isdisjoint(region_key(key, name) for name in names)
    return replace(dataset, chosen=pairs.only(wanted)).with_pairs()


def _require_boxes(bank: Bank, dataset: Dataset, planned: Sequence[Listed]) -> None:
    """Raise DatasetError if the bank's regions have other boxes or classes than the dataset's."""
    for sample in planned:
        if sample.key not in bank or sample.region is None:
            continue
        found, wanted = bank.region(sample.key) or sample.region, sample.region
        width, height = bank.size(sample.key) or (0, 0)
        room = _ROUNDED * max(width, height)
        apart = [abs(one - other) for one, other in zip(found.box or (), wanted.box or (), strict=False)]
        if found[1:] != wanted[1:] or (found.box is None) != (wanted.box is None) or max(apart, default=0) > room:
            raise DatasetError(
                f"{bank.path} holds other pairs than {dataset.annotations} lists: {sample.key} is {found}, and "
                f"not {wanted}. Load the annotations that it was made of, or extract the pairs again."
            )


def _require_sizes(bank: Bank, dataset: Dataset, size_of: Callable[[str], tuple[int, int] | None]) -> None:
    """Raise DatasetError, naming the images, if the annotations have other sizes than the bank's images."""
    stated = dataset.pairs.sizes
    pairs = ((sample.key, size_of(sample.key), stated.get(sample.key)) for sample in dataset.samples)
    wrong = [each for each in pairs if None not in each and each[1] != each[2]]
    if not wrong:
        return
    turned = sum(encoded == annotated[::-1] for _, encoded, annotated in wrong if encoded and annotated)
    names = "\n".join(f"  {key}: {annotated}, the bank {encoded}" for key, encoded, annotated in wrong[:_NAMED])
    names += f"\n  and {len(wrong) - _NAMED:,} more" if len(wrong) > _NAMED else ""
    why = f" {turned:,} of these are turned by EXIF, which EZ-HOI's pixels are not." if turned else ""
    raise DatasetError(
        f"The bank {bank.path} was made of images of other sizes than {dataset.annotations} says: boxes would be "
        f"misplaced.{why} Correct the list, or leave these images out (dataset.of):\n{names}"
    )
