"""Every benchmark runs, at toy size, so that none rots. Nothing here is about time."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import growth, growth_steps, peers
from benchmarks.__main__ import BENCHMARKS
from benchmarks.common import HICO_SIZES, hico_photographs

from patchbank.bench import limit
from patchbank.encoders.base import flops
from patchbank.encoders.openai import OpenAISpec
from tests.support import REPOSITORY, TINY

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # warnings: other packages' own

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a benchmark; returns the JSON line that it ends in, with what it printed before as ``printed``."""
    monkeypatch.setattr(limit, "_SECONDS", 0.01)
    monkeypatch.setattr(limit, "_TRIAL_SECONDS", 0.005)

    def run(name: str, *arguments: object) -> dict[str, Any]:
        importlib.import_module(f"benchmarks.{name}").main([str(argument) for argument in arguments])
        *before, last = capsys.readouterr().out.splitlines()
        result: dict[str, Any] = json.loads(last)
        assert result["benchmark"] == name
        assert result["machine"] and result["versions"]["torch"] and result["weights"] == "untrained"
        return {**result, "printed": "\n".join(before)}

    return run


def expected_peers(result: dict[str, Any], packages: dict[str, str]) -> set[str]:
    """Of variants by package, those whose package is installed; the others must have been named as skipped."""
    for name, package in packages.items():
        if not find_spec(package):
            assert f"skipped: {name}" in result["printed"]
    return {name for name, package in packages.items() if find_spec(package)}


def test_components(run: Run) -> None:
    result = run("components", "--model", "tiny", "--images", 3, "--components", "4,8,64", "--random", 4)
    assert list(result["rows"]) == ["all", "4", "8"]  # of 32 dimensions
    errors, explained = ([row[name] for row in result["rows"].values()] for name in ("error", "explained"))
    assert errors[1] > errors[2] > errors[0] == 0 and explained[1] < explained[2] < explained[0] == 1
    assert result["fit"]["bank_bytes"] > 4 * 196 * 512 * 2


def test_end_to_end(run: Run, tmp_path: Path) -> None:
    sizes = ("--images", 5, "--original-images", 3, "--rounds", 1, "--workers", 1)
    result = run("end_to_end", "--model", "tiny", "--precision", "fp32", "--directory", tmp_path, *sizes)
    of_tiny = result["results"]["tiny fp32"]
    names = {"original", "original batched", "original cloned", "patchbank", "patchbank fast", "patchbank shards"}
    names |= expected_peers(result, {"transformers": "transformers", "open_clip": "open_clip"})
    assert of_tiny["images_per_second"].keys() == names
    assert all(error < peers.EQUAL for name, error in of_tiny["relative_error"].items() if name != "patchbank fast")
    assert of_tiny["relative_error"]["patchbank"] < 2e-6
    assert of_tiny["limit_images_per_second"] > 0
    # The description's batched variant pickles the whole batch with each image.
    assert of_tiny["bytes_an_image"]["original batched"] > 2 * of_tiny["bytes_an_image"]["original cloned"]
    assert not list(tmp_path.iterdir())


def test_curves(run: Run) -> None:
    sizes = ("--batch-sizes", "1,2", "--cores", "1", "--images", 2, "--rounds", 1)
    result = run("curves", "--model", "timm/test_vit", "--precision", "fp32", *sizes)
    assert result["batches"]["fp32"].keys() == {"1", "2"} and min(result["batches"]["fp32"].values()) > 0
    assert result["cores"]["1"].keys() == {"encoder, fp32", "extract, fp32"}


def test_outputs(run: Run) -> None:
    result = run("outputs", "--model", "tiny", "--precision", "fp32", "--images", 1, "--rounds", 1, "--blocks", 2)
    cost = result["results"]["fp32"]["cost"]
    assert cost["patch_tokens"] == 1 and {"blocks", "blocks, naclip", "blocks, 4 variants"} <= cost.keys()


def test_crops(run: Run) -> None:
    result = run("crops", "--model", "tiny", "--images", 2, "--boxes", 3, "--rounds", 1)
    assert list(result["boxes_per_second"]) == ["encode", "extract"] and result["ratio"] > 0


def test_two_models(run: Run) -> None:
    result = run("two_models", "--models", "tiny,tiny", "--images", 3, "--rounds", 1)
    for found in result["results"].values():
        assert list(found) == ["one after the other", "together"]
        assert all(seconds > 0 for each in found.values() for seconds in each.values())


