"""Banks reduced to principal components: the components, what is stored, and everything that keeps or uses them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from patchbank import ExtractConfig, FeatureDataset, extract, load_dataset, open_bank, pool_regions, show_features
from patchbank.bank import patchbank_reader, reduction
from patchbank.bank.check import verify
from patchbank.bank.convert import convert
from patchbank.bank.payload import Feature
from patchbank.bank.reader import Bank
from patchbank.bank.repair import repair
from patchbank.bank.writer import BankWriter
from patchbank.errors import BankError, ConfigError
from patchbank.features import CLS, GRID, POOLED, REGISTERS, Output
from patchbank.show.showing import to_texts
from tests import toy_family
from tests.support import contents, patchbank, photographs, relative_error, tiny_manifest, toy_is_known  # noqa: F401

OUTPUTS = (CLS, GRID, "block:1", REGISTERS, POOLED)
REDUCED = (GRID, CLS, REGISTERS)  # one space


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reduced") / "images"
    photographs(place, 7)
    (place / "broken.jpg").write_bytes(b"no image")
    return place


CONFIG = ExtractConfig(model="toy/small", device="cpu", batch_size=4, shard_size=2000, output=OUTPUTS)


@pytest.fixture(scope="module")
def source(images: Path) -> Bank:
    extract(load_dataset("folder", images), images.parent / "bank", CONFIG)
    return open_bank(images.parent / "bank")


@pytest.fixture(scope="module")
def reduced(source: Bank) -> Bank:
    """To four of six dimensions."""
    done = convert(source, source.path.with_name("reduced"), "shards", shard_size=2000, components=4)
    assert (done.features, done.failures, done.damaged) == (7, 1, {})
    return open_bank(done.bank)


def tokens_of(bank: Bank) -> np.ndarray[Any, Any]:
    """Every token of a bank's main output, in float64."""
    return torch.cat([bank[key].float() for key in bank]).double().numpy()


# --- the components


def test_components_and_explained_variance_are_those_of_scikit_learn(source: Bank, reduced: Bank) -> None:
    sklearn = pytest.importorskip("sklearn.decomposition")
    tokens, made = tokens_of(source), reduced.manifest.reduction
    assert made is not None and (made.components, made.dim) == (4, 6)
    oracle = sklearn.PCA(4, svd_solver="full").fit(tokens)
    found = reduced.reducer
    assert np.abs(found.components @ found.components.T - np.eye(4)).max() < 1e-6
    signs = np.sign((found.components * oracle.components_).sum(1))
    assert np.abs(found.components - signs[:, None] * oracle.components_).max() < 1e-6
    assert np.abs(found.mean - oracle.mean_).max() < 1e-6
    assert made.explained == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-9)
    largest = np.take_along_axis(found.components, np.abs(found.components).argmax(1)[:, None], 1)
    assert (largest > 0).all()
    assert np.abs(tokens_of(reduced) - signs * oracle.transform(tokens)).max() < 1e-5


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_one_pass_in_blocks_gives_what_all_features_at_once_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: float
) -> None:
    """Also far from zero, where a difference of mean squares would leave nothing of the variance."""
    sklearn = pytest.importorskip("sklearn.decomposition")
    random = np.random.default_rng(0)
    numbers = (random.standard_normal((40, 16, 32)) * np.linspace(3, 0.1, 32) + far).astype(np.float32)
    wanted = tiny_manifest("shards")
    keys = [f"{number:02}.jpg" for number in range(40)]
    with BankWriter(tmp_path / "bank", wanted, keys) as writer:
        rows = zip(keys, torch.from_numpy(numbers), strict=True)
        writer.add([Feature(key, {GRID: row, CLS: row[0]}, (3, 5)) for key, row in rows], ())
    bank = open_bank(tmp_path / "bank")
    whole = reduction.fit(bank, bank.manifest, 8)
    monkeypatch.setattr(reduction, "_BLOCK", 3 * 16 * 32)
    blocks = reduction.fit(bank, bank.manifest, 8)
    assert whole is not None and blocks is not None
    oracle = sklearn.PCA(8, svd_solver="full").fit(numbers.reshape(-1, 32).astype(np.float64))
    for each in (whole, blocks):
        assert each.made.explained == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-9)
        assert np.abs(each.mean - oracle.mean_).max() <= 1e-6 * max(1, far)
        cosines = np.linalg.svd(each.components @ oracle.components_.T, compute_uv=False)
        assert cosines.min() > 1 - 1e-6  # one subspace


