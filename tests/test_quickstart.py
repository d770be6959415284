"""examples/quickstart.ipynb: committed without outputs, and executed in a kernel of its own, as a reader runs it."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import matplotlib.font_manager  # it says so in the notebook, if it has to look for fonts there
import nbformat
import pytest
from nbclient import NotebookClient

from patchbank.encoders import trained
from tests.support import REPOSITORY

NOTEBOOK = REPOSITORY / "examples/quickstart.ipynb"

Executed = tuple[str, dict[str, list[Any]]]


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert NOTEBOOK.read_text() == nbformat.writes(notebook) + "\n"  # as Jupyter writes it
    assert {*notebook.metadata} == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}  # no machine's version
    for cell in notebook.cells:
        assert not cell.metadata
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_its_links_lead_to_files() -> None:
    text = "".join(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((.*?)\)", text)
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.fixture(scope="module", params=[pytest.param("untrained", marks=pytest.mark.full), "trained"])
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The kind of its weights, and what each cell put out, by its id."""
    home = tmp_path_factory.mktemp("quickstart")
    environment = os.environ | {
        "HOME": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
    }
    if request.param == "trained":  # in the cache of its home directory: pip has nothing to fetch
        cached = home / ".cache/patchbank" / trained.PATH.name
        cached.parent.mkdir(parents=True)
        cached.symlink_to(request.getfixturevalue("trained_weights"))
    else:
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(home)}}).execute(env=environment)
    return request.param, {cell.id: cell.get("outputs", []) for cell in notebook.cells}


def data(outputs: list[Any], kind: str) -> list[str]:
    """What was displayed of a kind, in order."""
    return [each.data[kind] for each in outputs if "data" in each and kind in each.data]


def test_it_says_what_its_features_are_worth(executed: Executed) -> None:
    weights, outputs = executed
    assert "".join(each.text for each in outputs["prepare"] if each.output_type == "stream").count("UNTRAINED") == (
        weights == "untrained"
    )
    [bank] = data(outputs["open"], "text/html")
    assert ("UNTRAINED" in bank) == (weights == "untrained")
    train, test = outputs["probe"][0].text.splitlines()
    assert train == "train: 4 of 4 verbs right"
    assert re.fullmatch(f"test: [{'0-4' if weights == 'untrained' else '34'}] of 4 verbs right", test)


def test_every_output_is_clean(executed: Executed) -> None:
    _, outputs = executed
    for name, each in outputs.items():
        assert not [one for one in each if one.get("name") == "stderr"], f"{name}: a warning, or a bar of lines"
        assert "\\u001b" not in json.dumps(each), f"{name}: codes of a terminal"
        assert not data(each, "application/vnd.jupyter.widget-view+json"), f"{name}: a widget, which is not saved"


def test_objects_show_themselves(executed: Executed) -> None:
    _, outputs = executed
    for name in ("prepare", "open", "transform", "samples", "report"):
        assert len(data(outputs[name], "text/html")) == 1, name
    assert "<svg" in data(outputs["transform"], "text/html")[0]
    assert "inspect" in data(outputs["samples"], "text/html")[0]
    assert len(data(outputs["show"], "image/png")) == 1


def test_extract_leaves_one_full_bar(executed: Executed) -> None:
    _, outputs = executed
    for name, images in (("extract", 7), ("test", 5)):
        bar, summary = data(outputs[name], "text/plain")
        assert re.fullmatch(rf"extracted: 100%\|\u2588+\| {images}/{images} \[.*images/s\]", bar)
        assert f"{images} features" in summary
