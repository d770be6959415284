"""The state of an EZ-HOI root before hours are spent on it: `examine` looks at everything and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchbank.config import ExtractConfig
from patchbank.doctor.banks import BankState, examine_banks
from patchbank.doctor.checkpoints import examine_checkpoints
from patchbank.doctor.data import examine_data
from patchbank.doctor.disks import examine_disks
from patchbank.doctor.environment import examine_environment
from patchbank.doctor.findings import Finding, Level, Report, extract_command, given
from patchbank.doctor.machine import examine_device, measure, sample
from patchbank.doctor.timing import Speed
from patchbank.encoders.openai.registry import EZHOI_MODELS, get_model

__all__ = ["Finding", "Level", "Report", "examine"]


def examine(
    root: Path, models: Sequence[str] = EZHOI_MODELS, config: ExtractConfig | None = None, *, timing: bool = True
) -> Report:
    """Look at an EZ-HOI root as an extraction of both data sets would find it. Writes nothing.

    Args:
        root: the EZ-HOI checkout.
        models: whose checkpoints and banks are looked at.
        config: what the extraction would be asked for; its ``model`` is not used.
        timing: whether decoding and encoding are measured, which takes some seconds a model.

    Raises:
        ConfigError: there is no such model.
    """
    config = config or ExtractConfig()
    chosen = [get_model(name) for name in dict.fromkeys(models)]
    data, splits = examine_data(root)
    checkpoints = examine_checkpoints(root, chosen, config)
    weights = {
        model.name: str(finding.data.get("sha256") or model.sha256)
        for model, finding in zip(chosen, checkpoints, strict=True)
    }
    device_finding, device = examine_device(chosen, config)
    speeds, measured = dict[str, Speed](), list[Finding]()
    if timing and device is not None:
        speeds, measured = measure(chosen, config, device, sample(splits))
    banks = examine_banks(root, [split for split in splits if split.keys], chosen, config, weights, speeds)
    return Report(
        root=root,
        sections={
            "Data": tuple(data),
            "Checkpoints": tuple(checkpoints),
            "Environment": tuple(examine_environment(root)),
            "Banks and disk": (*(bank.finding for bank in banks), *examine_disks(banks, root)),
            "This machine": (device_finding, *measured),
        },
        commands=tuple(_commands(root, banks, given(config), chosen_by_name=tuple(models) != EZHOI_MODELS)),
    )


def _commands(root: Path, banks: Sequence[BankState], options: Sequence[str], *, chosen_by_name: bool) -> list[str]:
    """What to run: a command a data set, or one a bank where other code's banks are to be left alone."""
    commands: list[str] = []
    for dataset in dict.fromkeys(bank.split.dataset for bank in banks):
        own = [bank for bank in banks if bank.split.dataset == dataset]
        todo = [bank for bank in own if bank.todo]
        if not todo:
            continue
        if all(bank.completable for bank in own):
            named = dict.fromkeys(bank.model.name for bank in own) if chosen_by_name else ()
            words = [word for name in named for word in ("--model", name)]
            commands.append(extract_command(root, dataset, *words, *options))
        else:
            commands += [
                extract_command(root, dataset, "--split", bank.split.split, "--model", bank.model.name, *options)
                for bank in todo
                if bank.completable
            ]
    return commands
