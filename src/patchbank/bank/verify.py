"""Is a bank sound? Every feature of it is read and looked into, whoever made it and however it lies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from patchbank.bank import ezhoi
from patchbank.bank.entries import Entry
from patchbank.bank.examine import KINDS, Finding, look_at, look_into, model_of, shape_defect
from patchbank.bank.layouts import layout_in
from patchbank.bank.ledger import damaged_files, read_ledger
from patchbank.bank.manifest import Manifest
from patchbank.bank.shard import ShardDamagedError, number_of, read_shard, shard_names
from patchbank.bank.shards import ShardStore
from patchbank.bank.storage import storage_of
from patchbank.bank.unpickling import read_pickle
from patchbank.config import ARCHIVES, StoredDtype
from patchbank.encoders.openai.registry import MODELS, Model
from patchbank.errors import BankError
from patchbank.files import DAMAGED, sha256_of
from patchbank.locations import is_remote

_AT_ONCE = 256  # features handed to the threads

# How far features recomputed from pixels may be from what is stored, as ||a - b|| / ||b||: what each precision and each
# stored dtype is off by (docs/fidelity.md), with room for another machine.
_PRECISION = {"fp32": 2e-5, "tf32": 5e-3, "fp16": 1e-2, "bf16": 3e-2}
_STORED: dict[StoredDtype, float] = {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 3e-2}
_STRANGERS = 2e-2

Progress = Callable[[int, int], None]  # features looked at, in all
Recompute = Callable[[str], Tensor | None]  # an image's key to its (N, D) patch tokens

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        bank: its directory.
        layout: ``ezhoi`` or ``shards``; None of pickles that no manifest tells of.
        manifest: the bank's; None likewise.
        model: the model that its shapes are those of; None where they are no known model's.
        looked_at: how many features were read.
        listed: how many images the list has that it was compared with; None if it was compared with none.
        sample: key -> relative error of those that were computed anew.
        findings: what is wrong, the worst kind first.
        sound: names of features with nothing wrong with them.
    """

    bank: Path
    layout: str | None
    manifest: Manifest | None
    model: Model | None = None
    looked_at: int = 0
    listed: int | None = None
    sample: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    sound: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """The findings that are to be mended: extra features harm nobody."""
        return [finding for finding in self.findings if KINDS[finding.kind].mend]

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind, the worst kind first."""
        return {kind: found for kind in KINDS if (found := [each for each in self.findings if each.kind == kind])}


def verify(directory: Path, listed: Sequence[str] | None = None, progress: Progress | None = None) -> Report:
    """Read and look into every feature of a bank, or of a directory of somebody's pickles. Writes nothing.

    Args:
        listed: the keys that there should be; None compares with no list.
        progress: told how far it is.

    Raises:
        BankError: there is nothing to look at, or it is of a later format.
    """
    progress = progress or (lambda *_: None)
    layout = layout_in(directory)
    if layout == "shards":
        report = _verify_shards(directory, progress)
    elif layout == "ezhoi":
        report = _verify_ledger(directory, progress)
    else:
        report = _verify_pickles(directory, listed or (), progress)
    if listed is not None:
        report.listed = len(listed)
        _compare(report, listed)
    elif layout == "shards" and not (report.manifest and report.manifest.dataset in ARCHIVES):
        report.findings += _gaps(directory)
    if is_remote(directory):
        aside = [name for name in storage_of(directory).names() if name.endswith(DAMAGED)]
    else:
        aside = [path.relative_to(directory).as_posix() for path in directory.rglob(f"*{DAMAGED}")]
    report.findings += [Finding("aside", name) for name in sorted(aside)]
    _sort(report)
    return report


def _gaps(directory: Path) -> list[Finding]:
    """Shards that are not there, though later ones are: without a list, all that tells of images that are missing."""
    numbers = {number_of(name) for name in shard_names(storage_of(directory))}
    absent = sorted(set(range(max(numbers, default=0))) - numbers)
    return [
        Finding("missing", f"shard-{number:05}-*", "no shard has this number, and later ones have") for number in absent
    ]


def _sort(report: Report) -> None:
    order = list(KINDS)
    report.findings.sort(key=lambda finding: (order.index(finding.kind), finding.name))
    wrong = {finding.name for finding in report.problems}
    report.sound = [name for name in report.sound if name not in wrong]


def _compare(report: Report, listed: Sequence[str]) -> None:
    known = {*report.sound, *(finding.name for finding in report.findings)}
    report.findings += [Finding("missing", key) for key in listed if key not in known]
    extra = {*report.sound} - set(listed)
    report.findings += [Finding("extra", name) for name in extra]


def _failures(entries: Mapping[str, Entry]) -> list[Finding]:
    return [Finding("failed", entry.key, entry.failure) for entry in entries.values() if entry.failure is not None]


def _verify_shards(directory: Path, progress: Progress) -> Report:
    damaged = []
    storage = storage_of(directory)
    for name in shard_names(storage):
        try:
            read_shard(storage, name)
        except FileNotFoundError:
            continue  # a run has put another in its place
        except ShardDamagedError as error:
            damaged.append(Finding("damaged-shard", name, str(error).removeprefix(f"{directory / name} is damaged: ")))
    try:
        store = ShardStore(directory, damaged="skip")
    except BankError:
        if not damaged:
            raise
        return Report(directory, "shards", None, findings=damaged)
    report = Report(directory, "shards", store.manifest, model_of(store.manifest.shape))
    report.findings = damaged + _failures(store.entries)
    entries = [entry for entry in store.entries.values() if entry.failure is None]
    for entry, defects in _in_threads(partial(_look_at_row, store), entries, progress):
        report.looked_at += 1
        report.sound.append(entry.key)
        report.findings += [Finding(kind, entry.key, detail) for kind, detail in defects]
    return report


def _look_at_row(store: ShardStore, entry: Entry) -> list[tuple[str, str]]:
    if store.checksum(entry.key) != entry.sha256:
        return [("checksum", f"in {store.file(entry.key).name}")]
    defects = look_into(store.tokens(entry.key))
    if store.manifest.cls and not defects:
        defects = [(kind, f"[CLS]: {detail}") for kind, detail in look_into(store.cls(entry.key))]
    return defects


def _verify_ledger(directory: Path, progress: Progress) -> Report:
    bank = Manifest.read(directory)
    report = Report(directory, "ezhoi", bank, model_of(bank.shape))
    report.findings = [Finding("damaged-ledger", name) for name in damaged_files(directory)]
    entries = read_ledger(directory, damaged="skip")
    report.findings += _failures(entries)
    features = [entry for entry in entries.values() if entry.failure is None]
    for entry, defects in _in_threads(partial(_look_at_listed, directory, bank), features, progress):
        report.looked_at += 1
        report.sound.append(entry.key)
        report.findings += [Finding(kind, entry.key, detail) for kind, detail in defects]
    listed = {ezhoi.pickle_name(key) for key in entries}
    report.findings += [Finding("extra", name) for name, _ in ezhoi.pickles_in(directory) if name not in listed]
    return report


def _look_at_listed(directory: Path, bank: Manifest, entry: Entry) -> list[tuple[str, str]]:
    path = directory / ezhoi.pickle_name(entry.key)
    if not path.exists():
        return [("missing", f"the bank lists it, and {path.name} is gone")]
    look = look_at(path, getattr(torch, bank.dtype))
    defects = list(look.defects)
    if look.shape is not None and (wrong := shape_defect(look.shape, bank.shape)):
        defects.append(wrong)
    if any(kind == "unread" for kind, _ in defects):
        return defects
    if sha256_of(path) != entry.sha256 and not any(KINDS[kind].mend == "extract" for kind, _ in defects):
        # Somebody else's file: what could be mended of it is not what was written here either.
        return [("checksum", ", ".join(KINDS[kind].says for kind, _ in defects))]
    return defects


def _verify_pickles(directory: Path, listed: Sequence[str], progress: Progress) -> Report:
    """A directory of pickles that somebody else made: what they should be, most of them must tell."""
    if is_remote(directory):
        raise BankError(f"There is nothing to verify in {directory}: no shard lies there.")
    if not directory.is_dir() or not (names := sorted(name for name, _ in ezhoi.pickles_in(directory))):
        raise BankError(
            f"There is nothing to verify in {directory}: neither a bank nor files named *{ezhoi.SUFFIX}."
            if directory.exists()
            else f"There is no directory {directory}."
        )
    report = Report(directory, None, None)
    ezhoi.check_names(listed)
    keys = {ezhoi.pickle_name(key): key for key in listed}
    looks = list(_in_threads(partial(_look_at_file, directory), names, progress))
    report.looked_at = len(looks)
    report.model = expected_model(directory, (shape for _, (shape, _) in looks if shape is not None))
    expected = (report.model.tokens, report.model.output_dim) if report.model else None
    for file, (shape, defects) in looks:
        name = keys.get(file, file)
        if ezhoi.key_of(file) is None:
            report.findings.append(Finding("extra", file, "no image's features have this name"))
            continue
        report.sound.append(name)
        wrong = shape_defect(shape, expected) if shape is not None else None
        if wrong and wrong[0] == "shape":  # whatever else there is, the file is of no use
            defects = ()
        report.findings += [Finding(kind, name, detail) for kind, detail in (*defects, *([wrong] if wrong else []))]
    return report


def _look_at_file(directory: Path, name: str) -> tuple[tuple[int, ...] | None, tuple[tuple[str, str], ...]]:
    look = look_at(directory / name)
    return look.shape, look.defects


def expected_model(directory: Path, shapes: Iterable[tuple[int, ...]]) -> Model | None:
    """The model that pickles are of: what EZ-HOI's name of their directory says, else what most shapes are."""
    for model in MODELS.values():
        if directory.resolve().name.startswith(f"{model.bank_prefix}_img_"):
            return model
    counts: Counter[Model] = Counter()
    for shape in shapes:
        patches = (shape[0] - 1, *shape[1:]) if shape else shape
        if found := model_of(shape) or model_of(patches):  # [CLS] may have been left in
            counts[found] += 1
    return counts.most_common(1)[0][0] if counts else None


