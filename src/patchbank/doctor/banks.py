"""The banks that EZ-HOI reads: how much of each is there, who made it, and what is left to do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from patchbank.bank import ezhoi
from patchbank.bank.layouts import layout_in, manifest_in
from patchbank.bank.ledger import read_ledger
from patchbank.bank.manifest import FILE_NAME, Manifest
from patchbank.bank.pickles import pickle_bytes
from patchbank.bank.writer import bank_state, disk_bytes
from patchbank.config import ExtractConfig
from patchbank.doctor.directories import closed
from patchbank.doctor.findings import Finding, Level, extract_command, given, run, shell
from patchbank.doctor.splits import Split
from patchbank.doctor.timing import Speed
from patchbank.encoders.openai.registry import Model
from patchbank.errors import BankError
from patchbank.extraction.plan import make_fingerprint
from patchbank.files import bytes_text

_OPTIONS = {"dtype": "--dtype", "resize": "--resize", "precision": "--precision"}
# A feature of another size than the usual one: the stock package's (511,) tensor, and a slice of its batch.
_TINY, _HUGE = 0.1, 1.1


@dataclass(frozen=True, kw_only=True)
class BankState:
    """One bank that EZ-HOI expects.

    Attributes:
        split, model: what it is of.
        directory: where it is, or will be.
        done: listed images whose feature is there.
        bytes_needed: what the others take.
        completable: whether an extraction would go on with what is there.
        finding: all of it.
    """

    split: Split
    model: Model
    directory: Path
    done: int
    bytes_needed: int
    completable: bool
    finding: Finding

    @property
    def todo(self) -> int:
        """Listed images without a feature."""
        return len(self.split.keys) - self.done


@dataclass(frozen=True)
class _Found:
    """What is in a bank's directory, in words and numbers."""

    level: Level
    text: str
    done: int = 0
    mend: str | None = None
    completable: bool = True
    made_by: str | None = None
    pickles: int = 0


def examine_banks(
    root: Path,
    splits: Sequence[Split],
    models: Sequence[Model],
    config: ExtractConfig,
    weights: Mapping[str, str],
    speeds: Mapping[str, Speed],
) -> list[BankState]:
    """Every bank of these splits and models.

    Args:
        weights: model name -> SHA-256 of the weights that an extraction would take.
        speeds: model name -> its speed; those that were not measured are not in it.
    """
    states = []
    for split in splits:
        for model in models:
            name = ezhoi.bank_name(model.bank_prefix, split.dataset, split.split)
            directory = ezhoi.bank_directory(root, split.dataset, config.layout or "ezhoi") / name
            wanted = _manifest(split, model, replace(config, model=model.name), weights[model.name])
            found = _look(root, directory, split, model, wanted, given(config))
            states.append(_state(split, model, directory, wanted, found, speeds.get(model.name)))
    return states


def _manifest(split: Split, model: Model, config: ExtractConfig, sha256: str) -> Manifest:
    layout = config.layout or "ezhoi"
    return Manifest.of_model(
        model,
        layout=layout,
        dataset=split.dataset,
        split=split.split,
        fingerprint=make_fingerprint(model, sha256, config),
        batch_size=1,  # it changes no figure here, nor does the device
        device="cpu",
        cls=layout == "shards",
        shard_images=1 if layout == "shards" else None,
    )


def _state(
    split: Split, model: Model, directory: Path, wanted: Manifest, found: _Found, speed: Speed | None
) -> BankState:
    todo = len(split.keys) - found.done
    needed = disk_bytes(todo, wanted)
    seconds = todo * speed.seconds if speed else None
    text = found.text
    if todo:
        text += f" To do: {todo:,} images, {bytes_text(needed)}{'' if seconds is None else f', {rough(seconds)}'}."
    finding = Finding(
        what=directory.name,
        level=found.level,
        text=text,
        mend=found.mend,
        data={
            "bank": str(directory),
            "dataset": split.dataset,
            "split": split.split,
            "model": model.name,
            "made_by": found.made_by,
            "pickles": found.pickles,
            "listed": len(split.keys),
            "done": found.done,
            "todo": todo,
            "bytes_needed": needed,
            "seconds": seconds,
        },
    )
    return BankState(
        split=split,
        model=model,
        directory=directory,
        done=found.done,
        bytes_needed=needed,
        completable=found.completable,
        finding=finding,
    )


