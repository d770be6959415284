"""Is a bank sound? Every feature is read and looked into, in our banks and in third-party directories of pickles."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from patchbank.bank.index import Entry, Part, failures_of
from patchbank.bank.manifest import Manifest
from patchbank.bank.parts import PartDamagedError, find_payload, part_names, read_part
from patchbank.bank.pickles import SUFFIX, check_names, key_of, pickle_name, pickles_in
from patchbank.bank.reader import Store
from patchbank.bank.unpickling import UnsafePickleError, parse_pickle, read_pickle
from patchbank.config import ARCHIVES
from patchbank.errors import BankError
from patchbank.features import GRID
from patchbank.files import DAMAGED
from patchbank.locations import is_remote

_AT_ONCE = 256  # features handed to the threads
_STOCK = 511  # the width that the stock `clip` package gives in EZ-HOI's script

# How far a fresh extraction may be from what is stored, as ||a - b|| / ||b||: the error of each precision and each
# stored dtype (docs/fidelity.md), with room for another machine.
_PRECISION = {"fp32": 2e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 3e-2}
_STORED = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2}
_IMPORTED = 2e-2

Progress = Callable[[int, int], None]  # features looked at, in all
Recompute = Callable[[str], Tensor | None]  # a key to its (N, D) patch tokens, freshly extracted

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        name: for machines.
        says: for people, of one or several features.
        fix: ``extract`` (these features again), ``scratch`` (all of them), ``import`` (their tensors are sound),
            ``look`` (a person must), or None where nothing needs a fix.
    """

    name: str
    says: str
    fix: Literal["extract", "scratch", "import", "look"] | None


