"""Is a bank sound? Every feature is read and examined, in banks and in directories of third-party pickles."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from math import isqrt
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from patchbank.bank.manifest import Manifest
from patchbank.bank.parts import find_payload, read_parts
from patchbank.bank.payload import Payload
from patchbank.bank.pickles import INDEX, SUFFIX, check_names, key_of, pickle_name, pickles_in
from patchbank.bank.reader import Bank
from patchbank.bank.runs import read_runs
from patchbank.bank.unpickling import content_of, parse_pickle, read_pickle
from patchbank.config import ARCHIVES
from patchbank.errors import BankError
from patchbank.features import GRID
from patchbank.files import DAMAGED
from patchbank.locations import is_remote
from patchbank.unpickling import PickleError, UnsafePickleError

_AT_ONCE = 256  # features that wait for the threads
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_STOCK = 511  # the features' width if EZ-HOI's script runs with the stock `clip` package

# How far a fresh extraction may be from what is stored, as ||a - b|| / ||b||: the error of each precision and each
# stored dtype (docs/why/fidelity.md), with room for another machine.
_PRECISION = {"fp32": 2e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 3e-2}
_STORED = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2}
_IMPORTED = 2e-2

Progress = Callable[[int, int], None]  # features that were read, and all
SizeOf = Callable[[str], tuple[int, int] | None]  # a key -> its image's (width, height) now, if it can be opened
Recompute = Callable[[str], Mapping[str, Tensor] | None]  # a key -> its outputs, freshly extracted

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        says: for people, of one or several features.
        fix: ``extract`` (these features again), ``scratch`` (all of them), ``import`` (their tensors are sound),
            ``look`` (a person must), ``convert`` (the bank it was made of, again), or None if nothing needs a fix.
    """

    says: str
    fix: Literal["extract", "scratch", "import", "look", "convert"] | None


