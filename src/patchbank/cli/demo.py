"""``patchbank demo``: a full run on a few public-domain photographs."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.panel import Panel

from patchbank.cli import report
from patchbank.cli.console import plain_table, say, stderr, stdout
from patchbank.cli.extract import name_banks
from patchbank.cli.progress import Activity, busy
from patchbank.cli.signals import StopOnSignal
from patchbank.errors import BankError
from patchbank.files import bytes_text
from patchbank.show.names import page_beside

if TYPE_CHECKING:
    from patchbank.bank.reader import Bank
    from patchbank.datasets import Dataset
    from patchbank.encoders.runner import Runner

_NAME = "demo"  # how the names of its banks begin, whatever the model

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
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            metavar="",
            show_default=False,
            help="Fetch no trained weights: use those on this machine, or untrained ones.",
        ),
    ] = False,
) -> None:
    """Extract both datasets of a small EZ-HOI root made from public-domain photographs, and check the result.

    patchbank demo
    """
    from patchbank.bank.pickles import bank_directory, bank_name
    from patchbank.bank.reader import open_bank
    from patchbank.datasets import SPLITS, load_dataset
    from patchbank.demo import prepared
    from patchbank.encoders.runner import Runner
    from patchbank.extraction.devices import Devices, decide
    from patchbank.extraction.plan import check_places, make_plan
    from patchbank.extraction.run import execute

    root = directory.expanduser()
    with busy("preparing photographs and weights"):
        config, untrained = prepared(root, offline, stderr.print)
        config = replace(config, overwrite=True)  # banks of an earlier demo, perhaps of other weights
    if untrained:
        stderr.print(Panel(untrained, title="untrained weights", border_style="red", expand=False))

    plans = []
    with busy("looking at photographs and weights"):
        device = Devices(decide(config).names[:1])  # one, so that the encoder runs in this process
        for name, splits in SPLITS.items():
            for split in splits:
                out = bank_directory(root, name) / bank_name(_NAME, name, split)
                plans.append(make_plan(load_dataset(name, root, split), out, config, device))
    check_places(plans)

    table = plain_table("bank", ">features", ">shape", ">bytes", ">recomputed")
    runner, pages = None, []
    first: tuple[Bank, str] | None = None  # a bank, and the key of an image with pairs
    activity = Activity()
    for plan, *later in (plans[number:] for number in range(len(plans))):
        with activity:
            name_banks(activity, [plan], later, len(plans))
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
    assert first is not None
    bank, key = first
    (height, width), (rows, columns), (count, dim) = bank.manifest.input.size, bank.manifest.grid, bank.manifest.shape
    say(
        f"\nThe model's input is {height} x {width} pixels here (height x width), in {rows} x {columns} patches:\n"
        f"{count} tokens of {dim} numbers for each image."
    )
    say(
        "\nChecked: every file's checksum and numbers, and one image of each bank, extracted again\n"
        "(the last column is the relative error)."
    )
    say("\nReading one, with only torch installed, as EZ-HOI does:\n")
    say(_READ_PICKLE.format(file=str(bank.file(key))), "cyan")
    say("\nOr through its bank, which knows the image's geometry too:\n")
    say(_READ_BANK.format(bank=str(bank.path), key=key), "cyan")
    say(f"\nNext: patchbank info {shlex.quote(str(bank.path))}")
    say(f"      patchbank show {shlex.quote(str(bank.path))} {shlex.quote(key)}")
    options = f"--model {config.model}"
    if config.weights is not None:
        options += f" --weights {shlex.quote(str(config.weights))}"
        say(f"On {root}, extract, import and doctor need {options}")
    if not untrained:
        say("\nYour own images, and a page about them:")
        say(f"  patchbank extract folder IMAGES {options} --out BANK --report", "cyan")
    if untrained:
        say("Other commands need the same --weights.")
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