# The worst first.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("unsafe", "would run code when unpickled; was not run", "extract"),
        Kind("damaged-part", "part of the index that cannot be read", "extract"),
        Kind("unread", "could not be read: the disk, or permissions", "look"),
        Kind("unreadable", "cut short, or no tensor of features", "extract"),
        Kind("checksum", "differs from what was written: the checksum", "extract"),
        Kind("pixels", "differs from a fresh extraction", "scratch"),
        Kind("shape", "of a wrong shape", "extract"),
        Kind("not-finite", "with NaN or Inf", "extract"),
        Kind("zero", "with tokens that are all zero", "extract"),
        Kind("normalised", "already normalised: the norms are lost", "extract"),
        Kind("missing", "missing: the image is listed, and has no feature", "extract"),
        Kind("failed", "failed", "extract"),
        Kind("cls", "with [CLS] left in", "import"),
        Kind("cuda", "saved from a GPU: it cannot be loaded without one", "import"),
        Kind("dtype", "of a dtype that EZ-HOI's reader does not take", "import"),
        Kind("view", "a view: it holds more storage than its own", "import"),
        Kind("gradient", "asking for gradients", "import"),
        Kind("extra", "of no listed image (harmless)", None),
        Kind("quarantine", "in quarantine since an earlier repair (delete it once nothing is missing)", None),
    )
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: a name in `KINDS`.
        name: the sample's key, or the file's name in the bank where the key is not known.
        detail: what was found, for people.
    """

    kind: str
    name: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """In words, for the index."""
        return KINDS[self.kind].says + (f": {self.detail}" if self.detail else "")


Defects = Sequence[tuple[str, str]]  # (kind, detail) of each


@dataclass(frozen=True)
class Look:
    """What was found in one pickle.

    Attributes:
        defects: (kind, detail) of each.
        shape: the tensor's; None where there is none.
    """

    defects: tuple[tuple[str, str], ...]
    shape: tuple[int, ...] | None = None


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        bank: its directory.
        layout: ``ezhoi`` or ``shards``; None for third-party pickles.
        manifest: the bank's; None likewise, and where no part of it is sound.
        shape: (N, D) that most features have; None where there are none.
        looked_at: how many features were read.
        listed: how many images the list has that it was compared with; None if it was compared with none.
        sample: key -> relative error of those that were extracted again.
        findings: what is wrong, the worst kind first.
        sound: names of features with nothing wrong with them.
    """

    bank: Path
    layout: str | None
    manifest: Manifest | None
    shape: tuple[int, ...] | None = None
    looked_at: int = 0
    listed: int | None = None
    sample: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    sound: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """The findings that need a fix."""
        return [finding for finding in self.findings if KINDS[finding.kind].fix]

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind, the worst kind first."""
        return {kind: found for kind in KINDS if (found := [each for each in self.findings if each.kind == kind])}

    def sort(self) -> None:
        """Order the findings, and take those with problems off the sound ones."""
        order = list(KINDS)
        self.findings.sort(key=lambda finding: (order.index(finding.kind), finding.name))
        wrong = {finding.name for finding in self.problems}
        self.sound = [name for name in self.sound if name not in wrong]


def verify(
    bank: Path,
    listed: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    expected: tuple[int, ...] | None = None,
) -> Report:
    """Read and look into every feature of a bank, or of a directory of third-party pickles. Writes nothing.

    Args:
        listed: the keys that there should be; None compares with no list.
        progress: called with how far it is.
        expected: (N, D) of third-party pickles; None is the shape that most of them have.

    Raises:
        BankError: there is nothing to verify, or its format version is another.
    """
    progress = progress or (lambda *_: None)
    if find_payload(bank) is not None:
        report = _verify_bank(bank, progress, listed is None)
    else:
        report = _verify_pickles(bank, listed or (), progress, expected)
    if listed is not None:
        report.listed = len(listed)
        known = {*report.sound, *(finding.name for finding in report.findings)}
        report.findings += [Finding("missing", key) for key in listed if key not in known]
        report.findings += [Finding("extra", name) for name in {*report.sound} - set(listed)]
    if not is_remote(bank):
        damaged = [path.relative_to(bank).as_posix() for path in bank.rglob(f"*{DAMAGED}")]
        report.findings += [Finding("quarantine", name) for name in sorted(damaged)]
    elif (payload := find_payload(bank)) is not None:
        report.findings += [Finding("quarantine", name) for name in payload.parts.names() if name.endswith(DAMAGED)]
    report.sort()
    return report


def _verify_bank(bank: Path, progress: Progress, gaps: bool) -> Report:
    payload = find_payload(bank)
    assert payload is not None
    damaged, numbers, parts = [], set(), list[Part]()
    for name in part_names(payload):
        numbers.add(int(name.split("-")[1]))
        try:
            parts.append(read_part(payload, name))
        except FileNotFoundError:
            continue  # a run has put another in its place
        except PartDamagedError as error:
            path = payload.parts.directory / name
            damaged.append(Finding("damaged-part", name, str(error).removeprefix(f"{path} is damaged: ")))
    try:
        store = Store(bank, damaged="skip", known=parts)
    except BankError:
        if not damaged:
            raise
        return Report(bank, payload.layout, None, findings=damaged)
    manifest = store.manifest
    report = Report(bank, payload.layout, manifest, manifest.shape, findings=damaged)
    report.findings += [Finding("failed", key, reason) for key, reason in failures_of(store.entries).items()]
    features = [entry for entry in store.entries.values() if entry.failure is None]
    look = _look_at_pickle if payload.layout == "ezhoi" else _look_at_row
    for entry, defects in _in_threads(partial(look, store), features, progress):
        report.looked_at += 1
        report.sound.append(entry.key)
        report.findings += [Finding(kind, entry.key, detail) for kind, detail in defects]
    if payload.layout == "ezhoi":
        names = {pickle_name(key) for key in store.entries}
        report.findings += [Finding("extra", name) for name, _ in pickles_in(bank) if name not in names]
    elif gaps and manifest.dataset not in ARCHIVES:
        # Without a list, a number without a part is all that shows missing samples.
        report.findings += [
            Finding("missing", name, "no shard has this number, and later ones exist") for name in _gaps(numbers)
        ]
    return report


def _gaps(numbers: set[int]) -> Iterator[str]:
    """Shards that are not there, though later ones are. A run of them is one: any number can stand in a name."""
    for before, after in pairwise([-1, *sorted(numbers)]):
        if after - before == 2:
            yield f"shard-{before + 1:05}-*"
        elif after - before > 2:
            yield f"shard-{before + 1:05}-* to shard-{after - 1:05}-*"


def _look_at_row(store: Store, entry: Entry) -> Defects:
    if store.checksum(entry.key) != entry.sha256:
        return [("checksum", f"in {store.file(entry.key).name}")]
    defects: list[tuple[str, str]] = []
    for name in store.manifest.outputs:
        found = look_into(store.output(entry.key, name))
        defects += [
            (kind, f"{name}: {detail}" if len(store.manifest.outputs) > 1 else detail) for kind, detail in found
        ]
    return defects[:1]


def _look_at_pickle(store: Store, entry: Entry) -> Defects:
    path, manifest = store.file(entry.key), store.manifest
    if not path.exists():
        return [("missing", f"the bank lists it, and {path.name} is gone")]
    look = look_at(path, getattr(torch, manifest.dtype))
    defects = list(look.defects)
    if look.shape is not None and (wrong := shape_defect(look.shape, manifest.shape)):
        defects.append(wrong)
    if any(kind == "unread" for kind, _ in defects):
        return defects
    if store.checksum(entry.key) != entry.sha256 and not any(KINDS[kind].fix == "extract" for kind, _ in defects):
        return [("checksum", ", ".join(KINDS[kind].says for kind, _ in defects))]
    return defects


def _verify_pickles(
    directory: Path, listed: Sequence[str], progress: Progress, expected: tuple[int, ...] | None
) -> Report:
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
    keys = {pickle_name(key): key for key in listed}
    looks = list(_in_threads(lambda name: look_at(directory / name), names, progress))
    report.looked_at = len(looks)
    report.shape = expected or _usual_shape(look.shape for _, look in looks if look.shape is not None)
    for file, look in looks:
        name = keys.get(file, file)
        if key_of(file) is None:
            report.findings.append(Finding("extra", file, "no image's features have this name"))
            continue
        report.sound.append(name)
        defects = list(look.defects)
        if look.shape is not None and (wrong := shape_defect(look.shape, report.shape)):
            defects = [wrong] if wrong[0] == "shape" else [*defects, wrong]  # a wrong shape is of no use, whatever else
        report.findings += [Finding(kind, name, detail) for kind, detail in defects]
    return report


def _usual_shape(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The (N, D) that most tensors have, N without [CLS] where some have it; None where none is a grid."""
    counts: Counter[tuple[int, ...]] = Counter()
    for shape in shapes:
        if len(shape) == 2 and is_square(shape[0] - 1) and not is_square(shape[0]):
            shape = (shape[0] - 1, shape[1])
        if len(shape) == 2:
            counts[shape] += 1
    return counts.most_common(1)[0][0] if counts else None