def compare_with_pixels(report: Report, keys: Sequence[str], count: int, recompute: Recompute) -> None:
    """Compute `count` of a bank's features anew, sound ones or such as can be mended without it; note what differs.

    Args:
        keys: of the images that there are.
        recompute: a key to float32 (N, D) on the CPU, computed with the bank's model and preprocessing; None where the
            image cannot be read: another one is taken then.
    """
    spoilt = {finding.name for finding in report.findings if KINDS[finding.kind].mend != "repair"}
    usable = {*report.sound, *(finding.name for finding in report.findings)} - spoilt
    there = [key for key in keys if key in usable]
    random.Random(0).shuffle(there)
    read = reader(report)
    for key in there:
        if len(report.sample) == count:
            break
        if (expected := recompute(key)) is None:
            continue
        error = float((read(key) - expected).norm() / expected.norm())
        report.sample[key] = error
        if not error <= tolerance(report.manifest):
            report.findings.append(Finding("pixels", key, f"relative error {error:.1e}"))
    _sort(report)


def reader(report: Report) -> Callable[[str], Tensor]:
    """Reads a feature of a bank that was looked into, as float32 and without [CLS]."""
    if report.layout == "shards":
        store = ShardStore(report.bank, damaged="skip")
        return lambda key: store.tokens(key).float()

    def read(key: str) -> Tensor:
        tokens = read_pickle(report.bank / ezhoi.pickle_name(key)).float()
        return tokens[1:] if report.model and tokens.shape[0] == report.model.tokens + 1 else tokens

    return read


def tolerance(bank: Manifest | None) -> float:
    """The relative error up to which features of a bank count as those that the pixels give."""
    if bank is None or bank.adopted:
        return _STRANGERS
    rounded = sum(error for dtype, error in _STORED.items() if dtype in bank.fingerprint.dtype.split(" > "))
    return _PRECISION.get(bank.fingerprint.precision, _STRANGERS) + rounded


def _in_threads(function: Callable[[T], R], items: Sequence[T], progress: Progress) -> Iterator[tuple[T, R]]:
    """Each item with the function's result, in order; so many at once that memory stays bounded."""
    remaining, done = iter(items), 0
    with ThreadPoolExecutor(thread_name_prefix="verify") as threads:
        while chunk := list(islice(remaining, _AT_ONCE)):
            yield from zip(chunk, threads.map(function, chunk), strict=True)
            done += len(chunk)
            progress(done, len(items))
