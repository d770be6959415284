"""A bank's card for the hub: its front matter, its snippets, what it says, and what data cannot make it say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

from patchbank import Bank, ExtractConfig, extract, load_dataset, open_bank
from patchbank.bank.convert import convert
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.datasets.boxes import annotated_pairs
from patchbank.datasets.samples import Failure
from patchbank.encoders import licence_of
from patchbank.encoders.openai.registry import MODELS
from patchbank.features import CLS, GRID, UNKNOWN
from patchbank.show.card import ERRORS, card_of
from patchbank.show.names import plain
from tests.support import REPOSITORY, pairs_root, patchbank, photographs, tiny_manifest

HOSTILE = [
    "a|b`c``d.jpg",
    "![x](javascript:alert(1))<script>alert(2)</script>.jpg",
    "` <img src=x onerror=alert(3)> `",
    "---\nlicense: mit\n---\n# heading\n```\n\"'}}{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\u202etxt \\` &lt; *b* _i_ $x$ www.evil.example a@b.c ![]",
]


def made_bank(place: Path, keys: Sequence[str], failures: Sequence[str] = (), **changes: Any) -> Bank:
    """A bank of random features, with [CLS]."""
    manifest = replace(tiny_manifest("shards", "float16"), **changes)
    outputs = {name: torch.randn(output.shape) for name, output in manifest.outputs.items()}
    with BankWriter(place, manifest, [*keys, *failures]) as writer:
        writer.add([Feature(key, outputs, (64, 48)) for key in keys], [Failure(key, key) for key in failures])
    return open_bank(place)


def blocks(card: str, language: str) -> list[str]:
    """The fenced code of a language, as a Markdown parser finds it."""
    tokens = MarkdownIt().parse(card.split("---\n", 2)[2])
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def front_matter(card: str) -> dict[str, Any]:
    hub = pytest.importorskip("huggingface_hub")
    data: dict[str, Any] = hub.DatasetCard(card).data.to_dict()
    return data


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("card") / "secret-place" / "images"
    photographs(place, 3)
    (place / "broken.jpg").write_bytes(b"")
    return place


@pytest.mark.parametrize(
    ("layout", "dtype", "output"),
    [("shards", "int8", ("cls", "patch_tokens")), ("shards", "bfloat16", ("cls",)), ("ezhoi", "float16", ())],
)
def test_its_snippets_run_and_read_the_bank(
    layout: Any,
    dtype: Any,
    output: tuple[str, ...],
    images: Path,
    tiny_config: ExtractConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "shared" / "bank"
    extract(load_dataset("folder", images), place, replace(tiny_config, layout=layout, dtype=dtype, output=output))
    out = place.parent / "README.md"
    printed = patchbank("card", place, "-o", out, "--license", "cc-by-4.0", check=0).stdout
    assert printed.startswith(str(out))
    card, bank = out.read_text(), open_bank(place)
    assert front_matter(card)["license"] == "cc-by-4.0"
    key = next(iter(bank))
    for root in (place, place.parent):
        own, alone = blocks(card_of(bank, root), "python")
        monkeypatch.chdir(root)
        names: dict[str, Any] = {}
        exec(own, names)
        assert torch.equal(names.pop("feature"), bank[key]) and ("grid" in names) == (GRID in bank.manifest.outputs)
        exec(alone, names)
        assert torch.equal(names["feature"], bank[key])
    assert own in card and alone in card
    monkeypatch.chdir(place)
    [shell] = blocks(card, "sh")
    assert subprocess.check_output(["bash", "-c", shell], text=True).split()[0] == bank.digest
    assert bank.digest in card
    assert bank.digest == json.loads(patchbank("info", place, "--json", check=0).stdout)["checksum"]
    assert bank.digest in patchbank("info", place, check=0).stdout


def test_what_it_says(images: Path, tiny_config: ExtractConfig, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    extract(load_dataset("folder", images), bank, replace(tiny_config, layout="shards", dtype="float16"))
    patchbank("card", bank, "--repo", "org/name", check=0)
    card, made = (bank / "README.md").read_text(), open_bank(bank)
    assert front_matter(card) == {
        "license": "unknown",
        "pretty_name": "name: features of tiny",
        "size_categories": ["n<1K"],
        "task_categories": ["image-feature-extraction"],
        "tags": ["patchbank", "patch-features"],
        "viewer": False,
    }
    assert "open_bank('hf://datasets/org/name')" in card and "`hf://datasets/org/name@COMMIT`" in card
    for words in (
        "- `cls`: (32,) `float16`, block 2, `ln_post`, `proj`\n- `patch_tokens`: (16, 32) `float16`, block 2,",
        "4 rows of 4: token i is row i // 4, column i % 4.",
        f"The greatest relative error measured for `float16`: {ERRORS['float16']}",
        f"- `weights`: `{made.manifest.identity['weights']}`, `SHA-256`\n",
        "The weights are random numbers",
        "32 x 32 pixels (height x width), patches of 8",
        "`center-crop`, `bicubic`, decoder `exact`",
        "- Failed: 1.\n  - `broken.jpg`: `the file is empty`\n",
    ):
        assert words in card, card
    assert len(re.findall("to be filled in", card, re.IGNORECASE)) == 2
    assert "secret-place" not in card and str(tmp_path) not in card and "\n\n\n" not in card
    done = patchbank("card", bank, check=2)
    assert "README.md exists: --overwrite replaces it" in done.stderr
    patchbank("card", bank, "--overwrite", check=0)
    assert "org/name" not in (bank / "README.md").read_text()
    assert "is no name of a licence" in patchbank("card", bank, "--license", "CC BY 4.0", check=2).stderr
    assert "is no repository" in patchbank("card", bank, "--repo", "https://x/y", check=2).stderr
    assert patchbank("verify", bank, check=1).stdout.count("README") == 0
    assert "is there, and" not in patchbank("info", bank, check=0).stdout


def test_texts_in_data_are_texts(tmp_path: Path) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    for number, text in enumerate(HOSTILE):
        manifest = tiny_manifest("shards", "float16")
        bank = made_bank(
            tmp_path / str(number),
            [text],
            [f"{each}?" for each in HOSTILE],
            dataset=text,
            split=text,
            identity={"model": text, text: text},
            versions={text: text},
            imported=text * (number % 2),
            device=text,
            outputs={text: manifest.outputs[CLS], **manifest.outputs},
        )
        card = card_of(bank, tmp_path, "org/name", text)
        _, front, body = card.split("---\n", 2)
        data = front_matter(card)
        assert data["license"] == text and len(front.splitlines()) == 6
        assert data["pretty_name"] == f"name: features of {plain(text)}"
        own = markdown.parse(
            card_of(made_bank(tmp_path / f"own-{number}", ["a"]), tmp_path, "org/name").split("---\n", 2)[2]
        )
        found = markdown.parse(body)
        inline = [child for token in found for child in token.children or ()]
        assert {token.type for token in found} <= {token.type for token in own} | {"heading_open"}
        assert [token.content for token in found if token.tag == "h2" and token.nesting == 1] == [
            token.content for token in own if token.tag == "h2" and token.nesting == 1
        ]
        assert {child.type for child in inline} <= {
            "text",
            "code_inline",
            "softbreak",
            "strong_open",
            "strong_close",
            "link_open",
            "link_close",
        }
        assert {child.attrs["href"] for child in inline if child.type == "link_open"} == set()
        assert "pypi" not in card and "pip install" not in card
        texts = {child.content for child in inline if child.type == "code_inline"}
        shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
        assert shown in texts and f"{shown}?" in texts
        assert len(blocks(card, "python")) == 2
        names: dict[str, Any] = {}
        exec(re.sub(r"open_bank\(.*\)", "BANK", blocks(card, "python")[0]), names | {"BANK": bank}, names)
        assert torch.equal(names["feature"], bank[text])


def test_other_banks(images: Path, tiny_config: ExtractConfig, tmp_path: Path) -> None:
    root = pairs_root(tmp_path / "root")
    config = replace(tiny_config, layout="shards", pool_grid=2)
    dataset = load_dataset("hicodet", root, "train")
    extract(annotated_pairs(dataset), tmp_path / "pairs", replace(tiny_config, layout=None, output=("cls",)))
    pairs = card_of(open_bank(tmp_path / "pairs"), tmp_path)
    assert "HICO-DET train: features of" in pairs and "of 4 images. Regions were cut out with `pad`" in pairs
    assert front_matter(pairs)["source_datasets"] == ["extended|other-HICO-DET"]
    assert "bank.grid" not in pairs and "bank.transform" not in pairs

    extract(dataset, tmp_path / "pooled", config)
    convert(open_bank(tmp_path / "pooled"), tmp_path / "reduced", "shards", components=3, shard_size=10_000)
    assert "Each is the mean of 2 x 2 patches." in card_of(open_bank(tmp_path / "pooled"), tmp_path)
    reduced = card_of(open_bank(tmp_path / "reduced"), tmp_path)
    assert "`patch_tokens`, `cls`: 3 of 32 principal components" in reduced and "relative error" not in reduced
    convert(open_bank(tmp_path / "pooled"), tmp_path / "half", "shards", "float16", shard_size=10_000)
    convert(open_bank(tmp_path / "half"), tmp_path / "single", "shards", "float32", shard_size=10_000)
    assert "The numbers were rounded before, to `float16`." in card_of(open_bank(tmp_path / "single"), tmp_path)

    unknown = {"family": UNKNOWN, "model": "ViT-B/16", "weights": UNKNOWN}
    imported = card_of(made_bank(tmp_path / "imported", ["a"], identity=unknown, imported="from pickles"), tmp_path)
    assert "- `weights`: `unknown`" in imported and "Licence of the weights: **to be filled in**" in imported
    assert "The bank was imported: `from pickles`." in imported
    with pytest.raises(Exception, match="holds no feature"):
        card_of(made_bank(tmp_path / "empty", [], ["a"]), tmp_path)


def test_licences_are_those_that_somebody_states() -> None:
    assert "model-card.md" in licence_of({"model": "ViT-B/16", "weights": MODELS["ViT-B/16"].sha256})
    assert licence_of({"model": "ViT-B/16", "weights": "1" * 64}) == ""
    timm = pytest.importorskip("timm")
    name = "vit_base_patch16_dinov3.lvd1689m"
    stated = timm.models.get_pretrained_cfg(name).license
    said = licence_of({"model": f"timm/{name}", "weights": "1" * 64})  # it may be a file of the user's
    assert said == f"timm {timm.__version__} states {stated} for {name}; check that these are its weights"
    for model in ("timm/vit_base_patch16_dinov3", "timm/no_such.model", "open_clip/ViT-B-16:openai", "?"):
        assert licence_of({"model": model, "weights": "1" * 64}) == ""
    assert licence_of({"model": f"timm/{name}", "weights": UNKNOWN}) == ""


def test_the_errors_are_those_of_the_docs() -> None:
    page = (REPOSITORY / "docs/reference/bank-format.md").read_text()
    stated: dict[str, list[float]] = {}
    for dtype, tokens, cls in re.findall(r"^\| `(\w+)` \| [\d,]+ \| [\d.]+ \| (\S+) \| (\S+) \|", page, re.MULTILINE):
        stated.setdefault(dtype, []).extend([float(tokens), float(cls)])
    assert {dtype: float(error) for dtype, error in ERRORS.items()} == {name: max(stated[name]) for name in ERRORS}
    assert stated.keys() - ERRORS.keys() == {"float32"}