def is_square(count: int) -> bool:
    """Whether so many patches make a square grid."""
    return count > 0 and int(count**0.5 + 0.5) ** 2 == count


def look_at(path: Path, dtype: torch.dtype = torch.float32) -> Look:
    """Everything that one pickle shows by itself; whether its shape is right, the others decide."""
    tensor, defects = examined(path, dtype)
    return Look(tuple(defects), None if tensor is None else tuple(tensor.shape))


def examined(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Defects]:
    """The tensor in a pickle, as it is stored, and its defects; None where there is no tensor of floats."""
    try:
        found = parse_pickle(path.read_bytes())
    except (OSError, MemoryError) as error:  # nothing is known of the file
        return None, [("unread", getattr(error, "strerror", None) or "out of memory")]
    except UnsafePickleError as error:
        return None, [("unsafe", str(error))]
    except BankError as error:
        return None, [("unreadable", str(error))]
    tensor = found.tensor
    if not tensor.is_floating_point():
        return None, [("unreadable", f"it holds {str(tensor.dtype).removeprefix('torch.')} numbers")]
    defects: list[tuple[str, str]] = []
    if found.location != "cpu":
        defects.append(("cuda", found.location))
    if tensor.dtype != dtype:
        defects.append(("dtype", str(tensor.dtype).removeprefix("torch.")))
    if found.storage_bytes > tensor.nbytes:
        defects.append(("view", f"{found.storage_bytes:,} bytes for a tensor of {tensor.nbytes:,}"))
    elif not tensor.is_contiguous():
        defects.append(("view", f"strides {tuple(tensor.stride())}"))
    if found.requires_grad:
        defects.append(("gradient", ""))
    return tensor, [*defects, *look_into(tensor)]