# --- what is stored


def test_all_outputs_of_one_space_are_reduced_alike(source: Bank, reduced: Bank) -> None:
    made = reduced.manifest
    assert made.reduction is not None and made.reduction.outputs == REDUCED
    assert list(made.outputs) == list(OUTPUTS) and made.main == GRID
    assert made.outputs[GRID] == replace(source.manifest.outputs[GRID], shape=(15, 4))
    other = patchbank_reader.open_bank(reduced.path)
    for key in reduced:
        for name in OUTPUTS:
            value = source.output(key, name)
            wanted = reduced.project(value) if name in REDUCED else value
            assert relative_error(reduced.output(key, name), wanted) <= 1e-6
            assert torch.equal(other.output(key, name), reduced.output(key, name))
        assert reduced.grid(key).shape == (3, 5, 4) and reduced.size(key) == source.size(key)
    assert reduced.failures == source.failures
    assert verify(reduced.path).by_kind().keys() == {"failed"}


def test_project_takes_arrays_and_tensors_alike(source: Bank, reduced: Bank) -> None:
    key = next(iter(reduced))
    pooled = pool_regions(source[key], torch.tensor([[5.0, 5, 80, 60]]), source.transform(key))
    assert (
        relative_error(
            pool_regions(reduced[key], torch.tensor([[5.0, 5, 80, 60]]), reduced.transform(key)),
            reduced.project(pooled),
        )
        <= 1e-5
    )  # pooling before and after is the same
    tensor = source[key].clone().requires_grad_()
    array = reduced.project(source[key].numpy())
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert np.array_equal(reduced.project(tensor).detach().numpy(), array)
    reduced.project(tensor).sum().backward()
    assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    assert reduced.project(source[key].half()).dtype == torch.float16
    for ones in (np.ones((2, 3, 6), int), torch.ones(2, 3, 6, dtype=torch.int64)):
        assert np.array_equal(reduced.project(ones), reduced.project(np.ones((2, 3, 6), np.float32)))
    with pytest.raises(ValueError, match=r"features \(\.\.\., 6\) are needed, not \(15, 4\)"):
        reduced.project(reduced[key])
    assert source.project(tensor) is tensor


