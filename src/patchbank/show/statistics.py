"""Statistics of a bank's features, and its outliers. One pass; memory for a few numbers an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchbank.errors import BankError
from patchbank.show.maps import Floats, unit

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank

Progress = Callable[[int, int], None]  # done, total

_NORM_EDGES = np.logspace(-4, 5, 1801)  # 200 bins a decade
_COSINE_EDGES = np.linspace(-1, 1, 201)
_FAR = 6.0  # an outlier's distance from the median, in robust standard deviations
_BLANK = 0.9999  # mean similarity of neighbours
LEAST = 8  # images; fewer have no outliers
_NAMED = 12  # defects, and outliers, that are named


@dataclass
class Histogram:
    """Counts between edges. The outermost bins count the values beyond them too."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: Floats) -> None:
        """Count the finite values."""
        inside = values[np.isfinite(values)].clip(self.edges[0], self.edges[-1])
        self.counts += np.histogram(inside, self.edges)[0]

    def quantile(self, share: float) -> float:
        """The value with this share of all counts below it, interpolated within its bin; NaN if nothing is counted."""
        if not self.counts.any():
            return float("nan")
        below = np.concatenate([[0], self.counts.cumsum()])
        return float(np.interp(share * below[-1], below, self.edges))


@dataclass(frozen=True)
class Outlier:
    """An image unlike the others.

    Attributes:
        key: its name.
        why: the difference.
        defect: whether its feature is invalid, and not only rare.
    """

    key: str
    why: str
    defect: bool = False


@dataclass
class Statistics:
    """Statistics of a bank's features.

    Attributes:
        images: the number of features that were read.
        norms: L2 norms of tokens.
        neighbours: cosine similarities of patches beside and below each other.
        distant: of patches half a grid apart in one image.
        other_images: of patches at one place in two images.
        outliers: the defects first.
        defects: the number of invalid features; the first ones are in `outliers`.
    """

    images: int = 0
    norms: Histogram = field(default_factory=lambda: Histogram(_NORM_EDGES))
    neighbours: Histogram = field(default_factory=lambda: Histogram(_COSINE_EDGES))
    distant: Histogram = field(default_factory=lambda: Histogram(_COSINE_EDGES))
    other_images: Histogram = field(default_factory=lambda: Histogram(_COSINE_EDGES))
    outliers: list[Outlier] = field(default_factory=list)
    defects: int = 0


@dataclass(frozen=True)
class Check:
    """One property of every healthy bank.

    Attributes:
        state: ``good``, ``bad``, or ``open`` if it cannot be checked.
        says: the result, as a sentence.
    """

    state: str
    says: str


def collect(bank: Bank, output: str, keys: Sequence[str], progress: Progress | None = None) -> Statistics:
    """Read an output that is a grid, and count. A feature that cannot be read is a defect."""
    found = Statistics()
    names: list[str] = []
    figures: list[tuple[float, float]] = []
    defects: list[Outlier] = []
    before: Floats | None = None
    for number, key in enumerate(keys, 1):
        try:
            tokens = bank.output(key, output).float().numpy()
            reason = _defect(tokens)
        except (BankError, OSError) as error:
            reason = f"cannot be read: {error}"
        if reason:
            defects.append(Outlier(key, reason, defect=True))
        else:
            grid = bank.manifest.grid
            valid = np.ones(grid, bool) if bank.size(key) is None else bank.transform(key).valid
            figures.append(_count(found, tokens, valid, grid, before))
            names.append(key)
            before = unit(tokens)
        found.images += 1
        if progress:
            progress(number, len(keys))
    found.defects = len(defects)
    found.outliers = defects[:_NAMED] + _outliers(names, np.array(figures, np.float64).reshape(-1, 2))
    return found


def _defect(tokens: Floats) -> str | None:
    """Why a feature is invalid; None if it is not."""
    bad = int((~np.isfinite(tokens)).any(1).sum())
    if bad:
        what = "NaN" if np.isnan(tokens).any() else "infinite"
        return f"{bad:,} of {len(tokens):,} tokens have {what} values"
    zero = int((~tokens.any(1)).sum())
    if zero:
        return "all tokens are zero" if zero == len(tokens) else f"{zero:,} of {len(tokens):,} tokens are zero"
    if len(tokens) > 1 and (tokens == tokens[0]).all():
        return "all tokens are equal"
    return None


