"""What there is of HICO-DET and V-COCO: annotation files, images, and names that differ by case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from patchbank.datasets import SPLITS
from patchbank.doctor import mends
from patchbank.doctor.directories import Directories, closed, exists, is_directory
from patchbank.doctor.findings import Finding, Level, relative, run, shell
from patchbank.doctor.misplaced import misplaced
from patchbank.doctor.splits import Split, look_for_images, read_splits

_SHOWN = 3  # names of missing images


def examine_data(root: Path) -> tuple[list[Finding], list[Split]]:
    """What there is of HICO-DET and V-COCO, and the splits whose data set is there at all."""
    directories = Directories()
    findings: list[Finding] = []
    splits: list[Split] = []
    absent = [name for name in SPLITS if directories.twin(root, name) is None]
    for dataset in SPLITS:
        if dataset in absent:
            findings.append(_absent(root, dataset, all(name in absent for name in SPLITS)))
            continue
        found, renames = read_splits(root, dataset, directories)
        findings += [_rename(root, dataset, *rename) for rename in renames]
        for split, finding in found:
            splits.append(split)
            if finding is not None:
                findings.append(finding)
            else:
                look_for_images(root, split, directories)
        mine = [split for split, _ in found]
        findings += _image_findings(root, mine, directories)
    unreadable = {closed(path) or path: reason for path, reason in directories.unreadable.items()}
    findings += [
        Finding(
            what="directory",
            level="problem",
            text=f"{relative(path, root)} cannot be listed or entered: {reason}.",
            mend=run(shell("chmod", "u+rx", path)),
            data={"directory": str(path), "reason": reason},
        )
        for path, reason in unreadable.items()
    ]
    return findings, splits


def _absent(root: Path, dataset: str, alone: bool) -> Finding:
    """There is nothing of a data set; `alone`: nor of the other."""
    if alone:
        return Finding(
            what=dataset,
            level="problem",
            text=f"There is no {dataset}/ in {root}, nor the other data set. Is --root an EZ-HOI checkout?",
            mend="Name the directory that holds hicodet/ or vcoco/:\n$ patchbank doctor --root DIR",
            data={"present": False},
        )
    return Finding(
        what=dataset,
        level="note",
        text=f"There is no {dataset}/: nothing can be extracted of it.",
        mend=f"If you need it, put its lists and images into {root / dataset}, as EZ-HOI's README describes.",
        data={"present": False},
    )


def _rename(root: Path, dataset: str, actual: Path, wanted: Path) -> Finding:
    return Finding(
        what=dataset,
        level="problem",
        text=f"{relative(actual, root)} should be called {relative(wanted, root)}: the names differ by case.",
        mend=run(shell("mv", actual, wanted)),
        data={"cause": "case", "found": str(actual), "expected": str(wanted)},
    )


def _image_findings(root: Path, splits: Sequence[Split], directories: Directories) -> list[Finding]:
    findings: list[Finding] = []
    told: set[tuple[str, Path]] = set()
    for split in splits:
        if not split.keys:
            continue
        findings.append(_counts(root, split, directories))
        if split.by_case:
            actual, listed = split.by_case[0]
            findings.append(
                Finding(
                    what=split.title,
                    level="problem",
                    text=f"{len(split.by_case):,} images have names that differ by case: {actual} is listed as "
                    f"{listed}.",
                    mend=mends.rename_files(split.images, split.by_case),
                    data={"cause": "case", "count": len(split.by_case), "found": actual, "expected": listed},
                )
            )
        findings += [
            misplaced(root, split, place, splits, told)
            for place in split.elsewhere
            if (split.split, place.place) not in told
        ]
    return findings


def _counts(root: Path, split: Split, directories: Directories) -> Finding:
    """How many of a split's images there are. What was found elsewhere is a finding of its own."""
    assert split.annotations is not None
    missing = len(split.keys) - len(split.there)
    listed = f"{len(split.keys):,} images that {relative(split.annotations, root)} lists"
    if not missing:
        text = f"all {listed} are on disk"
    else:
        text = f"{len(split.there):,} of the {listed} are in {relative(split.images, root)}"
    if missing and not is_directory(split.actual):
        link = f"a link to {os.readlink(split.actual)}, " if os.path.islink(split.actual) else ""  # noqa: PTH114, PTH115
        state = "is not a directory" if exists(split.actual) else "is not there"
        text += f", {link}which {state}"
    text += "."
    mend = None
    if split.absent:
        more = ", ..." if len(split.absent) > _SHOWN else ""
        text += f" Nowhere in this root: {len(split.absent):,} ({', '.join(split.absent[:_SHOWN])}{more})."
        mend = mends.fetch_images(split.dataset, split.split, root)
        if split.there:
            mend += "\nOr go on without them: extract lists each as failed, and ends with exit code 1."
    elif missing:
        text += " The others have other names or places, see below."
    level: Level = "problem" if split.absent else "note" if missing else "ok"
    if split.actual in directories.unreadable or closed(split.actual):
        level, mend = "note", None  # the directory has a finding of its own
    return Finding(
        what=split.title,
        level=level,
        text=text,
        mend=mend,
        data={
            "annotations": str(split.annotations),
            "readable": True,
            "images": str(split.images),
            "listed": len(split.keys),
            "found": len(split.there),
            "missing": split.absent[:_SHOWN],
        },
    )
