"""``patchbank demo``: a full run on a few public-domain photographs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.panel import Panel

from patchbank.cli import report
from patchbank.cli.console import plain_table, say, stderr, stdout
from patchbank.cli.extract import name_bank
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import StopOnSignal
from patchbank.config import ExtractConfig
from patchbank.encoders.openai.registry import get_model
from patchbank.errors import BankError
from patchbank.files import bytes_text
from patchbank.show.names import page_beside

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset
    from patchbank.encoders.runner import Runner

_MODEL = "ViT-B/16"

_UNTRAINED = (
    "No official ViT-B/16 checkpoint was found, so this demo runs on UNTRAINED random weights.\n"
    "The pipeline is the real one; the features mean nothing. For real ones put OpenAI's ViT-B-16.pt at\n"
    "{place}\nor into ~/.cache/clip, and run the demo again."
)

_READ_PICKLE = """\
import pickle
with open({file!r}, "rb") as file:
    print(pickle.load(file).shape)"""

_READ_BANK = """\
import patchbank
bank = patchbank.open_bank({bank!r})
print(bank[{key!r}].shape, bank.transform({key!r}))"""


def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the demo's EZ-HOI root.")] = Path(
        "patchbank-demo"
    ),
) -> None:
    """Extract both datasets of a small EZ-HOI root made from public-domain photographs, and check the result.

    patchbank demo
    """
    from patchbank.bank.pickles import bank_directory, bank_name
    from patchbank.bank.reader import open_bank
    from patchbank.datasets import SPLITS, load_dataset
    from patchbank.datasets.example import write_sample
    from patchbank.encoders.openai.checkpoints import find_checkpoint
    from patchbank.encoders.openai.untrained import write_untrained
    from patchbank.encoders.runner import Runner
    from patchbank.extraction.devices import Devices, decide
    from patchbank.extraction.plan import check_places, make_plan
    from patchbank.extraction.run import execute

    root = directory.expanduser()
    with busy("laying out the photographs"):
        write_sample(root)
    checkpoints = root / "checkpoints" / "pretrained_CLIP"
    model = get_model(_MODEL)
    weights = None
    if find_checkpoint(model, None, checkpoints) is None:
        place = checkpoints / model.file_name
        stderr.print(Panel(_UNTRAINED.format(place=place), title="untrained weights", border_style="red", expand=False))
        weights = root / "checkpoints" / "untrained" / model.file_name
        if not weights.exists():
            with busy("making untrained weights"):
                write_untrained(model, weights)

    config = ExtractConfig(model=_MODEL, weights=weights, checkpoints=checkpoints, overwrite=True)
    plans = []
    with busy("looking at photographs and weights"):
        device = Devices(decide(config).names[:1])  # one, so that the encoder runs in this process
        for name, splits in SPLITS.items():
            for split in splits:
                out = bank_directory(root, name) / bank_name(model.bank_prefix, name, split)
                plans.append(make_plan(load_dataset(name, root, split), out, config, device))
    check_places(plans)

    table = plain_table("bank", ">features", ">shape", ">bytes", ">recomputed")
    runner, pages = None, []
    first: tuple[Bank, str] | None = None  # a bank, and the key of an image with pairs
    activity = Activity()
    for plan, *later in (plans[number:] for number in range(len(plans))):
        with activity:
            name_bank(activity, plan, later, len(plans))
            # Not `load_runner`: an interrupted demo may have left nothing to do, and the check needs it.
            runner = runner or Runner(
                *(plan.encoder, plan.devices.first), batch_size=plan.manifest.batch_size, stage=activity.stage
            )
            with StopOnSignal() as signals:
                execute(plan, runner if plan.todo else None, progress=activity, stop=signals.stop)
        if signals.exit_code is not None:
            raise typer.Exit(signals.exit_code)
        bank = open_bank(plan.out)
        error = check(bank, plan.dataset, runner)
        size = bytes_text(bank.bytes_on_disk())
        table.add_row(plan.out.name, str(len(bank)), str(bank.manifest.shape), size, f"{error:.0e}")
        pages.append(report.write(bank, page_beside(plan.out), plan.dataset))
        first = first or (bank, next(sample.key for sample in plan.dataset.with_pairs().samples))
    say(f"\nBanks in {bank_directory(root, 'hicodet')} and {bank_directory(root, 'vcoco')}:\n")
    stdout.print(table)
    say(
        "\nChecked: every file's checksum and numbers, and one image of each bank, extracted again\n"
        "(the last column is the relative error)."
    )
    assert first is not None
    bank, key = first
    say("\nReading one, with only torch installed, as EZ-HOI does:\n")
    say(_READ_PICKLE.format(file=str(bank.file(key))), "cyan")
    say("\nOr through its bank, which knows the image's geometry too:\n")
    say(_READ_BANK.format(bank=str(bank.path), key=key), "cyan")
    say(f"\nNext: patchbank info {shlex.quote(str(bank.path))}")
    say(f"      patchbank show {shlex.quote(str(bank.path))} {shlex.quote(key)}")
    if weights is not None:
        say(f"Other commands on {root} need --weights {shlex.quote(str(weights))},")
        say(f"and extract and doctor --model {_MODEL} too.")
        say("These features are of untrained weights: they mean nothing.", "bold red")
    say("\nThe features to look at, in a browser, one page a bank:")
    for page in pages:
        say(f"  {page.path.resolve().as_uri()}", "cyan")


def check(bank: Bank, dataset: Dataset, runner: Runner) -> float:
    """Verify every feature, and extract one image again: the relative error. Raises BankError on any problem."""
    from patchbank.bank.check import verify
    from patchbank.extraction.recompute import compare_sample

    report = verify(bank.path, [sample.key for sample in dataset.samples])
    compare_sample(report, dataset, runner, bank.manifest.input, 1)
    for finding in report.problems:
        raise BankError(f"{bank.path}: {finding.name}: {finding.reason}.")
    [(key, error)] = report.sample.items()
    if error > 2e-6:
        raise BankError(f"{bank.file(key)} differs from a fresh extraction: relative error {error:.1e}.")
    return error