def _count(
    found: Statistics, tokens: Floats, valid: NDArray[np.bool_], grid: tuple[int, int], before: Floats | None
) -> tuple[float, float]:
    """Count one image's numbers. Returns its median norm, and the mean similarity of neighbours."""
    rows, columns = grid
    norms = np.linalg.norm(tokens, axis=1)
    found.norms.add(norms[valid.flatten()])
    picture = unit(tokens).reshape(rows, columns, -1)

    def between(first: Any, second: Any) -> Floats:
        both = valid[first] & valid[second]
        values: Floats = np.einsum("ijd,ijd->ij", picture[first], picture[second])[both]
        return values

    beside, below = between(np.s_[:, :-1], np.s_[:, 1:]), between(np.s_[:-1], np.s_[1:])
    neighbours = np.concatenate([beside.ravel(), below.ravel()])
    found.neighbours.add(neighbours)
    if rows > 3 and columns > 3:
        found.distant.add(between(np.s_[: rows // 2, : columns // 2], np.s_[-(rows // 2) :, -(columns // 2) :]))
    if before is not None:
        found.other_images.add(np.einsum("nd,nd->n", picture.reshape(len(tokens), -1), before)[valid.flatten()])
    return float(np.median(norms)), float(neighbours.mean()) if len(neighbours) else float("nan")


def _outliers(names: list[str], figures: NDArray[np.float64]) -> list[Outlier]:
    """Blank images, then images with figures far from the others', the farthest first."""
    blank = [name for name, (_, neighbours) in zip(names, figures, strict=True) if neighbours > _BLANK]
    found = [Outlier(name, "all patches are nearly equal: a blank image?") for name in blank]
    if len(names) < LEAST:
        return found[:_NAMED]
    far: dict[str, tuple[float, str]] = {}
    for values, what in zip(figures.T, ("median token norm", "mean similarity of neighbours"), strict=True):
        median = np.nanmedian(values)
        # If most images are nearly equal, a thousandth counts as the usual difference.
        spread = max(1.4826 * np.nanmedian(np.abs(values - median)), 1e-3 * abs(median))
        distance = np.abs(values - median) / (spread or 1)
        for place in np.argsort(-np.nan_to_num(distance))[:_NAMED]:
            if distance[place] > max(_FAR, far.get(names[place], (0.0,))[0]):
                why = f"{what} {values[place]:.3g}; the median of all images is {median:.3g}"
                far[names[place]] = float(distance[place]), why
    ordered = sorted(far.items(), key=lambda item: -item[1][0])
    return [*found, *(Outlier(key, why) for key, (_, why) in ordered if key not in blank)][:_NAMED]


def checks(found: Statistics) -> Iterator[Check]:
    """The properties of every healthy bank of patch tokens, checked on this one."""
    norms, near, far, others = found.norms, found.neighbours, found.distant, found.other_images
    named = "listed below" if found.defects <= _NAMED else f"the first {_NAMED} are listed below"
    yield _check(
        not found.defects,
        "All values are finite, and no token is zero.",
        f"{found.defects:,} of {found.images:,} features are invalid; {named}.",
    )
    if not norms.counts.any():
        yield Check("open", "The bank has no valid feature to check.")
        return
    low, high = norms.quantile(0.001), norms.quantile(0.999)
    yield _check(
        low <= 0.97 or high >= 1.04,
        f"Tokens are not normalised: 99.8% of the norms are between {low:.3g} and {high:.3g}.",
        "All tokens have norm 1: they were normalised before they were stored.",
    )
    if far.counts.any():
        close, apart = near.quantile(0.5), far.quantile(0.5)
        yield _check(
            close > apart,
            f"Neighbours are more similar ({close:.2f}) than patches half a grid apart ({apart:.2f}).",
            f"Neighbours are no more similar ({close:.2f}) than patches half a grid apart ({apart:.2f}): the "
            "tokens may not be in the grid's order.",
        )
    if not others.counts.any():
        yield Check("open", "There is only one image: it cannot be compared with others.")
        return
    yield _check(
        others.quantile(0.1) <= 0.985,
        f"Images differ: at the same place, their median similarity is {others.quantile(0.5):.2f}.",
        "Different images have nearly equal tokens: one image may be stored for many.",
    )


def _check(passed: bool, good: str, bad: str) -> Check:
    return Check("good", good) if passed else Check("bad", bad)