def look_into(values: Tensor) -> list[tuple[str, str]]:
    """(kind, detail) of what is wrong with the numbers of (N, D) patch tokens, or of any other tensor."""
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


def shape_defect(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> tuple[str, str] | None:
    """(kind, detail) of a shape that is not the expected one."""
    if shape == expected:
        return None
    if expected is not None and len(shape) == 2 and (shape[0] - 1, shape[1]) == expected:
        return "cls", f"{shape}"
    if shape[-1:] == (_STOCK,):
        return "shape", f"{shape}: what the stock `clip` package gives, where EZ-HOI's own was meant"
    return "shape", f"{shape}" + (f"; expected is {expected}" if expected else "")


def compare_with_pixels(report: Report, keys: Sequence[str], count: int, recompute: Recompute) -> None:
    """Extract `count` of a bank's sound features again, and note those that differ.

    Args:
        keys: of the images that are at hand.
        recompute: a key to float32 (N, D) on the CPU, computed with the bank's model and preprocessing; None where the
            image cannot be read: another one is taken then.
    """
    unusable = {finding.name for finding in report.findings if KINDS[finding.kind].fix != "import"}
    usable = {*report.sound, *(finding.name for finding in report.findings)} - unusable
    chosen = [key for key in keys if key in usable]
    random.Random(0).shuffle(chosen)
    read = reader(report)
    for key in chosen:
        if len(report.sample) == count:
            break
        if (expected := recompute(key)) is None:
            continue
        error = float((read(key) - expected).norm() / expected.norm())
        report.sample[key] = error
        if not error <= tolerance(report.manifest):
            report.findings.append(Finding("pixels", key, f"relative error {error:.1e}"))
    report.sort()


def reader(report: Report) -> Callable[[str], Tensor]:
    """Reads a feature of a bank that was verified, as float32 and without [CLS]."""
    if report.layout is not None:
        store = Store(report.bank, damaged="skip")
        return lambda key: store.output(key, GRID).float()

    def read(key: str) -> Tensor:
        tokens = read_pickle(report.bank / pickle_name(key)).float()
        return tokens[1:] if report.shape and tokens.shape[0] == report.shape[0] + 1 else tokens

    return read


def tolerance(bank: Manifest | None) -> float:
    """The relative error up to which features of a bank count as those of a fresh extraction."""
    if bank is None or bank.imported:
        return _IMPORTED
    stored: Mapping[str, float] = _STORED
    rounded = sum(stored[dtype] for dtype in {*bank.rounded, bank.dtype})
    return _PRECISION.get(bank.identity.get("precision", ""), _IMPORTED) + rounded


def _in_threads(function: Callable[[T], R], items: Sequence[T], progress: Progress) -> Iterator[tuple[T, R]]:
    """Each item with the function's result, in order; so many at once that memory stays bounded."""
    remaining, done = iter(items), 0
    with ThreadPoolExecutor(thread_name_prefix="verify") as threads:
        while chunk := list(islice(remaining, _AT_ONCE)):
            yield from zip(chunk, threads.map(function, chunk), strict=True)
            done += len(chunk)
            progress(done, len(items))