# By name, the worst first.
KINDS = {
    "unsafe": Kind("would run code when unpickled; was not run", "extract"),
    "damaged-part": Kind("part of the index that cannot be read", "extract"),
    "components": Kind("principal components that cannot be read; the features can", "convert"),
    "unread": Kind("could not be read: the disk, or permissions", "look"),
    "unreadable": Kind("cut short, or not a tensor", "extract"),
    "checksum": Kind("its checksum is not that of what was written", "extract"),
    "pixels": Kind("differs from a fresh extraction", "scratch"),
    "replaced": Kind("of another image: the one of this name has another size now", "extract"),
    "arrays": Kind("of another form than ADA-CM's", "extract"),
    "shape": Kind("of a wrong shape", "extract"),
    "rows": Kind("with rows that differ from the annotated pairs", "extract"),
    "not-finite": Kind("with NaN or Inf", "extract"),
    "zero": Kind("with tokens that are all zero", "extract"),
    "normalised": Kind("already normalised: the norms are lost", "extract"),
    "missing": Kind("missing: listed, and without a feature", "extract"),
    "failed": Kind("failed", "extract"),
    "unlisted": Kind("that no index lists: nothing says what they should hold", "import"),
    "cls": Kind("with [CLS] left in", "import"),
    "cuda": Kind("saved from a GPU: it cannot be loaded without one", "import"),
    "dtype": Kind("of a dtype that the reader does not take", "import"),
    "view": Kind("a view that stores more than its own numbers", "import"),
    "gradient": Kind("asking for gradients", "import"),
    "extra": Kind("not listed (harmless)", None),
    "quarantine": Kind("in quarantine since an earlier repair (delete it once nothing is missing)", None),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a name in `KINDS`.
        name: the sample's key, or the file's name in the bank if the key is unknown.
        detail: what was found, for people.
    """

    kind: str
    name: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """In words, for the index."""
        return KINDS[self.kind].says + (f": {self.detail}" if self.detail else "")


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """The findings of each kind, the worst kind first."""
    return {kind: found for kind in KINDS if (found := [each for each in findings if each.kind == kind])}


Defects = list[tuple[str, str]]  # (kind, detail) of each
Shape = tuple[int, ...]


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        bank: its directory.
        layout: ``ezhoi`` or ``shards``; None for third-party pickles.
        manifest: the bank's; None for third-party pickles, and if no part of the bank is sound.
        shape: of most features, of a bank's main output; None if there are none.
        looked_at: how many features were read.
        listed: the length of the image list that the features were compared with; None without a list.
        sample: key -> relative error of each feature that was extracted again.
        findings: what is wrong, the worst kind first.
        sound: names of the features without a problem.
    """

    bank: Path
    layout: str | None
    manifest: Manifest | None
    shape: Shape | None = None
    looked_at: int = 0
    listed: int | None = None
    sample: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    sound: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """The findings that need a fix."""
        return [finding for finding in self.findings if KINDS[finding.kind].fix]

    @property
    def noun(self) -> str:
        """What the bank has features of, for people: ``image``, or ``region``."""
        return self.manifest.noun if self.manifest else "image"

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind, the worst kind first."""
        return by_kind(self.findings)

    def sort(self) -> None:
        """Order the findings, and remove features with problems from the sound ones."""
        order = list(KINDS)
        self.findings.sort(key=lambda finding: (order.index(finding.kind), finding.name))
        wrong = {finding.name for finding in self.problems}
        self.sound = [name for name in self.sound if name not in wrong]


def verify(
    bank: Path,
    listed: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    expected: Shape | None = None,
    size_of: SizeOf | None = None,
) -> Report:
    """Read and examine every feature of a bank, or of a directory of third-party pickles. Writes nothing.

    Args:
        listed: the expected keys; None compares with no list.
        progress: called with the numbers of features read, and of all.
        expected: (N, D) of third-party pickles; None is the most frequent shape.
        size_of: the sizes of the images, to compare with those that the bank lists; None compares none.

    Raises:
        BankError: there is nothing to verify, or the bank has another format version.
    """
    progress = progress or (lambda *_: None)
    payload = find_payload(bank)
    if payload is not None:
        report = _verify_bank(payload, progress, listed, size_of)
    else:
        report = _verify_pickles(bank, listed or (), progress, expected)
    if listed is not None:
        report.listed, expected_keys = len(listed), set(listed)
        known = {*report.sound, *(finding.name for finding in report.findings)}
        report.findings = [
            replace(each, kind="extra") if each.kind == "failed" and each.name not in expected_keys else each
            for each in report.findings
        ]
        report.findings += [Finding("missing", key) for key in listed if key not in known]
        report.findings += [Finding("extra", name) for name in {*report.sound} - expected_keys]
    if is_remote(bank):
        names = payload.parts.names() if payload else []
    else:
        names = [path.relative_to(bank).as_posix() for path in bank.rglob(f"*{DAMAGED}")]
    report.findings += [Finding("quarantine", name) for name in names if name.endswith(DAMAGED)]
    report.sort()
    return report


def _verify_bank(payload: Payload, progress: Progress, listed: Sequence[str] | None, size_of: SizeOf | None) -> Report:
    bank, damaged = payload.bank, dict[str, str]()
    parts = read_parts(payload, "skip", reasons=damaged)
    findings = [Finding("damaged-part", name, reason) for name, reason in damaged.items()]
    if damaged and not parts:
        return Report(bank, payload.layout, None, findings=findings)
    opened = Bank(bank, damaged="skip", known=parts)
    manifest = opened.manifest
    report = Report(bank, payload.layout, manifest, manifest.shape, findings=findings)
    report.findings += [Finding("failed", key, reason) for key, reason in opened.failures.items()]
    if manifest.reduction is not None:
        try:
            _ = opened.reducer
        except BankError as error:
            report.findings.append(Finding("components", manifest.reduction.name, str(error)))
    one = _examine_pickle if payload.layout == "ezhoi" else _examine_row

    def examine(key: str) -> Defects:
        defects = one(opened, key)
        if not defects and size_of and (known := opened.size(key)) and (size := size_of(key)) and size != known:
            return [("replaced", f"the image is {size}, and was {known}")]
        return defects

    for key, defects in _in_threads(examine, list(opened), progress):
        report.looked_at += 1
        report.sound.append(key)
        report.findings += [Finding(kind, key, detail) for kind, detail in defects]
    if payload.layout == "ezhoi":
        names = {pickle_name(key) for key in (*opened, *opened.failures, *(listed or ()))}  # of a listed one: missing
        for name in (name for name, _ in pickles_in(bank) if name not in names):
            another = any((bank / each / INDEX).is_dir() for each in Path(name).parents[:-1])  # bank, in a directory
            report.findings.append(Finding("unlisted" if listed is None and not another else "extra", name))
    elif listed is None and manifest.dataset not in ARCHIVES:
        # Without a list, only a number without a part shows that samples are missing.
        numbers = {part.number for part in parts} | {int(name.split("-")[1]) for name in damaged}
        report.findings += [
            Finding("missing", name, "no shard has this number, and later ones exist") for name in _gaps(numbers)
        ]
    return report


def _gaps(numbers: set[int]) -> Iterator[str]:
    """Names of missing shards before the last one; consecutive ones together, since a name can hold any number."""
    for before, after in pairwise([-1, *sorted(numbers)]):
        if after - before == 2:
            yield f"shard-{before + 1:05}-*"
        elif after - before > 2:
            yield f"shard-{before + 1:05}-* to shard-{after - 1:05}-*"


def _examine_row(bank: Bank, key: str) -> Defects:
    if bank.checksum(key) != bank.sha256(key):
        return [("checksum", f"in {bank.file(key).name}")]
    outputs = bank.manifest.outputs
    defects = [
        (kind, f"{name}: {detail}" if len(outputs) > 1 else detail)
        for name in outputs
        for kind, detail in _number_defects(bank.output(key, name))
    ]
    return defects[:1]


def _examine_pickle(bank: Bank, key: str) -> Defects:
    path, manifest = bank.file(key), bank.manifest
    try:
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, OSError) and error.errno not in _GONE:
            return [("unread", error.strerror or "")]
        return [("missing", f"the bank lists it, and {path.name} is gone")]
    tensor, defects = examined(path, getattr(torch, manifest.dtype))
    if tensor is not None and (wrong := shape_defect(tuple(tensor.shape), manifest.shape)):
        defects.append(wrong)
    if any(kind == "unread" for kind, _ in defects):
        return defects
    if not any(KINDS[kind].fix == "extract" for kind, _ in defects) and bank.checksum(key) != bank.sha256(key):
        return [("checksum", ", ".join(KINDS[kind].says for kind, _ in defects))]
    return defects


def _verify_pickles(directory: Path, listed: Sequence[str], progress: Progress, expected: Shape | None) -> Report:
    if is_remote(directory):
        raise BankError(f"There is nothing to verify in {directory}: it holds no shard.")
    if not directory.is_dir() or not (names := sorted(name for name, _ in pickles_in(directory))):
        raise BankError(
            f"There is nothing to verify in {directory}: neither a bank nor files named *{SUFFIX}."
            if directory.exists()
            else f"There is no directory {directory}."
        )
    report = Report(directory, None, None)
    check_names(listed)
    own = (directory / INDEX).is_dir() or read_runs(directory)
    keys = {pickle_name(key): key for key in listed}

    def examine(name: str) -> tuple[Shape | None, Defects]:
        tensor, defects = examined(directory / name)
        return None if tensor is None else tuple(tensor.shape), defects

    found = list(_in_threads(examine, names, progress))
    report.looked_at = len(found)
    report.shape = _usual_shape(shape for _, (shape, _) in found if shape is not None)
    expected = expected or report.shape
    for file, (shape, defects) in found:
        name = keys.get(file, file)
        if key_of(file) is None:
            report.findings.append(Finding("extra", file, "no image's features have this name"))
            continue
        report.sound.append(name)
        if own:
            report.findings.append(Finding("unlisted", name))
        if shape is not None and (wrong := shape_defect(shape, expected)):
            defects = [wrong] if wrong[0] == "shape" else [*defects, wrong]  # of a wrong shape, nothing else matters
        report.findings += [Finding(kind, name, detail) for kind, detail in defects]
    return report


def _usual_shape(shapes: Iterable[Shape]) -> Shape | None:
    """The most frequent (N, D), N without [CLS] where some have it; None if no tensor is a grid."""
    counts: Counter[Shape] = Counter()
    for shape in shapes:
        if len(shape) == 2 and isqrt(shape[0] - 1) ** 2 == shape[0] - 1 and isqrt(shape[0]) ** 2 != shape[0]:
            shape = (shape[0] - 1, shape[1])
        if len(shape) == 2:
            counts[shape] += 1
    return counts.most_common(1)[0][0] if counts else None


def examined(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Defects]:
    """The tensor in a pickle as it is stored, None if it is not one of floats; and its defects other than its shape."""
    try:
        tensor, view = parse_pickle(content_of(path))
    except (OSError, MemoryError) as error:  # nothing is known of the file
        return None, [("unread", getattr(error, "strerror", None) or "out of memory")]
    except UnsafePickleError as error:
        return None, [("unsafe", str(error))]
    except PickleError as error:
        return None, [("unreadable", str(error))]
    if not tensor.is_floating_point():
        return None, [("unreadable", f"it holds {str(tensor.dtype).removeprefix('torch.')} numbers")]
    defects: Defects = []
    if view.storage.location != "cpu":
        defects.append(("cuda", view.storage.location))
    if tensor.dtype != dtype:
        defects.append(("dtype", str(tensor.dtype).removeprefix("torch.")))
    if view.storage.nbytes > tensor.nbytes:
        defects.append(("view", f"{view.storage.nbytes:,} bytes for a tensor of {tensor.nbytes:,}"))
    elif not tensor.is_contiguous():
        defects.append(("view", f"strides {tuple(tensor.stride())}"))
    if view.requires_grad:
        defects.append(("gradient", ""))
    return tensor, [*defects, *_number_defects(tensor)]


def _number_defects(values: Tensor) -> Defects:
    """What is wrong with the numbers of (N, D) patch tokens, or of any other tensor."""
    values = values.float()
    finite = torch.isfinite(values)
    if not finite.all():
        return [("not-finite", f"{int((~finite).sum()):,} of {values.numel():,} numbers")]
    norms = values.norm(dim=-1)
    if (zero := int((norms == 0).sum())) > 0:
        return [("zero", f"{zero:,} of {norms.numel():,} tokens")]
    if values.ndim == 2 and bool(((norms - 1).abs() < 5e-3).all()):
        return [("normalised", "every token's norm is 1")]
    return []


def shape_defect(shape: Shape, expected: Shape | None) -> tuple[str, str] | None:
    """(kind, detail) of a shape that differs from the expected one."""
    if shape == expected:
        return None
    if expected is not None and len(shape) == 2 and (shape[0] - 1, shape[1]) == expected:
        return "cls", f"{shape}"
    if shape[-1:] == (_STOCK,):
        return "shape", f"{shape}: what the stock `clip` package gives, where EZ-HOI's own was meant"
    return "shape", f"{shape}" + (f"; expected is {expected}" if expected else "")


def compare_with_pixels(report: Report, keys: Sequence[str], count: int, recompute: Recompute) -> None:
    """Extract `count` of a bank's sound features again, and add a finding for each that differs in any output.

    Args:
        keys: of the available images.
        recompute: a key -> all outputs, float32 on the CPU, computed with the bank's model and preprocessing; None if
            the image cannot be read, and another one is taken.
    """
    unusable = {finding.name for finding in report.findings if KINDS[finding.kind].fix != "import"}
    usable = {*report.sound, *(finding.name for finding in report.findings)} - unusable
    chosen = [key for key in keys if key in usable]
    random.Random(0).shuffle(chosen)
    bank = Bank(report.bank, damaged="skip") if report.layout is not None else None
    names = [GRID] if bank is None else list(bank.manifest.outputs)
    reduced = bank.manifest.reduction.outputs if bank and bank.manifest.reduction else ()

    def stored(key: str, name: str, like: Tensor) -> Tensor:
        """As float32; of third-party pickles without [CLS]: the last tokens."""
        if bank is not None:
            return bank.output(key, name).float()
        return read_pickle(report.bank / pickle_name(key))[-len(like) :].float()

    for key in chosen:
        if len(report.sample) == count:
            break
        if (expected := recompute(key)) is None:
            continue
        errors = {}
        for name, value in ((name, expected[name]) for name in names):
            # Relative to what was reduced: a common mean would leave little of what remains.
            fresh = bank.project(value) if bank and name in reduced else value
            errors[name] = float((stored(key, name, value) - fresh).norm() / value.norm())
        report.sample[key] = max(errors.values())
        wrong = [name for name, error in errors.items() if not error <= tolerance(report.manifest, name)]
        if wrong:
            of = f" of {wrong[0]}" * (len(names) > 1)
            report.findings.append(Finding("pixels", key, f"relative error {errors[wrong[0]]:.1e}{of}"))
    report.sort()


def tolerance(bank: Manifest | None, name: str = GRID) -> float:
    """The relative error up to which an output of a bank agrees with a fresh extraction."""
    if bank is None or bank.imported:
        return _IMPORTED
    stored: Mapping[str, float] = _STORED
    rounded = sum(stored[dtype] for dtype in {*bank.rounded, bank.outputs[name].dtype})
    return _PRECISION.get(bank.identity.get("precision", ""), _IMPORTED) + rounded


def _in_threads(function: Callable[[T], R], items: Sequence[T], progress: Progress) -> Iterator[tuple[T, R]]:
    """Each item with the function's result, in order; a bounded number of them is in memory."""
    remaining, done = iter(items), 0
    with ThreadPoolExecutor(thread_name_prefix="verify") as threads:
        while chunk := list(islice(remaining, _AT_ONCE)):
            yield from zip(chunk, threads.map(function, chunk), strict=True)
            done += len(chunk)
            progress(done, len(items))
