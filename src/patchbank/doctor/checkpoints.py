"""The models' checkpoints: where they were looked for, and whether they are OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchbank.config import ExtractConfig
from patchbank.doctor.directories import closed, is_file
from patchbank.doctor.findings import Finding, relative, run, shell
from patchbank.encoders.openai.checkpoints import CHECKPOINTS, find_checkpoint, load_visual, places
from patchbank.encoders.openai.registry import Model
from patchbank.errors import WeightsError
from patchbank.files import bytes_text, sha256_of


def examine_checkpoints(root: Path, models: Sequence[Model], config: ExtractConfig) -> list[Finding]:
    """A finding a model. Reads every byte of the files that are there."""
    if config.weights is not None:
        return [_own(model, config.weights) for model in models]
    return [_official(root, model, config.checkpoints or root / CHECKPOINTS) for model in models]


def _own(model: Model, weights: Path) -> Finding:
    try:
        checkpoint = find_checkpoint(model, weights, None)
        assert checkpoint is not None  # a file that was asked for is there, or an error is raised
        load_visual(model, checkpoint, rounding=True)
    except WeightsError as error:
        mend = f"Give --weights a checkpoint of {model.name}, or leave it out for OpenAI's."
        return Finding(what=model.name, level="problem", text=str(error), mend=mend, data={"path": str(weights)})
    return Finding(
        what=model.name,
        level="ok",
        text=f"{weights}, a checkpoint of your own.",
        data={"path": str(weights), "sha256": checkpoint.sha256},
    )


def _official(root: Path, model: Model, checkpoints: Path) -> Finding:
    candidates = places(model, checkpoints)
    looked = [str(path) for path in candidates]

    def finding(path: Path | None, **values: object) -> Finding:
        data = {"looked_in": looked, "path": None if path is None else str(path)}
        return Finding(what=model.name, data=data, **values)  # type: ignore[arg-type]

    path = next((path for path in candidates if is_file(path)), None)
    if path is None and (place := closed(candidates[0])):
        return finding(
            None,
            level="problem",
            text=f"{relative(place, root)} may not be entered, so it cannot be looked for.",
            mend=run(shell("chmod", "u+rx", place)),
        )
    if path is None:
        return _missing(root, model, candidates)
    try:
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        return finding(
            path,
            level="problem",
            text=f"{relative(path, root)} cannot be read: {error.strerror}.",
            mend=run(shell("chmod", "u+r", path)),
        )
    if sha256 == model.sha256:
        return finding(
            path, level="ok", text=f"{relative(path, root)} is OpenAI's ({bytes_text(size)}, SHA-256 checked)."
        )
    after = "the next extraction downloads it" if model.url else "put the right file there"
    return finding(
        path,
        level="problem",
        text=f"{relative(path, root)} is not OpenAI's file: {size:,} bytes with SHA-256 {sha256[:12]}... in place of "
        f"{model.sha256[:12]}.... Its download was probably cut short.",
        mend=f"{run(shell('rm', path))}\nThen {after}. A checkpoint of your own is given with --weights.",
    )


def _missing(root: Path, model: Model, candidates: Sequence[Path]) -> Finding:
    shown = ", ".join(relative(path, root) for path in candidates)
    data = {"looked_in": [str(path) for path in candidates], "path": None}
    if not model.url:
        mend = f"Put it at {candidates[0]}, or give one with --weights."
        return Finding(what=model.name, level="problem", text=f"none of {shown}.", mend=mend, data=data)
    return Finding(
        what=model.name,
        level="note",
        text=f"not on this machine: none of {shown}. The next extraction downloads it, if the network lets it.",
        mend=run(shell("mkdir", "-p", candidates[0].parent), shell("curl", "-fo", candidates[0], model.url)),
        data=data,
    )
