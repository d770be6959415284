"""What a page says of a bank: sound or not, complete or not, large or not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from patchbank import Bank, Dataset, extract, load_dataset, open_bank
from patchbank.bank.base_writer import Feature
from patchbank.bank.runs import Run, read_runs, write_run
from patchbank.bank.writer import open_writer
from patchbank.config import ExtractConfig
from patchbank.datasets.hoi import HOIClasses
from patchbank.report import page, soundness
from patchbank.report.page import write_report
from tests.support import patchbank, photographs, tiny_manifest


def text_of(path: Path) -> str:
    """What the page says, without its script, style and data."""
    content = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", content)).split())


def images_in(path: Path) -> list[dict[str, object]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def made_bank(directory: Path, features: dict[str, torch.Tensor], layout: str = "shards") -> Bank:
    """A bank of given features."""
    positions = {key: number for number, key in enumerate(features)}
    with open_writer(directory, replace(tiny_manifest(layout), cls=False), positions) as writer:
        batch = [Feature(key, tokens, (64, 48)) for key, tokens in features.items()]
        for start in range(0, len(batch), 100):
            writer.add(batch[start : start + 100], [])
    return open_bank(directory)


def random_tokens(seed: int, scale: float = 1.0) -> torch.Tensor:
    """(16, 32): smooth over the grid, as an image's are."""
    generator = np.random.default_rng(seed)
    corners = generator.normal(size=(2, 2, 32))
    share = np.linspace(0, 1, 4)
    rows = corners[0] * (1 - share)[:, None, None] + corners[1] * share[:, None, None]
    grid = rows[:, None, 0] * (1 - share)[None, :, None] + rows[:, None, 1] * share[None, :, None]
    return torch.from_numpy(
        (scale * (grid.reshape(16, 32) + 0.05 * generator.normal(size=(16, 32)))).astype(np.float32)
    )


def test_a_page_says_what_the_bank_is(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    bank, dataset = annotated
    written = write_report(bank, tmp_path / "page.html", dataset, sample=4)
    text = text_of(tmp_path / "page.html")
    for words in (
        "10 images, tiny, hicodet train",
        "Untrained weights.",
        "4 of 10 images",
        "10 of the 10 images",
        "16, 32",
    ):
        assert words in text, words
    [run] = read_runs(bank.path)
    assert run.began in text and f"{run.images_per_second:.1f}" in text and str(run.bound) in text
    assert bank.fingerprint.weights_sha256 in text and "torch" in text
    assert (written.images, written.asked, written.defects) == (4, 4, 0)
    assert written.bytes == (tmp_path / "page.html").stat().st_size < 1_000_000 + 4 * 60_000
    images = images_in(tmp_path / "page.html")
    again = write_report(bank, tmp_path / "again.html", dataset, sample=4, seed=0)
    assert again.bytes == written.bytes
    assert [each["key"] for each in images] == sorted(str(each["key"]) for each in images)
    others = write_report(bank, tmp_path / "others.html", dataset, sample=4, seed=1)
    assert others.images == 4 and images_in(tmp_path / "others.html") != images


def test_a_page_loads_nothing_and_holds_no_style_or_handler_of_its_own(
    hostile: tuple[Bank, Dataset], tmp_path: Path
) -> None:
    write_report(*(hostile[0], tmp_path / "page.html", hostile[1]))
    content = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)
    assert policy and policy[1].startswith("default-src 'none';") and "unsafe" not in policy[1]
    markup = re.sub(r"(?<=>)[^<]*(?=</(script|style)>)", "", content)
    assert not re.search(r"<[^>]*\s(src|style|on\w+)\s*=", markup)
    assert set(re.findall(r'href="(.)', markup)) == {"#"}
    assert "window.hacked" not in re.sub(r"&lt;[^<]*", "", markup)
    assert "49" not in "".join(re.findall(r"]]&gt;&lt;!--[^<]*", markup))


def test_failures_and_coverage(hostile: tuple[Bank, Dataset], tmp_path: Path) -> None:
    bank, dataset = hostile
    photographs(dataset.images, 3, prefix="later")
    more = load_dataset("folder", dataset.images)
    write_report(bank, tmp_path / "page.html", more)
    text = text_of(tmp_path / "page.html")
    assert "1 image could not be extracted" in text
    assert "not an image that Pillow can identify" in text
    assert "5 of the 9 images" in text and "1 failed" in text and "3 left to do, such as later_0000.jpg" in text
    for number in range(3):
        (dataset.images / f"later_{number:04}.jpg").unlink()