def _look(
    root: Path, directory: Path, split: Split, model: Model, wanted: Manifest, options: tuple[str, ...]
) -> _Found:
    this = ("--split", split.split, "--model", model.name, *options)
    anew = extract_command(root, split.dataset, *this, "--overwrite")
    try:
        if place := closed(directory) or closed(directory / FILE_NAME):
            mend = run(shell("chmod", "u+rwX", place))
            return _Found("problem", f"{place} cannot be read: permission denied.", mend=mend, completable=False)
        if not os.path.lexists(directory):
            return _Found("ok", "not there yet.")
        if not directory.is_dir():
            mend = run(shell("mv", directory, f"{directory}.aside"))
            return _Found("problem", "it is not a directory.", mend=mend, completable=False)
        pickles = dict(ezhoi.pickles_in(directory))
        if layout_in(directory):
            again = extract_command(root, split.dataset, *this)
            return _own(directory, split, wanted, len(pickles), again, anew)
        if not pickles:
            return _Found("ok", "an empty directory.")
        return _strangers(directory, split, model, pickles, anew)
    except BankError as error:
        return _Found("problem", str(error), mend=f"Restore it, or start anew:\n{run(anew)}", completable=False)
    except OSError as error:
        text = f"it cannot be read: {error.strerror}."
        return _Found("problem", text, mend=run(shell("chmod", "-R", "u+rwX", directory)), completable=False)


def _own(directory: Path, split: Split, wanted: Manifest, pickles: int, again: str, anew: str) -> _Found:
    """What there is of a bank that patchbank made."""
    manifest = manifest_in(directory)
    if manifest is None:
        raise BankError("every shard of it is damaged.")
    present, failed, _ = bank_state(directory, manifest)
    done = sum(key in present for key in split.keys)
    count = f"{done:,} of {len(split.keys):,} there"

    def found(level: Level, text: str, mend: str | None, *, completable: bool = True) -> _Found:
        return _Found(level, text, done, mend, completable, made_by="patchbank", pickles=pickles)

    if differences := manifest.differences(wanted):
        listed = "; ".join(f"{name} {has}, not {would}" for name, has, would in differences)
        same = [word for name, has, _ in differences if name in _OPTIONS for word in (_OPTIONS[name], has)]
        if manifest.decode != wanted.decode:
            same += ["--decode", manifest.decode]
        go_on = f"If that is intended, give extract and doctor {shell(*same)}.\nOr s" if same else "S"
        if any(name == "weights_sha256" for name, _, _ in differences):
            go_on = "If these weights are intended, give extract and doctor --weights FILE with --model.\nOr s"
        return found(
            "problem",
            f"{count}, of other features than this extraction's: {listed}. It would be refused.",
            f"{go_on}tart it anew, which deletes them:\n{run(anew)}",
            completable=False,
        )
    entries = read_ledger(directory, damaged="skip") if manifest.layout == "ezhoi" else {}
    if (lost := sum(entry.failure is None for entry in entries.values()) - len(present)) > 0:
        verify = run(shell("patchbank", "verify", directory))
        mend = f"{verify}\n{run(shell('patchbank', 'repair', directory, '--extract'))}"
        return found("problem", f"{count}; {lost:,} that it lists are gone, or of another size than they had.", mend)
    if failed:
        info = run(shell("patchbank", "info", directory, "--failures"))
        mend = f"{info}\nMend those images, and run:\n{run(again)}"
        return found("note", f"{count}, {len(failed):,} failed.", mend)
    if done < len(split.keys):
        return found("note", f"{count}.", run(again))
    return found("ok", f"complete, {done:,} features.", None)


def _strangers(directory: Path, split: Split, model: Model, pickles: Mapping[str, int], anew: str) -> _Found:
    """What there is of a directory that other code filled."""
    names = {ezhoi.pickle_name(key) for key in split.keys}
    done = len(names & pickles.keys())
    usual = pickle_bytes((model.tokens, model.output_dim), torch.float32)
    tiny = sorted(name for name, size in pickles.items() if size < _TINY * usual)
    huge = sum(size > _HUGE * usual for size in pickles.values())
    text = f"{done:,} of {len(split.keys):,} there, made by other code: there is no {FILE_NAME}."
    verify = run(shell("patchbank", "verify", directory))
    adopt = f"{verify}\n{run(shell('patchbank', 'repair', directory, '--extract'))}"
    restart = f"{adopt}\nOr start anew, which deletes them:\n{run(anew)}"

    def found(level: Level, text: str, mend: str) -> _Found:
        return _Found(level, text, done, mend, completable=False, made_by="other code", pickles=len(pickles))

    if huge:
        text += f" {huge:,} are larger than a feature is ({bytes_text(usual)}): slices that hold their whole batch?"
    if tiny:
        return found(
            "problem",
            f"{text} Too small for features: {len(tiny):,}, {tiny[0]} for one ({pickles[tiny[0]]:,} bytes, not "
            f"{usual:,}). They were cut short, or made with the stock clip package.",
            restart,
        )
    if done < len(split.keys):
        return found("problem", f"{text} An extraction does not go on with it.", restart)
    return found("note", text, verify)


def rough(seconds: float) -> str:
    """A duration for people who are told that it is rough: ``about 3.4 hours``."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"about {count:.1f} {unit}" if count < 10 else f"about {count:.0f} {unit}"
    return "under two minutes"
