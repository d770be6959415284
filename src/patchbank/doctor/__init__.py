"""The state of an EZ-HOI root before a long extraction: the plan of every bank, and what plans do not check.

`examine` calls the same `make_plan` as `extract`. If there is no plan, its error names the cause and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patchbank import encoders
from patchbank.bank.parts import third_party
from patchbank.bank.pickles import bank_directory, bank_name, pickle_name, pickles_in
from patchbank.bank.pickling import pickle_bytes
from patchbank.config import ExtractConfig
from patchbank.datasets import SPLITS, Dataset
from patchbank.doctor import checks
from patchbank.doctor.checks import Finding, Level, extract_command, refusal, run, shell
from patchbank.encoders import EZHOI_MODELS
from patchbank.encoders.base import EncoderSpec
from patchbank.errors import PatchbankError
from patchbank.extraction.plan import ExtractPlan, make_plan
from patchbank.features import GRID
from patchbank.files import bytes_text

__all__ = ["Finding", "Level", "Report", "examine"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings.

    Attributes:
        root: the EZ-HOI root.
        sections: title -> findings, in the order of the output.
        commands: what to run when there is no problem; empty if every bank is complete.
    """

    root: Path
    sections: Mapping[str, tuple[Finding, ...]]
    commands: tuple[str, ...]

    @property
    def problems(self) -> list[Finding]:
        """The findings that are problems."""
        return [finding for found in self.sections.values() for finding in found if finding.level == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        findings = [{"section": title, **asdict(each)} for title, found in self.sections.items() for each in found]
        return {
            "root": str(self.root),
            "problems": len(self.problems),
            "commands": list(self.commands),
            "findings": findings,
        }


def examine(
    root: Path, models: Sequence[str] = EZHOI_MODELS, config: ExtractConfig | None = None, *, timing: bool = True
) -> Report:
    """Plan every bank of an EZ-HOI root, and check what plans do not. Writes nothing.

    Args:
        root: the EZ-HOI checkout.
        models: names of the models.
        config: the extraction's configuration; its ``model`` is not used.
        timing: measure decoding and encoding, seconds a model, or half a minute where a batch takes long.

    Raises:
        ConfigError: an unknown model.
    """
    config = config or ExtractConfig()
    chosen = [encoders.random(replace(config, model=name)) for name in dict.fromkeys(models)]
    data, datasets = checks.check_data(root)
    checkpoints = [checks.check_weights(root, model.name, config) for model in chosen]
    device = checks.check_device(chosen, config)
    known = {each.text: each.what for each in (*checkpoints, device) if each.level == "problem"}
    outcomes = [_plan(root, dataset, model, config, known) for dataset in datasets for model in chosen]
    plans = [each for each in outcomes if isinstance(each, ExtractPlan)]
    speeds, measured = checks.measure(plans) if timing else ({}, [])
    banks = [each if isinstance(each, Finding) else _bank(root, each, config, speeds) for each in outcomes]
    return Report(
        root=root,
        sections={
            "Data": tuple(data),
            "Checkpoints": tuple(checkpoints),
            "Environment": (checks.check_clip(root),),
            "This machine": (device, *measured),
            "Banks and disk": (*banks, *checks.check_disks(plans)),
        },
        commands=tuple(_commands(root, plans, config, chosen)),
    )


def _plan(
    root: Path, dataset: Dataset, model: EncoderSpec, config: ExtractConfig, known: dict[str, str]
) -> ExtractPlan | Finding:
    """The plan of one bank, or the finding that explains why there is none.

    `known`: a problem's text -> the thing with the problem. A bank with a known problem refers to it.
    """
    out = bank_directory(root, dataset.name, config.layout or "ezhoi")
    out /= bank_name(encoders.bank_prefix(model.name), dataset.name, dataset.split or "", config.variant)
    try:
        if not config.overwrite and third_party(out):
            return _third_party(root, out, dataset, model, config, dict(pickles_in(out)))
        return make_plan(dataset, out, replace(config, model=model.name))
    except (PatchbankError, OSError) as error:
        finding = refusal(out.name, error)
    if before := known.get(finding.text):
        return Finding(out.name, "note", f"no plan: see {before} above.")
    known[finding.text] = out.name
    return finding


def _bank(root: Path, plan: ExtractPlan, config: ExtractConfig, speeds: Mapping[str, tuple[float, float]]) -> Finding:
    """What a plan says.

    Args:
        speeds: model -> the least and the most seconds per image.
    """
    listed, todo = len(plan.selected), len(plan.todo)
    seconds = [todo * each for each in speeds.get(plan.config.model, ())]
    text = f"complete, {listed:,} features."
    if todo:
        begun = f"{listed - todo:,} of {listed:,} done" if plan.resumed else "not begun"
        time = f", {checks.duration(seconds)}" if seconds else ""
        text = f"{begun}; {todo:,} to do, {bytes_text(plan.bytes_needed)}{time}."
    if plan.to_delete:
        text += f" Replaces {len(plan.to_delete):,} features ({bytes_text(plan.bytes_freed)}), deleted when it ends."
    fix = run(_extract(root, plan, config)) if plan.resumed and todo else None
    if plan.failed_before:
        text += f" {plan.failed_before:,} of these failed before."
        fix = f"{run(shell('patchbank', 'info', plan.out, '--failures'))}\nReplace these images, and run:\n{fix}"
    return Finding(
        plan.out.name,
        "note" if fix or plan.notes else "ok",
        " ".join((text, *plan.notes)),
        fix=fix,
        data={
            "bank": str(plan.out),
            "weights": plan.encoder.weights,
            "done": listed - todo,
            "todo": todo,
            "failed_before": plan.failed_before,
            "bytes_needed": plan.bytes_needed,
            "seconds": seconds,
        },
    )


def _third_party(
    root: Path, out: Path, dataset: Dataset, model: EncoderSpec, config: ExtractConfig, pickles: Mapping[str, int]
) -> Finding:
    """A directory of pickles without a bank; `pickles`: name -> size in bytes."""
    names = [pickle_name(sample.key) for sample in dataset.samples]
    done = sum(name in pickles for name in names)
    usual = pickle_bytes(model.outputs[GRID].shape, torch.float32) if GRID in model.outputs else 0
    odd = sorted(name for name, size in pickles.items() if usual and not 0.9 * usual < size < 1.1 * usual)
    text = f"{done:,} of {len(names):,} features, third-party: pickles without a bank. `extract` does not continue it."
    if odd:
        text += (
            f" {len(odd):,} have an unusual size, such as {odd[0]}: {pickles[odd[0]]:,} bytes, not {usual:,}. They are "
            "cut short, of another dtype, (511,) tensors of the stock clip package, or slices that hold their batch."
        )
    made, listed = f"{out}_imported", ("--dataset", dataset.name, "--split", dataset.split, "--root", root)
    weights = ("--weights", config.weights) if config.weights else ()
    steps = (
        shell("patchbank", "verify", out, *listed),
        shell("patchbank", "import", out, made, "--model", model.name, *listed, *weights, "--sample", 20),
        shell("mv", out, f"{out}_third_party") + " && " + shell("mv", made, out),
    )
    return Finding(
        out.name,
        "problem" if odd or done < len(names) else "note",
        text,
        fix=f"Look into it, make a bank of it, and give that the directory's name:\n{run(*steps)}",
        data={"bank": str(out), "third_party": True, "pickles": len(pickles), "done": done, "unusual": len(odd)},
    )


def _commands(
    root: Path, plans: Sequence[ExtractPlan], config: ExtractConfig, models: Sequence[EncoderSpec]
) -> list[str]:
    """One command per dataset, or one per bank if some of its banks have no plan."""
    commands: list[str] = []
    for name in SPLITS:
        own = [plan for plan in plans if plan.dataset.name == name]
        todo = [plan for plan in own if plan.todo]
        if todo and len(own) == len(SPLITS[name]) * len(models):
            names = tuple(model.name for model in models)
            words = [word for each in names if names != EZHOI_MODELS for word in ("--model", each)]
            commands.append(extract_command(root, name, *words, *config.arguments()))
        else:
            commands += [_extract(root, plan, config) for plan in todo]
    return commands


def _extract(root: Path, plan: ExtractPlan, config: ExtractConfig) -> str:
    """The command that executes a plan."""
    which = ("--split", plan.dataset.split, "--model", plan.config.model)
    return extract_command(root, plan.dataset.name, *which, *config.arguments())