def test_numbers_that_cannot_be_right_are_named_and_shown(tmp_path: Path) -> None:
    features = {f"{number:03}.jpg": random_tokens(number) for number in range(40)}
    features["nan.jpg"] = random_tokens(50)
    features["zero.jpg"] = torch.zeros(16, 32)
    features["large.jpg"] = random_tokens(51, scale=300.0)
    bank = made_bank(tmp_path / "bank", dict(sorted(features.items())))
    [shard] = (tmp_path / "bank").glob("shard-*")  # the writer takes no such numbers: a disk may have changed them
    row = features["nan.jpg"].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(row[:4], b"\xff\xff\xff\x7f"))
    bank = open_bank(tmp_path / "bank")
    written = write_report(bank, tmp_path / "page.html", sample=6)
    text = text_of(tmp_path / "page.html")
    assert written.defects == 2
    assert "2 of 43 images have numbers that cannot be right" in text
    assert "nan.jpg : 1 of 16 tokens hold NaN numbers" in text and "zero.jpg : all its tokens are zero" in text
    assert "large.jpg: median token norm" in text  # named, though there was no room to link it
    shown = {str(each["key"]): each for each in images_in(tmp_path / "page.html")}
    assert {"nan.jpg", "zero.jpg"} <= set(shown) and len(shown) == 6
    assert "levels" not in shown["nan.jpg"] and "not finite" in str(shown["nan.jpg"]["notes"])
    place = next(number for number, each in enumerate(shown) if each == "nan.jpg")
    assert f'href="#image-{place}">nan.jpg</a>' in (tmp_path / "page.html").read_text()


def test_what_holds_of_a_healthy_bank(tmp_path: Path) -> None:
    def states(features: dict[str, torch.Tensor], name: str) -> list[str]:
        bank = made_bank(tmp_path / name, features)
        return [each.state for each in soundness.checks(soundness.look(bank, list(bank), len(bank)))]

    good = {f"{number:03}.jpg": random_tokens(number) for number in range(30)}
    assert states(good, "good") == ["good"] * 4
    normalised = {key: torch.nn.functional.normalize(tokens, dim=1) for key, tokens in good.items()}
    assert states(normalised, "normalised") == ["good", "bad", "good", "good"]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    shuffled = {key: tokens[order] for key, tokens in good.items()}
    assert states(shuffled, "shuffled")[2] == "bad"
    assert states(dict.fromkeys(good, good["000.jpg"]), "same") == ["good", "good", "good", "bad"]
    assert states({"000.jpg": good["000.jpg"]}, "one") == ["good", "good", "good", "open"]


def test_fifty_thousand_images_in_a_small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = [random_tokens(number) for number in range(50)]
    features = {f"{number:05}.jpg": base[number % 50] * (1 + number / 1e6) for number in range(50_000)}
    bank = made_bank(tmp_path / "bank", features)
    monkeypatch.setattr(page, "LARGEST", 1_200_000)
    written = write_report(bank, tmp_path / "page.html", sample=600)
    text = text_of(tmp_path / "page.html")
    assert "50,000 images" in text and "All numbers of 50,000 images were read" in text
    assert written.bytes < page.LARGEST and 100 < written.images < written.asked == 600
    assert f"{written.images} of 50,000 images (600 were asked for: more would make this page too large)" in text
    few = write_report(bank, tmp_path / "few.html", sample=5, read=100)
    assert "All numbers of 100 of 50,000 images were read" in text_of(tmp_path / "few.html")
    assert few.bytes < 1_000_000


