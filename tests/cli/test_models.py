"""`patchbank models`: names, and what is said of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from patchbank import ExtractConfig
from patchbank.encoders import FAMILIES, bank_prefix, describe, known, matching, random
from patchbank.encoders.transformers.configuration import KINDS
from patchbank.errors import ConfigError
from tests.support import REPOSITORY, patchbank

OPENAI = ["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]


@pytest.fixture
def toys() -> Iterator[None]:
    """Families: the toy, and one whose package is missing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(FAMILIES):
            patch.delitem(FAMILIES, name)
        patch.setitem(FAMILIES, "toy", "tests.toy_family")
        patch.setitem(FAMILIES, "gone", "tests.gone_family")
        patch.setitem(sys.modules, "tests.gone_family", _Gone)  # type: ignore[arg-type]
        yield


class _Gone:
    @staticmethod
    def names() -> list[str]:
        raise ConfigError('--model gone/... needs gone: pip install "patchbank[gone]"')


def rows(*arguments: str) -> list[list[str]]:
    """The lines of the table, in words."""
    return [line.split() for line in patchbank("models", *arguments, tiny=False, check=0).stdout.splitlines()]


def test_without_a_pattern_openais_and_the_families(toys: None) -> None:
    head, *found = rows()
    assert head == ["model", "input", "grid", "dim", "prefix", "text"]
    assert found[1] == ["ViT-B/16", "224x224", "14x14", "512", "1", "yes"]
    assert [each[0] for each in found[:4]] == OPENAI
    text = "\n".join(" ".join(each) for each in found[4:])
    assert "toy/: 2 known by name. patchbank models 'toy/*'" in text
    assert 'gone/: --model gone/... needs gone: pip install "patchbank[gone]"' in text


def test_a_pattern_is_of_its_family_or_of_all(toys: None) -> None:
    assert rows("toy/S*")[1:] == [["toy/small", "24x40", "3x5", "6", "5"]]
    *found, closing = rows("*l*")[1:]
    assert [each[0] for each in found if each] == [*OPENAI[2:], "toy/small"]
    assert closing[:4] == ["Not", "searched:", "gone/:", "pip"]
    assert [each[0] for each in rows("vit-b-16")[1:]] == ["ViT-B/16"]


def test_json_has_the_same(toys: None) -> None:
    found = json.loads(patchbank("models", "toy/*", "--json", check=0).stdout)
    expected = {"name": "toy/other", "size": [24, 40], "grid": [3, 5], "dim": 6, "prefix": 5, "text": False}
    assert found["models"][1] == expected and list(found) == ["models"]
    assert json.loads(patchbank("models", "*l*", "--json", check=0).stdout)["not_searched"] == ["gone"]
    every = json.loads(patchbank("models", "--json", tiny=False, check=0).stdout)
    assert [each["name"] for each in every["models"]] == OPENAI
    assert [(each["family"], each.get("names")) for each in every["families"]] == [("toy", 2), ("gone", None)]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("toy/smoll*", "Did you mean 'toy/small*'? `patchbank models 'toy/*'` lists all."),
        ("*zzz*", "No model matches '*zzz*'. `patchbank models '*'` lists all."),
        ("ViT-B/61", "There is no model 'ViT-B/61'. Did you mean ViT-B/16?"),
        ("small*", "Did you mean '*small*'?"),
        ("llama*", "No model matches 'llama*'. `patchbank models '*'` lists all."),
        ("", "`patchbank models '*'` lists those of other families"),
        ("toy/mall*", "Did you mean 'toy/*mall*'?"),
        ("*zzz*", 'Not searched: gone/: pip install "patchbank[gone]"'),
        ("small", "`patchbank models '*small*'` lists those of other families: toy/, gone/."),
        ("org/small", "Did you mean transformers/org/small, of the Hugging Face hub?"),
        ("gone/*", 'needs gone: pip install "patchbank[gone]"'),
    ],
)
def test_what_matches_nothing(toys: None, pattern: str, words: str) -> None:
    done = patchbank("models", pattern, tiny=False, check=2)
    assert words in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/resnet18", "timm/resnet18 is no vision transformer: ResNet has no grid of patch tokens."),
        ("open_clip/RN50-quickgelu:openai", "is no vision transformer: it has no grid of patch tokens."),
    ],
)
def test_a_name_of_another_architecture_says_why(name: str, words: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    assert words in patchbank("models", name, tiny=False, check=2).stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lists_models_and_describes_them_as_it_makes_them(family: str) -> None:
    """One of each, without weights and without a network."""
    try:
        names = known(family)
    except ConfigError as error:
        pytest.skip(str(error))
    assert (names, []) == matching(f"{family}/*") and len(names) == len(set(names))
    assert all(each.startswith(f"{family}/") and bank_prefix(each) for each in names)
    name = next(name for name in names if "base" in name or "B-16" in name)
    made = describe(name)
    assert made is not None and made.name == name
    if family == "transformers":  # of a repository, which is not here
        return
    spec = random(ExtractConfig(model=name))
    assert (made.size, made.grid) == (spec.input.size, spec.input.grid)
    assert spec.outputs["patch_tokens"].shape == (made.grid[0] * made.grid[1], made.dim)


@pytest.mark.full
def test_a_reader_that_has_read_enough_ends_it() -> None:
    words = [sys.executable, "-m", "patchbank", "models", "ViT*"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as closed:
        done = subprocess.run(words, cwd=REPOSITORY, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and not {"error", "Traceback"} & {*re.findall(r"\w+", done.stderr)}


@pytest.mark.full
def test_the_page_of_models_has_what_the_command_says() -> None:
    page = (REPOSITORY / "docs/reference/models.md").read_text()
    shown = re.findall(r"^\| `(.+?)` \| (.*) \|$", page.split("## Tested models")[1], flags=re.MULTILINE)
    assert {name for name, _ in shown} >= {*OPENAI, *known("transformers")}
    for name, row in shown:
        try:
            made = describe(name)
        except ConfigError as error:
            pytest.skip(str(error))
        assert made is not None
        (h, w), (rows, columns) = made.size, made.grid
        facts = [f"{h}x{w}", f"{rows}x{columns}", str(made.dim), str(made.prefix), "yes" * made.text]
        assert [each.strip() for each in row.split("|")] == facts
    types = set(re.findall("`([^`]+)`", page.split("## transformers")[1].split("Others are")[0]))
    assert types >= {*KINDS}
