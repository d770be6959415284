"""Statistics of a bank's numbers, and which images stand out. One pass, and memory of a few numbers an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchbank.errors import BankError
from patchbank.show.maps import Floats, unit

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank

Progress = Callable[[int, int], None]  # done, of how many

_NORM_EDGES = np.logspace(-4, 5, 1801)  # 200 bins a decade
_COSINE_EDGES = np.linspace(-1, 1, 201)
_FAR = 6.0  # robust standard deviations from the median, beyond which an image stands out
_BLANK = 0.9999  # mean similarity of neighbours
LEAST = 8  # images, below which nothing can be said to stand out
_NAMED = 12  # images that stand out, of each kind


@dataclass
class Histogram:
    """Counts between edges; beyond the outermost ones the outermost bins count."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: Floats) -> None:
        """Count finite values."""
        inside = values[np.isfinite(values)].clip(self.edges[0], self.edges[-1])
        self.counts += np.histogram(inside, self.edges)[0]

    def quantile(self, share: float) -> float:
        """That below which so much lies, as if values lay evenly within their bin; NaN where nothing was counted."""
        total = self.counts.sum()
        if not total:
            return float("nan")
        return float(np.interp(share * total, np.concatenate([[0], self.counts.cumsum()]), self.edges))


@dataclass(frozen=True)
class Odd:
    """An image that is not like the others.

    Attributes:
        key: its name.
        why: in what.
        wrong: whether that is a defect, and not only rare.
    """

    key: str
    why: str
    wrong: bool


@dataclass
class Soundness:
    """What was seen in a bank's numbers.

    Attributes:
        looked_at: images.
        norms: of tokens.
        neighbours: cosine similarities of patches beside and below each other.
        distant: of patches half a grid apart, in one image.
        strangers: of patches at one place in two images.
        odd: images that stand out, the defective ones first.
        defects: how many images are defective; the first of them are named.
    """

    looked_at: int = 0
    norms: Histogram = field(default_factory=lambda: Histogram(_NORM_EDGES))
    neighbours: Histogram = field(default_factory=lambda: Histogram(_COSINE_EDGES))
    distant: Histogram = field(default_factory=lambda: Histogram(_COSINE_EDGES))
    strangers: Histogram = field(default_factory=lambda: Histogram(_COSINE_EDGES))
    odd: list[Odd] = field(default_factory=list)
    defects: int = 0


@dataclass(frozen=True)
class Check:
    """One thing that holds of every healthy bank.

    Attributes:
        state: ``good``, ``bad``, or ``open`` where it cannot be told.
        says: what, in a sentence.
    """

    state: str
    says: str


def look(bank: Bank, keys: Iterable[str], total: int, progress: Progress | None = None) -> Soundness:
    """Read features, and count. An image that cannot be read is a defect and is named."""
    found = Soundness()
    names: list[str] = []
    figures: list[tuple[float, float]] = []
    defects: list[Odd] = []
    before: Floats | None = None
    for number, key in enumerate(keys, 1):
        try:
            tokens = bank[key].float().numpy()
        except (BankError, OSError) as error:
            defects.append(Odd(key, f"cannot be read: {error}", wrong=True))
            continue
        finally:
            found.looked_at += 1
            if progress:
                progress(number, total)
        if reason := _defect(tokens):
            defects.append(Odd(key, reason, wrong=True))
            continue
        valid = _valid(bank, key)
        figure = _count(found, tokens, valid, bank.manifest.grid, before)
        before = unit(tokens)
        names.append(key)
        figures.append(figure)
    found.defects = len(defects)
    found.odd = defects[:_NAMED] + _standing_out(names, np.array(figures, np.float64).reshape(-1, 2))
    return found


def _named(defects: int) -> str:
    return "named below" if defects <= _NAMED else f"the first {_NAMED} are named below"


def _defect(tokens: Floats) -> str | None:
    """What is wrong with an image's numbers by themselves."""
    bad = int((~np.isfinite(tokens)).any(1).sum())
    if bad:
        what = "NaN" if np.isnan(tokens).any() else "infinite"
        return f"{bad:,} of {len(tokens):,} tokens hold {what} numbers"
    zero = int((~tokens.any(1)).sum())
    if zero:
        return "all its tokens are zero" if zero == len(tokens) else f"{zero:,} of {len(tokens):,} tokens are zero"
    if len(tokens) > 1 and (tokens == tokens[0]).all():
        return "all its tokens are the same"
    return None