def test_encoder(run: Run) -> None:
    # Compiling takes half a minute.
    arguments = ("--images", 2, "--batch-size", 2, "--rounds", 1, "--without", "inductor frozen,patchbank compiled")
    result = run("encoder", "--model", "tiny", "--precision", "fp32,bf16", *arguments)
    for precision, bound in (("fp32", peers.EQUAL), ("bf16", peers.ROUNDED)):
        of_tiny = result["results"][f"tiny {precision}"]
        assert {"original single", "original", "patchbank"} <= of_tiny["images_per_second"].keys()
        assert expected_peers(result, {"open_clip": "open_clip", "transformers": "transformers"}) <= set(
            of_tiny["relative_error"]
        )
        assert all(error < bound for error in of_tiny["relative_error"].values())
        assert of_tiny["attention_seconds_a_batch"].keys() == {"patchbank", "scaled_dot_product_attention"}


def test_families(run: Run) -> None:
    result = run("families", "--model", "test_vit", "--batch-size", 1, "--rounds", 1)
    for precision, bound in (("fp32", peers.EQUAL), ("bf16", peers.ROUNDED)):
        found = result["results"][f"test_vit {precision}"]
        assert found["images_per_second"].keys() == {"eager", "patchbank", "six blocks", "limit"}
        assert found["relative_error"] < bound


