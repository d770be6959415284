"""Whether the disks have room for the banks that are not there yet, and take them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from patchbank.doctor.banks import BankState
from patchbank.doctor.directories import closed
from patchbank.doctor.findings import Finding, extract_command, relative, run, shell
from patchbank.files import bytes_text, free_bytes, nearest_existing


def examine_disks(states: Sequence[BankState], root: Path) -> list[Finding]:
    """Whether there is room, on each file system, for all that is to be written there."""
    disks: dict[int, list[BankState]] = {}
    for state in states:
        disks.setdefault(_place(state).stat().st_dev, []).append(state)
    findings = []
    for on_disk in disks.values():
        needed = sum(state.bytes_needed for state in on_disk)
        free, target = free_bytes(_place(on_disk[0])), on_disk[0].directory.parent
        directories = sorted({relative(state.directory.parent, root) for state in on_disk})
        data = {"directories": directories, "bytes_needed": needed, "bytes_free": free}
        text = f"{bytes_text(needed)} to write into {' and '.join(directories)}, {bytes_text(free)} free."
        if needed > free:
            dataset = on_disk[0].split.dataset
            findings.append(
                Finding(
                    what="disk",
                    level="problem",
                    text=f"{text} That is {bytes_text(needed - free)} too little.",
                    mend=f"Free as much, make {target} a link to a directory on a larger disk, or write "
                    f"elsewhere, DIR:\n{run(extract_command(root, dataset, '--out', 'DIR'))}",
                    data=data,
                )
            )
        else:
            findings.append(Finding(what="disk", level="ok", text=text, data=data))
    findings += [
        Finding(
            what="disk",
            level="problem",
            text=f"{relative(place, root)} may not be written to by this user.",
            mend=run(shell("chmod", "u+rwx", place)),
            data={"directory": str(place), "writable": False},
        )
        for place in dict.fromkeys(_place(state) for state in states if state.todo)
        if not os.access(place, os.W_OK | os.X_OK)
    ]
    return findings


def _place(state: BankState) -> Path:
    """What is there of the way to a bank, as far as it can be seen."""
    hidden = closed(state.directory)
    return nearest_existing(state.directory if hidden is None else hidden)
