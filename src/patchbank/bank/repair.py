"""Fixing a bank in place without its images: damaged features go into quarantine and are listed as failed.

The next extraction makes them again. Only banks with an index are repaired; `patchbank import` makes one of other
pickles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from patchbank.bank.check import Finding, Progress, Report, SizeOf, verify
from patchbank.bank.index import joined
from patchbank.bank.manifest import Manifest
from patchbank.bank.parts import find_payload, read_parts, refuse_link
from patchbank.bank.pickles import pickle_name
from patchbank.bank.pickling import to_pickle
from patchbank.bank.unpickling import read_pickle
from patchbank.bank.writer import revoke
from patchbank.errors import BankError
from patchbank.files import fsync_directory, quarantine, scratch_directory, sha256_of_chunks, write_and_sync

_AGAIN = "to be extracted again"


@dataclass
class Repaired:
    """What `repair` did.

    Attributes:
        before: what was found.
        fixed: features whose files were written again with the bytes that the index lists.
        quarantined: new names of the unusable files.
        to_extract: images without features now, and why.
        unread: features that could not be read, perhaps temporarily; they were left as they are.
    """

    before: Report
    fixed: list[Finding] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    to_extract: list[Finding] = field(default_factory=list)
    unread: list[Finding] = field(default_factory=list)


def repair(
    bank: Path,
    listed: Sequence[str] | None = None,
    *,
    progress: Progress | None = None,
    size_of: SizeOf | None = None,
) -> Repaired:
    """Fix what needs no images, and quarantine other damaged features.

    Args:
        listed: the expected keys; None compares with no list.
        progress: called with the numbers of features verified, and of all.
        size_of: the sizes of the images, as in `verify`.

    Raises:
        BankError: there is no bank, or it has another format version.
    """
    if (payload := find_payload(bank)) is None:
        raise BankError(
            f"{bank} is not a bank of patchbank: nothing in it says what its files should hold. `patchbank verify` "
            "checks pickles, and `patchbank import` makes a bank of them."
        )
    refuse_link(bank)
    report = verify(bank, listed, progress, size_of=size_of)
    done = Repaired(report)
    damaged: dict[str, str] = {}
    parts = read_parts(payload, "quarantine", reasons=damaged)
    entries = joined(parts)
    lost: list[Finding] = []  # unusable features that the index lists
    for finding in {each.name: each for each in reversed(report.problems)}.values():
        entry = entries.get(finding.name)
        if finding.kind in ("unread", "components"):
            done.unread.append(finding)
        elif entry is None or entry.sha256 is None:
            done.to_extract.append(finding)
        else:
            lost.append(finding)
    with scratch_directory(bank) as scratch:
        done.quarantined += sorted(damaged)
        if payload.layout == "ezhoi" and report.manifest:
            for each in [each for each in lost if each.kind == "checksum"]:
                sha256 = entries[each.name].sha256 or ""
                if _restore(bank / pickle_name(each.name), sha256, report.manifest, scratch):
                    done.fixed.append(each)
                    lost.remove(each)
        # First the index: readers must not look for files that are renamed next.
        revoke(payload, parts, {each.name: f"{each.reason}; {_AGAIN}" for each in lost}, scratch)
        if payload.layout == "ezhoi":
            # A repair that was killed here has revoked others.
            revoked = [key for key, entry in entries.items() if (entry.failure or "").endswith(_AGAIN)]
            for key in (*(each.name for each in lost), *revoked):
                if os.path.exists(path := bank / pickle_name(key)):  # noqa: PTH110 (no error of a long name)
                    done.quarantined.append(quarantine(path).relative_to(bank).as_posix())
    wanted = {each.name for each in lost} if listed is None else set(listed)
    done.to_extract += [each for each in lost if each.name in wanted]
    return done


def _restore(path: Path, sha256: str, manifest: Manifest, scratch: Path) -> bool:
    """Write the tensor in a pickle as patchbank does, if the result is the bytes that the index lists."""
    try:
        tensor = read_pickle(path).to(getattr(torch, manifest.dtype))
        parts = to_pickle(tensor[1:] if tensor.shape[0] == manifest.shape[0] + 1 else tensor)
    except BankError:
        return False
    if sha256_of_chunks(parts) != sha256:
        return False
    temporary = scratch / path.name
    write_and_sync(temporary, parts)
    temporary.rename(path)
    fsync_directory(path.parent)
    return True
