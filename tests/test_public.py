"""The public door: what it exports, and that opening it costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys

import patchbank


def test_every_export_is_there_and_documented() -> None:
    for name in patchbank.__all__:
        assert getattr(patchbank, name).__doc__
    assert dir(patchbank) == sorted(patchbank.__all__)


def test_importing_it_imports_nothing_heavy() -> None:
    program = "import sys, patchbank; assert not {'torch', 'numpy', 'PIL', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_functions_stay_functions_whatever_is_imported_first() -> None:
    program = "import patchbank.extraction.run, patchbank; assert callable(patchbank.extract)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_banks_methods_state_the_arguments_of_their_functions() -> None:
    Bank = patchbank.Bank
    for method, function in ((Bank.show, patchbank.show_features), (Bank.report, patchbank.write_report)):
        wanted = list(inspect.signature(function).parameters.values())[1:]
        assert list(inspect.signature(method).parameters.values())[1:] == wanted