def test_the_same_bytes_again_stopped_or_not(
    source: Bank, reduced: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = contents(reduced.path)
    assert reduced.manifest.reduction is not None
    assert reduced.manifest.reduction.name in files
    options: dict[str, Any] = {"shard_size": 2000, "components": 4}
    (at_once := Event()).set()
    assert convert(source, tmp_path / "one", "shards", stop=at_once, **options).remaining == 8  # while fitting
    assert not (tmp_path / "one").exists()
    monkeypatch.setattr("patchbank.bank.convert._AT_ONCE", 2)
    stop = Event()
    done = convert(source, tmp_path / "one", "shards", stop=stop, progress=lambda *_: stop.set(), **options)
    assert (done.features, done.remaining) == (1, 6)
    fitted: list[tuple[int, int]] = []
    done = convert(source, tmp_path / "one", "shards", fitting=lambda *counts: fitted.append(counts), **options)
    assert done.already_done and fitted == []  # the components are those of the first run
    assert contents(tmp_path / "one") == files


def test_dtypes_and_layouts(source: Bank, reduced: Bank, tmp_path: Path) -> None:
    for dtype, error in (("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 3e-2)):
        convert(source, tmp_path / dtype, "shards", dtype, shard_size=2000, components=4)  # type: ignore[arg-type]
        convert(reduced, tmp_path / f"{dtype}-after", "shards", dtype, shard_size=2000)  # type: ignore[arg-type]
        one, other = open_bank(tmp_path / dtype), open_bank(tmp_path / f"{dtype}-after")
        assert one.manifest == other.manifest
        for key in one:
            assert 0 < relative_error(one[key].float(), reduced[key]) < error
            assert one.checksum(key) == other.checksum(key)
        assert one.project(source[key]).shape == (15, 4)
    again = convert(open_bank(tmp_path / "int8"), tmp_path / "chosen", "shards", outputs=[CLS, POOLED], shard_size=2000)
    made = again.manifest.reduction
    assert made is not None and made.outputs == (CLS,) and open_bank(again.bank).reducer.made == made
    assert convert(reduced, tmp_path / "kept", "shards", outputs=[POOLED], shard_size=9).manifest.reduction is None
    for bank, options in ((source, {"components": 4}), (reduced, {})):
        with pytest.raises(ConfigError, match="use layout shards for reduced ones"):
            convert(bank, tmp_path / "pickles", "ezhoi", shard_size=2000, **options)


def test_a_bank_is_replaced_by_a_reduced_one_and_back(source: Bank, tmp_path: Path) -> None:
    place = tmp_path / "bank"
    files = []
    for components in (4, 3, None, 3):
        done = convert(source, place, "shards", shard_size=2000, components=components, overwrite=True)
        assert done.kept == ""
        files.append({path.name for path in place.glob("pca-*")})
        made = open_bank(place).manifest.reduction
        assert files[-1] == ({made.name} if made else set())
        assert (made.components if made else None) == components
    assert files[1] == files[3] != files[0]


# --- its file is missing or damaged


@pytest.mark.parametrize("damage", ["missing", "other", "longer", "link to nowhere"])
def test_a_damaged_file_is_found_and_written_again(source: Bank, reduced: Bank, damage: str, tmp_path: Path) -> None:
    place = shutil.copytree(reduced.path, tmp_path / "bank")
    [file] = place.glob("pca-*")
    content = file.read_bytes()
    file.unlink()
    if damage == "link to nowhere":
        file.symlink_to(tmp_path / "nowhere")
    elif damage != "missing":
        file.write_bytes(content[:-1] + b"\1" if damage == "other" else content + bytes(10_000))
    bank = open_bank(place)
    key = next(iter(bank))
    assert torch.equal(bank[key], reduced[key])  # nothing needs it to be read
    with pytest.raises(BankError, match=f"{file.name}.*(cannot be read|is damaged)"):
        bank.project(source[key])
    report = verify(place)
    assert [each.name for each in report.by_kind()["components"]] == [file.name]
    assert {each.kind for each in report.problems} == {"components", "failed"}
    assert [each.kind for each in repair(place).unread] == ["components"]
    assert convert(source, place, "shards", shard_size=2000, components=4).already_done == 7
    assert verify(place).by_kind().keys() == {"failed"} and contents(place) == contents(reduced.path)


def test_a_file_of_other_numbers_is_refused(reduced: Bank, tmp_path: Path) -> None:
    """Its hash fits the manifest's, its shapes do not: of a third-party bank."""
    from safetensors.numpy import save

    made = reduced.manifest.reduction
    assert made is not None
    for numbers in ({"components": np.zeros((4, 5), "f4"), "mean": np.zeros(6, "f4")}, {"mean": np.zeros(6, "f4")}):
        content = save(numbers)
        other = replace(made, sha256=hashlib.sha256(content).hexdigest())
        (tmp_path / other.name).write_bytes(content)
        with pytest.raises(BankError, match="does not hold 4 components of 6"):
            reduction.read(reduction.Storage(tmp_path), other)
    for change in ({"sha256": "../" * 20}, {"outputs": ("cls", "no")}, {"components": 5}):
        with pytest.raises(ValueError, match="do not fit its reduction"):
            replace(reduced.manifest, reduction=replace(made, **change)).check()


def test_a_damaged_feature_is_made_again_by_converting_again(source: Bank, reduced: Bank, tmp_path: Path) -> None:
    place = shutil.copytree(reduced.path, tmp_path / "bank")
    bank = open_bank(place, mmap=False)
    part = bank.file(next(iter(bank)))
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    patchbank("repair", place, check=1)
    done = patchbank("verify", place, check=1)
    assert f"patchbank convert SRC {place} --pca 4" in done.stdout
    assert convert(source, place, "shards", shard_size=2000, components=4).features == 1
    assert verify(place).by_kind().keys() == {"failed"}


# --- what cannot be reduced


def test_what_has_no_components_is_refused(source: Bank, reduced: Bank, images: Path, tmp_path: Path) -> None:
    def refused(bank: Bank, components: int, kind: type[Exception], words: str, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            convert(bank, tmp_path / "no", "shards", shard_size=2000, components=components, **options)
        assert not (tmp_path / "no").exists()

    refused(source, 7, ConfigError, "pca 7: patch_tokens of .* has 6 dimensions. Choose 1 to 6")
    refused(source, 0, ConfigError, "pca 0: .* Choose 1 to 6")
    refused(source, 5, ConfigError, "pooled of .* has 4 dimensions", outputs=[POOLED])
    refused(reduced, 2, BankError, "is reduced already, to 4 of 6 principal components: convert the bank that it was")
    small = replace(CONFIG, output=(CLS,), limit=3)
    extract(load_dataset("folder", images), tmp_path / "small", small)
    refused(open_bank(tmp_path / "small"), 3, BankError, "pca 3 needs more features than 3, and .* has 2")
    broken = shutil.copytree(source.path, tmp_path / "broken")
    part = open_bank(broken).file("photo_0003.jpg")
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    refused(open_bank(broken, mmap=False), 4, BankError, "is damaged: the feature of .*patchbank repair")
    blank = replace(tiny_manifest("shards"), outputs={CLS: Output(shape=(6,), block=1)})
    with BankWriter(tmp_path / "blank", blank, ["a", "b", "c"]) as writer:
        writer.add([Feature(key, {CLS: torch.ones(6)}, (3, 5)) for key in "abc"], ())
    refused(open_bank(tmp_path / "blank"), 2, BankError, "all features of .* are equal, and have no components")


def test_a_reduced_bank_is_not_extracted_into(images: Path, source: Bank, reduced: Bank, tmp_path: Path) -> None:
    place = shutil.copytree(reduced.path, tmp_path / "bank")
    with pytest.raises(
        BankError, match=r"(?s)reduction: the bank has 4 of 6 principal.*convert.*same pca into this one"
    ):
        extract(load_dataset("folder", images), place, CONFIG)
    with pytest.raises(BankError, match=r"reduction: the bank has 4 of 6 .*, this run 3 of 6"):
        convert(source, place, "shards", shard_size=2000, components=3)
    assert contents(place) == contents(reduced.path)


# --- what uses it


def test_commands_on_a_reduced_bank(images: Path, source: Bank, reduced: Bank, tmp_path: Path) -> None:
    options = ("--pca", 4, "--shard-size", 2000)
    done = patchbank("convert", source.path, tmp_path / "bank", *options, check=0)
    assert contents(tmp_path / "bank") == contents(reduced.path)
    made = reduced.manifest.reduction
    assert made is not None
    says = rf"4 of 6 principal components, .* {made.explained:.2%} of the\s+variance"
    assert re.search(says.replace(".*", "which explain"), done.stdout)
    told = json.loads(patchbank("convert", source.path, tmp_path / "bank", *options, "--json", check=0).stdout)
    assert told["reduction"]["explained"] == made.explained
    assert re.search(r"reduced +" + says.replace(" .*", ""), patchbank("info", reduced.path, check=0).stdout)
    verified = patchbank("verify", reduced.path, "--images", images, "--sample", 7, "--json", check=1)
    report = json.loads(verified.stdout)
    assert len(report["sample"]) == 7 and max(report["sample"].values()) < 2e-6 and report["counts"] == {"failed": 1}
    key = next(iter(reduced))
    patchbank("show", reduced.path, key, "--images", images, "--out", tmp_path / "picture.png", check=0)
    patchbank("report", reduced.path, "--images", images, "-o", tmp_path / "page.html", check=1)
    assert f"4 of 6 principal components, {made.explained:.2%}" in (tmp_path / "page.html").read_text()
    assert FeatureDataset(reduced)[0][0].shape == (15, 4)
    assert "4 of 6 principal components" in reduced._repr_html_()


def test_other_images_differ_from_a_reduced_bank(reduced: Bank, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    shutil.copy(images / "photo_0002.jpg", tmp_path / "images/photo_0001.jpg")
    done = patchbank("verify", reduced.path, "--images", tmp_path / "images", "--sample", 7, "--json", check=1)
    findings = [each for each in json.loads(done.stdout)["findings"] if each["kind"] == "pixels"]
    assert [each["name"] for each in findings] == ["photo_0001.jpg"]


def test_texts_are_projected_into_a_reduced_bank(
    source: Bank, reduced: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = torch.tensor([[1.0, -2, 0.5, 3, 0, 1]])
    monkeypatch.setattr(toy_family, "encode_texts", lambda spec, texts: text.repeat(len(texts), 1), raising=False)
    key = next(iter(reduced))
    tokens, wanted = reduced[key], reduced.project(text)[0]
    cosines = torch.nn.functional.cosine_similarity(tokens, wanted[None])
    [found] = to_texts(reduced, GRID, key, tokens.numpy(), ["a dog"], ExtractConfig(), None)
    assert np.abs(found.values - cosines.numpy()).max() < 1e-6
    assert len(show_features(reduced, key, texts=["a dog", "a cat"]).figure.axes) > 3
    for bank in (source, reduced):
        with pytest.raises(ConfigError, match=r"text: block:1 of .* is not in the space of texts"):
            show_features(bank, key, texts=["a dog"], output="block:1")
    monkeypatch.setattr(toy_family, "encode_texts", lambda spec, texts: text[:, :5])
    for bank in (source, reduced):
        with pytest.raises(ConfigError, match=r"patch_tokens of .* is not in the space of texts"):
            show_features(bank, key, texts=["a dog"])


FIT = """
import resource, sys
from patchbank import open_bank
from patchbank.bank.reduction import fit
import numpy, torch, safetensors.numpy

bank = open_bank(sys.argv[1], mmap=False)
bank[next(iter(bank))] @ torch.ones(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(bank, bank.manifest, 8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_bank(tmp_path: Path) -> None:
    """A bank of 260 MB is fitted in less than half of that."""
    made = tiny_manifest("shards")
    large = {GRID: Output(shape=(1600, 64), block=1)}
    wanted = replace(made, outputs=large, input=replace(made.input, size=(320, 320)), part_size=64)
    keys = [f"{number:03}.jpg" for number in range(640)]
    torch.manual_seed(0)
    with BankWriter(tmp_path, wanted, keys) as writer:
        for key in keys:
            writer.add([Feature(key, {GRID: torch.randn(1600, 64)}, (3, 5))], ())
    done = subprocess.run([sys.executable, "-c", FIT, tmp_path], check=True, capture_output=True, text=True)
    assert open_bank(tmp_path).bytes_on_disk() > 260_000_000
    assert int(done.stdout) * 1024 < 130_000_000


def test_the_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    made = tiny_manifest("shards")
    wide = {GRID: Output(shape=(16, 512), block=1)}
    keys = [f"{number:03}.jpg" for number in range(100)]
    with BankWriter(tmp_path, replace(made, outputs=wide), keys) as writer:
        torch.manual_seed(0)
        writer.add([Feature(key, {GRID: torch.randn(16, 512)}, (3, 5)) for key in keys], ())
    bank, before = open_bank(tmp_path), torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            reducer = reduction.fit(bank, bank.manifest, 100)
            assert reducer is not None and torch.get_num_threads() == threads
            found.add(reducer.made.sha256)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
