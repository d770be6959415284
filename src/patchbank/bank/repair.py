"""Mending a bank in place, as far as that is possible without pixels.

Of somebody else's pickles it makes a bank: what can be mended is, and the small files are written that tell patchbank
what they are. What cannot be mended is set aside under another name, so that no reader takes it for a feature, and
noted as not there, so that an extraction makes it anew. The old file stays until the new one is durable, and the small
files come last: a repair that was interrupted is simply begun again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from patchbank.bank import ezhoi
from patchbank.bank.entries import Entry
from patchbank.bank.examine import KINDS, Finding
from patchbank.bank.ezhoi_writer import file_bytes
from patchbank.bank.ledger import Ledger, read_ledger, remove_ledger
from patchbank.bank.manifest import Manifest
from patchbank.bank.pickles import to_pickle
from patchbank.bank.shards import read_shards
from patchbank.bank.shards_writer import take_back
from patchbank.bank.storage import storage_of
from patchbank.bank.unpickling import read_pickle
from patchbank.bank.verify import Progress, Report, verify
from patchbank.config import UNKNOWN, Fingerprint, ResizeMode
from patchbank.encoders.openai.registry import Model
from patchbank.errors import BankError
from patchbank.files import (
    DAMAGED,
    fsync_directory,
    scratch_directory,
    set_aside,
    sha256_of,
    sha256_of_chunks,
    write_and_sync,
)

_AGAIN = "to be extracted again"

SizeOf = Callable[[str], tuple[int, int] | None]  # an image's key to (width, height), where the image can be had


@dataclass
class Repaired:
    """What `repair` did.

    Attributes:
        before: what was found.
        mended: features that were mended, and of what.
        set_aside: files that were renamed, since they cannot be mended: their new names.
        to_extract: images that have no feature now, and why.
        unread: features that could not be read for a reason that may pass: they were left as they are.
        adopted: whether a bank was made of somebody else's pickles.
    """

    before: Report
    mended: list[Finding] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    to_extract: list[Finding] = field(default_factory=list)
    unread: list[Finding] = field(default_factory=list)
    adopted: bool = False


def repair(
    directory: Path,
    listed: Sequence[str] | None = None,
    *,
    dataset: str = UNKNOWN,
    split: str | None = None,
    resize: ResizeMode = "center-crop",
    size_of: SizeOf = lambda _: None,
    progress: Progress | None = None,
    mending: Progress | None = None,
) -> Repaired:
    """Mend what can be mended without pixels, and see to it that the rest is not taken for features.

    Args:
        listed: the keys that there should be; None compares with no list. Without it the keys of somebody else's
            pickles are their file names without suffix, since the pictures' extensions are not known.
        dataset, split, resize: of somebody else's pickles, what they are of and how images became square.
        size_of: the sizes of their images.
        progress, mending: told how far the looking is, and the making of a bank of somebody else's pickles.

    Raises:
        BankError: there is nothing to repair, it is of a later format, or its features are of no known model.
    """
    report = verify(directory, listed, progress)
    if listed and report.manifest is not None and report.manifest.adopted and _rename(report, listed, dataset, split):
        report = verify(directory, listed, progress)
    if report.layout is None:
        new = _new_manifest(report, dataset, split, resize)
        return _adopt(report, listed or (), new, size_of, mending or (lambda *_: None))
    bad = {each.name: each for each in reversed(report.problems) if each.kind not in ("missing", "failed", "unread")}
    done = Repaired(report, to_extract=[each for each in report.problems if each.kind in ("missing", "failed")])
    done.unread = [each for each in report.problems if each.kind == "unread"]
    with scratch_directory(directory) as scratch:
        if report.layout == "shards":
            _repair_shards(done, bad, scratch)
        else:
            _repair_pickles(done, bad, scratch)
    return done


def _repair_shards(done: Repaired, bad: Mapping[str, Finding], scratch: Path) -> None:
    directory = done.before.bank
    read_shards(storage_of(directory), "set aside")
    for name, finding in bad.items():
        if finding.kind == "damaged-shard":
            done.set_aside.append(name + DAMAGED)
            done.to_extract.append(finding)
    lost = {name: finding for name, finding in bad.items() if finding.kind != "damaged-shard"}
    take_back(directory, {name: _reason(finding) for name, finding in lost.items()}, scratch)
    done.to_extract += lost.values()


def _repair_pickles(done: Repaired, bad: Mapping[str, Finding], scratch: Path) -> None:
    """Of a bank of ours: a file is mended where its tensor, written anew, is what the ledger says was written."""
    directory = done.before.bank
    gone = [each for each in done.before.problems if each.kind == "missing" and each.detail]
    ledger = Ledger(directory, scratch)  # deletes what of it is damaged
    bank = Manifest.read(directory)
    lost = gone
    for finding in bad.values():
        entry = ledger.entries.get(finding.name)
        if entry is not None and finding.kind == "checksum" and _write_anew(directory, entry, bank, scratch):
            done.mended.append(finding)
        elif finding.kind != "damaged-ledger":
            lost.append(finding)
            done.to_extract.append(finding)
        else:
            done.to_extract.append(finding)
    # First the ledger: a reader must not look for what is about to be renamed.
    ledger.append(Entry(finding.name, failure=_reason(finding)) for finding in lost)
    for finding in lost:
        _set_aside(done, directory / ezhoi.pickle_name(finding.name))
    ledger.compact()


def _write_anew(directory: Path, entry: Entry, bank: Manifest, scratch: Path) -> bool:
    """Write the tensor in a pickle as patchbank does, if that gives the bytes that were there once."""
    path = directory / ezhoi.pickle_name(entry.key)
    try:
        parts = _own_pickle(path, bank)
    except (BankError, KeyError):
        return False
    if sha256_of_chunks(parts) != entry.sha256:
        return False
    _replace(path, parts, scratch)
    return True


def _reason(finding: Finding) -> str:
    detail = f": {finding.detail}" if finding.detail else ""
    return f"{KINDS[finding.kind].says}{detail}; {_AGAIN}"


def _set_aside(done: Repaired, path: Path) -> None:
    if path.exists():
        done.set_aside.append(set_aside(path).relative_to(done.before.bank).as_posix())


def _new_manifest(report: Report, dataset: str, split: str | None, resize: ResizeMode) -> Manifest:
    model = report.model
    if model is None:
        raise BankError(
            f"The pickles in {report.bank} are of no known model: none has the shape of its patch tokens. There is "
            "nothing to mend: extract them again with `patchbank extract`, here with its --overwrite, or elsewhere."
        )
    return Manifest.of_model(
        model,
        layout="ezhoi",
        dataset=dataset,
        split=split,
        fingerprint=_unknown_fingerprint(model, resize),
        batch_size=1,
        device=UNKNOWN,
        versions={},
        adopted="pickles of unknown making, by their shapes",
    )


def _unknown_fingerprint(model: Model, resize: ResizeMode) -> Fingerprint:
    return Fingerprint(
        model=model.name,
        weights_sha256=UNKNOWN,
        architecture=model.architecture,
        output=UNKNOWN,
        resize=resize,
        preprocessing=UNKNOWN,
        precision=UNKNOWN,
        dtype="float32",
    )


def _adopt(report: Report, listed: Sequence[str], new: Manifest, size_of: SizeOf, progress: Progress) -> Repaired:
    directory = report.bank
    done = Repaired(report, adopted=True)
    files = {ezhoi.pickle_name(key): key for key in listed}
    findings: dict[str, list[Finding]] = {}
    for finding in report.problems:
        findings.setdefault(finding.name, []).append(finding)
    if unread := [finding for finding in report.problems if finding.kind == "unread"]:
        first = unread[0]
        raise BankError(
            f"{len(unread):,} files could not be read, {first.name} for one ({first.detail}). Nothing was changed. See "
            "to the disk or the permissions, and run it again."
        )
    entries: list[Entry] = []
    usual = file_bytes(new)
    with scratch_directory(directory) as scratch:
        remove_ledger(directory)  # what an adoption that was interrupted has left
        names = sorted(name for name, _ in ezhoi.pickles_in(directory))
        for number, name in enumerate(names):
            progress(number + 1, len(names))
            key = files.get(name) or ezhoi.key_of(name)
            if key is None:
                continue
            found = findings.get(files.get(name, name), [])
            path = directory / name
            if any(KINDS[each.kind].mend == "extract" for each in found):
                _set_aside(done, path)
                done.to_extract.append(replace(found[0], name=key))
                entries.append(Entry(key, failure=_reason(found[0])))
                continue
            if found:
                _mend(path, new, scratch)
                done.mended += found
            size = path.stat().st_size
            entries.append(Entry(key, size_of(key), sha256_of(path), bytes=None if size == usual else size))
        done.to_extract += [each for each in report.problems if each.kind == "missing"]
        Ledger(directory, scratch).append(entries)
        new.create(directory, scratch)
    return done


def _rename(report: Report, listed: Sequence[str], dataset: str, split: str | None) -> bool:
    """Give features that were adopted without a list, under names without extensions, the list's names.

    Their checksums stay what they were. Returns whether there were any.
    """
    directory, found = report.bank, report.manifest
    assert found is not None
    files = {ezhoi.pickle_name(key): key for key in listed}
    known = set(listed)
    old = read_ledger(directory, damaged="skip")
    new = {key: files.get(ezhoi.pickle_name(key), key) if key not in known else key for key in old}
    if all(key == name for key, name in new.items()):
        return False
    with scratch_directory(directory) as scratch:
        Ledger(directory, scratch).replace(entry._replace(key=new[key]) for key, entry in old.items())
        if found.dataset == UNKNOWN:
            replace(found, dataset=dataset, split=split).replace(directory, scratch)
    return True


def _mend(path: Path, bank: Manifest, scratch: Path) -> None:
    """Write the tensor in a pickle as patchbank does: CPU, float32, its own storage, no [CLS]."""
    _replace(path, _own_pickle(path, bank), scratch)


def _own_pickle(path: Path, bank: Manifest) -> Sequence[bytes | memoryview]:
    tensor: Tensor = read_pickle(path).to(getattr(torch, bank.dtype))
    return to_pickle(tensor[1:] if tensor.shape[0] == bank.shape[0] + 1 else tensor)


def _replace(path: Path, parts: Sequence[bytes | memoryview], scratch: Path) -> None:
    temporary = scratch / path.name
    write_and_sync(temporary, parts)
    temporary.rename(path)
    fsync_directory(path.parent)


def confirm(directory: Path, found: Manifest, known: Manifest, evidence: str) -> None:
    """Write down what an adopted bank's features have been found to be, by computing some anew."""
    with scratch_directory(directory) as scratch:
        replace(known, adopted=f"{found.adopted}; {evidence}").replace(directory, scratch)