def _valid(bank: Bank, key: str) -> NDArray[np.bool_]:
    """(Gh, Gw): the patches that show the image, where its size is known; else all."""
    if bank.size(key) is None:
        return np.ones(bank.manifest.grid, bool)
    return bank.transform(key).valid


def _count(
    found: Soundness, tokens: Floats, valid: NDArray[np.bool_], grid: tuple[int, int], before: Floats | None
) -> tuple[float, float]:
    """Count one image's numbers; its median norm, and its mean similarity of neighbours."""
    rows, columns = grid
    norms = np.linalg.norm(tokens, axis=1)
    found.norms.add(norms[valid.flatten()])
    picture = unit(tokens).reshape(rows, columns, -1)

    def between(first: Any, second: Any) -> Floats:
        both = valid[first] & valid[second]
        values: Floats = np.einsum("ijd,ijd->ij", picture[first], picture[second])[both]
        return values

    beside = between(np.s_[:, :-1], np.s_[:, 1:]), between(np.s_[:-1], np.s_[1:])
    neighbours = np.concatenate([each.ravel() for each in beside])
    found.neighbours.add(neighbours)
    if rows > 3 and columns > 3:
        found.distant.add(between(np.s_[: rows // 2, : columns // 2], np.s_[-(rows // 2) :, -(columns // 2) :]))
    if before is not None:
        found.strangers.add(np.einsum("nd,nd->n", picture.reshape(len(tokens), -1), before)[valid.flatten()])
    return float(np.median(norms)), float(neighbours.mean()) if len(neighbours) else float("nan")


def _standing_out(names: list[str], figures: NDArray[np.float64]) -> list[Odd]:
    """Blank images, and those whose figures are far from those of the others, the farthest first."""
    blank = [name for name, (_, neighbours) in zip(names, figures, strict=True) if neighbours > _BLANK]
    odd = [Odd(name, "all its patches are as good as the same: is it a blank image?", wrong=False) for name in blank]
    if len(names) < LEAST:
        return odd[:_NAMED]
    found: dict[str, tuple[float, str]] = {}
    for column, what in ((0, "median token norm"), (1, "mean similarity of neighbours")):
        values = figures[:, column]
        median = np.nanmedian(values)
        # Where most are as good as equal, a thousandth counts as the usual difference.
        spread = max(1.4826 * np.nanmedian(np.abs(values - median)), 1e-3 * abs(median))
        distance = np.abs(values - median) / (spread or 1)
        for place in np.argsort(-np.nan_to_num(distance))[:_NAMED]:
            if distance[place] > _FAR and distance[place] > found.get(names[place], (0.0, ""))[0]:
                why = f"{what} {values[place]:.3g}; of the others, {median:.3g} in the middle"
                found[names[place]] = float(distance[place]), why
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return [*odd, *(Odd(key, why, wrong=False) for key, (_, why) in ordered if key not in blank)][:_NAMED]


def checks(found: Soundness) -> list[Check]:
    """What holds of every healthy bank of CLIP's patch tokens, and whether it holds of this one."""
    norms, near, far, others = found.norms, found.neighbours, found.distant, found.strangers
    results = [
        Check(
            "bad",
            f"Numbers that cannot be right: {found.defects:,} of {found.looked_at:,} images; {_named(found.defects)}.",
        )
        if found.defects
        else Check("good", "Every number is finite, and no token is zero.")
    ]
    if not norms.counts.sum():
        return [*results, Check("open", "There are no numbers to look at.")]
    low, high = norms.quantile(0.001), norms.quantile(0.999)
    results.append(
        Check("bad", "Every token has the length 1: the features were normalised before they were stored.")
        if low > 0.97 and high < 1.04
        else Check("good", f"Tokens are not normalised: their lengths are {low:.3g} to {high:.3g} (99.8% of them).")
    )
    if far.counts.sum():
        close, apart = near.quantile(0.5), far.quantile(0.5)
        results.append(
            Check("good", f"Neighbours are more alike ({close:.2f}) than patches half a grid apart ({apart:.2f}).")
            if close > apart
            else Check(
                "bad",
                f"Neighbours are no more alike ({close:.2f}) than patches half a grid apart ({apart:.2f}): are the "
                "tokens in another order than the grid's?",
            )
        )
    if others.counts.sum():
        same = others.quantile(0.1) > 0.985
        results.append(
            Check(
                "bad", "Different images have nearly the same tokens at the same places: was one image stored for many?"
            )
            if same
            else Check("good", f"Different images differ: {others.quantile(0.5):.2f} at the same place.")
        )
    else:
        results.append(Check("open", "One image alone cannot be compared with others."))
    return results
