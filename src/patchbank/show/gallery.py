"""The images of a page's gallery: which ones, and each one's data (a small picture, tokens, boxes)."""

from __future__ import annotations

import base64
import contextlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchbank.errors import PatchbankError
from patchbank.show.maps import Components, Floats, Moments, unit
from patchbank.show.names import named_pairs, plain
from patchbank.show.quantise import Packed, pack

if TYPE_CHECKING:
    from PIL.Image import Image

    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset, Sample
    from patchbank.transform import ImageTransform

# Bytes for each image, before base64 adds a third: with norms and colours of up to 576 patches at most 75 kB.
_FEATURES, _THUMBNAIL, _PATCHES = 32_000, 16_000, 576
_SIDE = 360  # pixels: the longer side of its picture
_QUALITIES = (82, 70, 55, 40, 25)
_PAIRS = 24  # of an image


def choose(keys: Sequence[str], first: Iterable[str], count: int, seed: int) -> list[str]:
    """Choose keys: `first` (a third at most), then random ones. A seed gives the same ones again."""
    held = set(keys)
    standing = [key for key in dict.fromkeys(first) if key in held][: max(1, count // 3)]
    others = sorted(held.difference(standing))
    return standing + random.Random(seed).sample(others, min(len(others), count - len(standing)))


@dataclass(frozen=True)
class Common:
    """What all images of a gallery share, so that patches of different images can be compared.

    Attributes:
        axes: of the unit tokens, as `pack` takes them.
        components: of the tokens that show something of an image.
    """

    axes: NDArray[np.float64]
    components: Components

    @classmethod
    def of(cls, bank: Bank, output: str, keys: Sequence[str]) -> Common:
        """Reads each feature twice. Those that cannot be read, or are not finite, are left out."""
        dim = bank.manifest.outputs[output].shape[1]
        raw, units = Moments(dim), Moments(dim)

        def shown() -> Iterator[Floats]:
            for key in keys:
                with contextlib.suppress(PatchbankError, OSError):
                    tokens = bank.output(key, output).float().numpy()
                    if np.isfinite(tokens).all():
                        yield tokens[_valid(bank, key)]

        for tokens in shown():
            raw.add(tokens)
            units.add(unit(tokens))
        return cls(units.axes(), Components.of(raw, shown))


def _valid(bank: Bank, key: str) -> NDArray[np.bool_]:
    """(N,): the patches that show something of an image."""
    try:
        return bank.transform(key).valid.flatten()
    except PatchbankError:  # the image's size is not known
        return np.ones(prod(bank.manifest.grid), bool)


def show(
    bank: Bank, output: str, key: str, common: Common, sample: Sample | None, dataset: Dataset | None
) -> dict[str, Any]:
    """The page's data for one image, of an output that is a grid."""
    shown: dict[str, Any] = {"key": plain(key), "notes": []}
    try:
        tokens = bank.output(key, output).float().numpy()
    except (PatchbankError, OSError) as error:
        return shown | {"notes": [plain(f"The feature cannot be read: {error}")]}
    rows, columns = bank.manifest.grid
    shown["grid"] = [rows, columns]
    transform = None
    try:
        transform = bank.transform(key)
    except PatchbankError:
        shown["notes"].append(
            "The image's size is not known, so the page cannot place patches and boxes on it: import the bank again "
            "with the dataset's options."
        )
    shown |= _geometry(transform, rows, columns)
    if sample is None:
        shown["notes"].append("The image is not available.")
    elif transform is not None:
        _add_picture(shown, sample, transform)
        if dataset is not None and dataset.annotations is not None:
            _add_pairs(shown, dataset, key)
    if not np.isfinite(tokens).all():
        shown["notes"].append("The feature has values that are not finite: the page computes no similarity.")
        return shown
    bytes_ = (common.components.colours(tokens) * 255).round().astype(np.uint8)
    shown["colours"] = base64.b64encode(bytes_.tobytes()).decode()
    shown["shares"] = [round(float(share), 3) for share in common.components.shares]
    packed = pack(tokens, common.axes, _room(len(tokens)))
    shown |= packed.to_json()
    if transform is not None and shown.get("boxes"):
        shown["boxError"] = _box_error(tokens, packed, [each["box"] for each in shown["boxes"]], transform)
    return shown


def _room(patches: int) -> int:
    """Bytes for the levels of an image's tokens: norms and colours of more patches take from it, not the picture."""
    return max(_FEATURES // 4, _FEATURES - 7 * max(0, patches - _PATCHES))


def _box_error(tokens: Floats, packed: Packed, boxes: list[list[float]], transform: ImageTransform) -> float:
    """The largest error of a similarity to the tokens pooled in a box, or in the union of two boxes."""
    import torch

    from patchbank.boxes import union_boxes
    from patchbank.pool import pooling_weights

    every = torch.tensor(boxes)
    first, second = torch.triu_indices(len(every), len(every))  # with itself too
    weights = pooling_weights(union_boxes(every[first], every[second]), transform).numpy()
    weights = weights[weights.any(1)]
    exact = unit(weights @ tokens) @ unit(tokens).T
    return float(np.abs(packed.pooled_similarities(weights) - exact).max(initial=0))


def _geometry(transform: ImageTransform | None, rows: int, columns: int) -> dict[str, Any]:
    """The image's size, the grid's frame in it, and the range of rows and columns that show it."""
    if transform is None:
        return {"size": [columns, rows], "frame": [0, 0, columns, rows], "valid": [0, rows, 0, columns]}
    frame = transform.boxes_from_grid([0, 0, columns, rows]).tolist()
    shown_rows, shown_columns = np.flatnonzero(transform.valid.any(1)), np.flatnonzero(transform.valid.any(0))
    valid = [shown_rows[0], shown_rows[-1] + 1, shown_columns[0], shown_columns[-1] + 1]
    return {
        "size": [transform.width, transform.height],
        "frame": [round(each, 3) for each in frame],
        "valid": [int(each) for each in valid],
    }


def _add_picture(shown: dict[str, Any], sample: Sample, transform: ImageTransform) -> None:
    from patchbank.images import open_image

    try:
        with open_image(sample.source.content(sample)) as opened:
            if opened.size != (transform.width, transform.height):
                shown["notes"].append("The image file has another size than the encoded image.")
                return
            opened.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            image = opened.convert("RGB")
    except OSError as error:
        shown["notes"].append(plain(f"The image cannot be opened: {error.strerror or error}."))
        return
    image.info.clear()  # metadata, such as a comment, would go into the new file
    image.thumbnail((_SIDE, _SIDE))
    shown["picture"] = f"data:image/jpeg;base64,{base64.b64encode(_jpeg(image)).decode()}"


def _jpeg(image: Image) -> bytes:
    """The best quality that fits; of a smaller picture if none does."""
    while True:
        for quality in _QUALITIES:
            file = BytesIO()
            image.save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() <= _THUMBNAIL or max(image.size) <= 16:
                return file.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def _add_pairs(shown: dict[str, Any], dataset: Dataset, key: str) -> None:
    """Add the annotated pairs: each box once, and each pair as two boxes and a verb."""
    try:
        annotated = named_pairs(dataset, key)
    except PatchbankError as error:
        shown["notes"].append(plain(f"The annotations cannot be read: {error}"))
        return
    boxes: dict[tuple[Any, ...], int] = {}
    pairs = []
    for human, thing, name, verb in annotated[:_PAIRS]:
        first = boxes.setdefault(("human", *(round(each, 2) for each in human), "person"), len(boxes))
        second = boxes.setdefault(("object", *(round(each, 2) for each in thing), name), len(boxes))
        pairs.append([first, second, plain(verb)])
    shown["boxes"] = [{"kind": each[0], "box": list(each[1:5]), "name": plain(each[5])} for each in boxes]
    shown["pairs"] = pairs
    if len(annotated) > _PAIRS:
        shown["notes"].append(f"{_PAIRS} of {len(annotated)} annotated pairs are shown.")
