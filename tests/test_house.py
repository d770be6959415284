"""Imports run one way, as docs/why/architecture.md lists the rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import patchbank
from tests.support import REPOSITORY

ROOT = Path(patchbank.__file__).parent
MODULES = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}


def imports(node: ast.AST) -> Iterator[str]:
    """The modules of patchbank that a module imports, at once or within a function; not those for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom):
            assert not child.level, "a relative import does not name its room"
            names = [f"{child.module}.{each.name}" for each in child.names]
            yield from (name if name in MODULES else child.module for name in names)
        elif isinstance(child, ast.Import):
            yield from (each.name for each in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            yield from (each.value for each in ast.walk(child) if isinstance(each, ast.Constant))
        yield from imports(child)


IMPORTS = {name: set(imports(ast.parse(path.read_text()))) & MODULES.keys() for name, path in MODULES.items()}


def room(module: str) -> str:
    """What lies directly in the package: a folder or a file."""
    return f"{module}.".split(".")[1]


def listed() -> list[str]:
    text = (REPOSITORY / "docs/why/architecture.md").read_text()
    tree = text.split("src/patchbank/\n")[1].split("```")[0]
    return [name.removesuffix(".py") for name in re.findall(r"^  (\w+)(?:\.py|/) ", tree, re.MULTILINE)]


def test_no_module_imports_itself_in_a_circle() -> None:
    # The package itself is left out: it names modules that it imports when they are asked for.
    graph = {name: found - {name, "patchbank"} for name, found in IMPORTS.items()}
    assert list(TopologicalSorter(graph).static_order())


def test_only_the_door_of_the_encoders_and_the_demo_know_a_family() -> None:
    family = "patchbank.encoders.openai"
    knowing = {name for name, found in IMPORTS.items() if any(f"{each}.".startswith(f"{family}.") for each in found)}
    assert {name for name in knowing if not name.startswith(family)} == {"patchbank.encoders", "patchbank.demo"}


def test_a_bank_knows_neither_encoders_nor_decoders() -> None:
    found = set().union(*(found for name, found in IMPORTS.items() if room(name) == "bank"))
    assert not {room(name) for name in found} & {"encoders", "images", "preprocess"}


def test_imports_run_up_the_list() -> None:
    order = listed()
    assert order[0] == "__init__"
    assert set(order[1:]) == {room(name) for name in MODULES} - {"", "__main__"}
    wrong = [
        f"{name} imports {found}"
        for name, all_found in IMPORTS.items()
        for found in all_found
        if room(name) in order and room(found) in order and order.index(room(found)) > order.index(room(name))
    ]
    assert not wrong