def test_an_image_takes_sixty_kilobytes_at_most(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    """Of the largest model, with noise for picture and tokens, which nothing compresses, and many long names."""
    from patchbank.geometry import ImageTransform
    from patchbank.report import gallery
    from patchbank.report.packing import pack

    noise = np.random.default_rng(0).normal(size=(576, 768)).astype(np.float32)
    packed = pack(noise, gallery._FEATURES).to_json()
    pixels = np.random.default_rng(1).integers(0, 255, (600, 800, 3), np.uint8)
    from PIL import Image

    Image.fromarray(pixels).save(tmp_path / "noise.png")
    [record] = load_dataset("folder", tmp_path).records
    shown: dict[str, object] = {"notes": []}
    gallery._add_picture(shown, record, ImageTransform(800, 600, "center-crop", 336, 14))
    assert len(json.dumps(packed)) + len(json.dumps(shown)) + 4 * 576 + 24 * 200 < page._IMAGE


def test_names_without_end_leave_room_for_the_others(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    bank, dataset = annotated
    classes = HOIClasses(tuple("o" * 10**6 for _ in range(80)), tuple("<" * 10**6 for _ in range(117)), (), ())
    pairs = replace(dataset.pairs, classes=classes)
    written = write_report(bank, tmp_path / "page.html", replace(dataset, chosen=pairs))
    assert written.bytes < 1_000_000 + 10 * 60_000
    assert page.plain("x" * 1000 + ".jpg") == "…" + "x" * 395 + ".jpg"


def test_an_empty_bank_and_pictures_of_no_images(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(b"no picture")
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    written = write_report(open_bank(tmp_path / "bank"), tmp_path / "page.html")
    assert written.images == 0
    assert "The bank holds no feature yet." in text_of(tmp_path / "page.html")


def test_runs_are_noted_and_strange_ones_passed_over(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    run = Run(
        began="2026-01-31T12:00:00Z", seconds=2.0, images=10, failures=1, remaining=0, bytes_written=5, device="cpu",
        engine="local", partition="0/1", waited={"decode": 1.0}, bound="decode", versions={"torch": "2"},
    )  # fmt: skip
    (tmp_path / "runs").mkdir()
    write_run(tmp_path, run)
    for name, content in {
        "a": "{",
        "b": "[]",
        "c": '{"began": 3}',
        "d": json.dumps({"began": "x", "seconds": "1"}),
    }.items():
        (tmp_path / "runs" / f"{name}.json").write_text(content)
    assert read_runs(tmp_path) == [run] and run.images_per_second == 5
    assert read_runs(tmp_path / "none") == []
    [noted] = read_runs(annotated[0].path)
    assert (noted.images, noted.failures, noted.remaining, noted.untrained) == (10, 0, 0, True)


def test_the_command_and_extracts_option(tmp_path: Path, tiny_weights: Path) -> None:
    photographs(tmp_path / "images", 3)
    run = (
        "extract",
        "folder",
        tmp_path / "images",
        "--model",
        "tiny",
        "--weights",
        tiny_weights,
        "--out",
        tmp_path / "bank",
    )
    done = patchbank(*run, "--report", check=0)
    assert str(tmp_path / "bank-report.html") in "".join(done.stdout.split())
    assert "3 of the 3 images" in text_of(tmp_path / "bank-report.html")
    done = patchbank("report", tmp_path / "bank", "-o", tmp_path / "page.html", "--json", check=0)
    assert json.loads(done.stdout)["images"] == 3
    assert "no list of images was given" in text_of(tmp_path / "page.html")
    (tmp_path / "images" / "x.jpg").write_bytes(b"no picture")
    patchbank(*run, check=1)
    patchbank("report", tmp_path / "bank", "--images", tmp_path / "images", "-o", tmp_path / "page.html", check=1)
    for arguments, words in (
        (("report", tmp_path / "none"), "There is no bank"),
        (("report", tmp_path / "bank", "-o", tmp_path), "is a directory"),
        (("report", tmp_path / "bank", "-o", tmp_path / "bank-report.html" / "x"), "cannot be written"),
        (("report", tmp_path / "bank", "--images", tmp_path / "none", "-o", tmp_path / "y.html"), "none"),
    ):
        assert words in " ".join(patchbank(*arguments, check=2).stderr.split())


@pytest.mark.parametrize("layout", ["ezhoi", "shards"])
def test_overwriting_a_bank_forgets_its_runs(layout: str, tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 2)
    dataset, config = load_dataset("folder", tmp_path / "images"), replace(tiny_config, layout=layout)  # type: ignore[arg-type]
    extract(dataset, tmp_path / "bank", config)
    extract(dataset, tmp_path / "bank", config)  # which does nothing, and notes nothing
    assert len(read_runs(tmp_path / "bank")) == 1
    extract(dataset, tmp_path / "bank", replace(config, overwrite=True))
    assert len(read_runs(tmp_path / "bank")) == 1