def test_decode(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.decode._SAMPLING_SECONDS", 0.1)
    result = run("decode", "--images", 4, "--rounds", 1, "--workers", 1)
    names = {"original", "patchbank", "patchbank fast"}
    assert result["seconds_an_image"].keys() == result["share_with_pythons_lock"].keys() == names
    assert result["images_per_second"].keys() == {"1 threads", "1 processes"}
    assert result["fast_against_exact"]["largest"] <= 1
    assert 0 < result["fast_against_exact"]["share"] < 0.02


def test_write(run: Run, tmp_path: Path) -> None:
    result = run("write", "--model", "tiny", "--images", 20, "--rounds", 1, "--directory", tmp_path)
    names = result["features_per_second"].keys()
    assert {"pickles, original", "shards, durable, int8", "files, flushed", "one file, flushed"} <= names
    assert any(name.startswith("pickles, durable") for name in names)


def test_read(run: Run) -> None:
    result = run("read", "--images", 4, "--reads", 4, "--rounds", 1)
    assert "shards, float16" in result["times_faster_than_pickles"]


def test_loading(run: Run) -> None:
    result = run("loading", "--images", 6, "--workers", "0,1", "--batch-size", 2, "--rounds", 1)
    assert result["samples_per_second"].keys() == {"0", "1"}
    for rates in result["samples_per_second"].values():
        assert {"pickle.load", "pickles, regions", "shards float16"} <= rates.keys()


def test_pooling(run: Run) -> None:
    seconds = run("pooling", "--rounds", 1, "--boxes", 2)["seconds"]
    assert seconds.keys() == {"one product", "roi_align, then the mean"}


def test_visible(run: Run, tmp_path: Path) -> None:
    content = {
        "filenames": ["a.jpg"],
        "annotation": [
            {"boxes_h": [[1, 1, 100, 224]], "boxes_o": [[220, 10, 400, 200]], "hoi": [0], "object": [0], "verb": [0]}
        ],
        "size": [[640, 224]],
        "objects": ["person"],
        "verbs": ["see"],
        "correspondence": [[0, 0, 0]],
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    result = run("visible", tmp_path / "list.json")
    assert result["area_cut_off"] == pytest.approx(1 - 224 / 640)
    assert result["shares"]["human"] == {"leaves the crop": 1, "wholly outside": 1}
    assert result["shares"]["object"] == {"leaves the crop": 0, "wholly outside": 0}
    assert result["shares"]["union"] == {"leaves the crop": 1, "wholly outside": 0}


def test_start(run: Run, tmp_path: Path) -> None:
    result = run("start", "--model", "tiny", "--rounds", 1, "--directory", tmp_path)
    assert set(result["ratios"]) == {
        f"{kind}, {way}" for kind in ("start", "nothing") for way in ("official", "--weights")
    }
    assert result["seconds"].keys() > result["ratios"].keys() == result["checks"].keys()
    assert not [*tmp_path.iterdir()]


def test_growth(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_HELPS", 1)
    result = run("growth", "--keys", 20, "--layouts", "shards", "--directory", tmp_path)
    (row,) = result["results"]["shards"]
    assert (row["keys"], row["made_by"], row["files"]) == (20, "extract", 1)
    assert result["help_seconds"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "way"), [("ezhoi", "write"), ("ezhoi", "lay"), ("shards", "write"), ("shards", "lay")]
)
def test_growth_without_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, way: str) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # this process goes on
    growth_steps.prepare(tmp_path)
    steps = {step: growth_steps.STEPS[step](tmp_path, 700, layout) for step in (way, *growth._READERS)}
    assert all(found["peak"] > 0 for found in steps.values())
    # 700 keys are two shards, each a unit; for eight workers, a unit of pickles has two batches of eight images.
    assert steps["plan"]["units"] == (2 if layout == "shards" else 44)
    assert steps["plan"]["unit_bytes"] > 700
    if layout == "shards":  # what is known travels along
        assert steps["resume"]["units"] == 2
        assert steps["resume"]["unit_bytes"] > steps["plan"]["unit_bytes"] + 634 * 64


def test_boxes(run: Run, tmp_path: Path) -> None:
    result = run("boxes", "--images", 300, "--boxes", 2, "--directory", tmp_path)
    assert result["boxes"] == 600 and list(result["results"]) == ["coco", "lines", "arrays", "tensors"]
    assert all(row["peak_mb"] > row["before_mb"] > 0 for row in result["results"].values())
    assert not list(tmp_path.iterdir())


def test_page(run: Run, tmp_path: Path) -> None:
    # In a thread of its own: other tests' browser keeps this one, of which Playwright's is one at a time.
    arguments = ("--model", "tiny", "--keys", 20, "--samples", "4,30", "--directory", tmp_path)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(run, "page", *arguments).result()
    assert result["keys"] == 20 and result["features_per_second"] > 0
    assert [page["images"] for page in result["pages"]] == [4, 20]
    for page in result["pages"]:
        assert page["bytes"] < 1_000_000 + 75_000 * page["images"]
        assert "skipped: the browser" in result["printed"] or page["first_map_seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_dtypes(run: Run) -> None:
    assert run("dtypes", "--model", "tiny")["model"] == "tiny"


def test_fidelity(run: Run) -> None:
    errors = run("fidelity", "--model", "tiny", "--without-compiled")["largest_relative_error"]
    assert list(errors) == ["fp32", "fp32, --decode fast", "bf16"]
    assert errors["fp32"] <= 2e-6 < errors["fp32, --decode fast"] < errors["bf16"] < 0.1


def test_the_photographs_differ_and_have_the_sizes(tmp_path: Path) -> None:
    paths = hico_photographs(tmp_path / "once", 24)
    again = hico_photographs(tmp_path / "again", 24)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert len({path.read_bytes() for path in paths}) == 24
    assert sum(HICO_SIZES.values()) == 62


def test_a_peer_that_computes_something_else_is_no_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.common import untrained

    weights = untrained(TINY, tmp_path)
    original = peers.OriginalTower.forward
    calls = iter((1.0, 1.001))
    monkeypatch.setattr(peers.OriginalTower, "forward", lambda self, x: original(self, x) * next(calls))
    monkeypatch.setattr(peers, "OpenClipTower", lambda *_: peers.OriginalTower(weights))
    with torch.no_grad():
        assert "open_clip" not in peers.towers(TINY, weights)
    assert "skipped: open_clip: RuntimeError: open_clip differs from the original" in capsys.readouterr().out


def test_the_limit_counts_every_product() -> None:
    measured = limit.product_rate(OpenAISpec(TINY), "fp32", torch.device("cpu"), 2)
    assert measured.flops == flops(OpenAISpec(TINY))
    assert measured.seconds > 0 and measured.peak > 0


def test_every_benchmark_is_named_by_its_command_and_listed() -> None:
    programs = set()
    for path in (REPOSITORY / "benchmarks").glob("*.py"):
        text = path.read_text()
        if "def main(" in text and path.stem != "__main__":
            assert f"python -m benchmarks.{path.stem}" in text
            programs.add(path.stem)
    assert programs - {"billion", "visible", "performance"} == BENCHMARKS.keys()
