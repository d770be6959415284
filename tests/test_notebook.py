"""What notebooks show of objects: all of it escaped."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urljoin, urlparse
from urllib.request import url2pathname
from xml.etree import ElementTree

import pytest

from patchbank import ExtractConfig, FeatureDataset, ImageTransform, extract, load_dataset, open_bank
from patchbank.config import ResizeMode
from patchbank.errors import ConfigError
from patchbank.notebook import COLOURS
from tests.support import hico_root, patchbank, photographs


def parsed(html: str) -> ElementTree.Element:
    """The markup, which must be well formed."""
    return ElementTree.fromstring(f"<div>{html}</div>")


def text(html: str) -> str:
    return " ".join(parsed(html).itertext())


def drawing(html: str) -> ElementTree.Element:
    """The one drawing in it."""
    [svg] = parsed(html).iter("svg")
    return svg


def cells(html: str) -> list[list[str]]:
    """The rows of its table."""
    return [["".join(cell.itertext()).strip() for cell in row] for row in parsed(html).iter("tr")]


def test_banks_datasets_targets_and_summaries(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    root = hico_root(tmp_path, 4, splits=["train"])
    data = load_dataset("hicodet", root, "train")
    (data.images / data[3].key).write_bytes(b"no image")
    summary = extract(data, tmp_path / "bank", tiny_config)
    bank = open_bank(tmp_path / "bank")
    shown = text(bank._repr_html_())
    assert "3 of hicodet train, such as HICO_train2015_0000.jpg" in shown
    assert "patch_tokens (16, 32) float32" in shown and "32x32 (height x width), center-crop, grid 4 x 4" in shown
    assert "1 HICO_train2015_0003.jpg: " in shown and "UNTRAINED" in shown and "about 13" in shown
    assert "hicodet train" in text(data._repr_html_()) and "4, such as" in text(data._repr_html_())
    assert "3 in " in text(summary._repr_html_()) and "1 HICO_train2015_0003.jpg: " in text(summary._repr_html_())
    assert re.fullmatch(r"<ExtractSummary .*bank: 3 features in [\d.]+ s, 0 done before, 1 failed>", repr(summary))


def test_a_targets_pairs_have_names_and_visible_fractions(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    data = load_dataset("hicodet", hico_root(tmp_path, 4, splits=["train"]), "train").with_pairs()
    extract(data, tmp_path / "bank", tiny_config)
    assert cells(data.target(data[0].key)._repr_html_()) == [
        ["verb", "of", "\u25a0 human", "\u25a0 object"],
        ["race", "motorcycle", "1, 2, 30, 40", "5, 6, 50, 60"],
    ]
    _, target = FeatureDataset(tmp_path / "bank", data)[0]
    human, thing = (target.transform.visible_fraction(boxes)[0] for boxes in (target.boxes_h, target.boxes_o))
    assert cells(target._repr_html_())[1][4] == f"human {human:.0%}object {thing:.0%}" and human < 1  # two lines
    boxes = [each for each in drawing(target._repr_html_()) if each.tag == "rect"][1:]
    assert [each.get("stroke") for each in boxes] == list(COLOURS.values())
    assert [each.get("x") for each in boxes] == ["1", "5"]


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
def test_a_transform_is_drawn_to_scale(mode: ResizeMode) -> None:
    transform = ImageTransform(640, 320, mode, (224, 224), 16)
    oblong = ImageTransform(640, 320, mode, (224, 336), 16)
    assert f"224x336 (height x width), {mode}" in text(oblong._repr_html_())
    svg = drawing(transform._repr_html_())
    rect, hatching, grid = svg
    assert [rect.get(name) for name in ("x", "y", "width", "height")] == ["0", "0", "640", "320"]
    lines = lines_of(grid)
    assert len(lines) == 30
    x, y, _, length = lines[0]  # the input's left border, in pixels of the image
    assert (x, y, length) == {"center-crop": (160, 0, 320), "squash": (0, 0, 320), "pad": (0, -160, 640)}[mode]
    assert svg.get("viewBox") == f"0 {min(y, 0):g} 640 {max(length, 320):g}"
    if mode != "center-crop":
        assert lines_of(hatching) == []


@pytest.mark.parametrize("size", [(640, 320), (300, 500)])
def test_what_the_model_did_not_see_is_hatched(size: tuple[int, int]) -> None:
    transform = ImageTransform(*size, "center-crop", (224, 224), 16)
    x1, y1, x2, y2 = transform.visible
    hatching = lines_of(drawing(transform._repr_html_())[1])
    assert len(hatching) > 20
    for x, y, dx, dy in hatching:
        assert dx == -dy > 0
        for share in (0.01, 0.5, 0.99):
            a, b = x + share * dx, y + share * dy
            assert 0 <= a <= transform.width and 0 <= b <= transform.height
            assert not (x1 < a < x2 and y1 < b < y2)


def lines_of(path: ElementTree.Element) -> list[list[float]]:
    """(x, y, dx, dy) of each line of a path."""
    return [[float(each) for each in re.split("[ l]", line)] for line in path.get("d", "").split("M")[1:]]


def test_names_in_data_are_escaped(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    photographs(tmp_path / "images", 1)
    (tmp_path / "images/photo_0000.jpg").rename(tmp_path / "images/<script>\u202e.jpg")
    data = load_dataset("folder", tmp_path / "images")
    extract(data, tmp_path / "bank", tiny_config)
    for html in (data._repr_html_(), open_bank(tmp_path / "bank")._repr_html_()):
        assert r"&lt;script&gt;\u202e.jpg" in html and "<script" not in html


def test_a_bank_shows_itself_as_the_commands_do(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    data = load_dataset("hicodet", hico_root(tmp_path, 4, splits=["train"]), "train")
    place = tmp_path / "hicodet_pkl_files/clipbase_img_hicodet_train"
    extract(data, place, tiny_config)
    bank, key = open_bank(place), data[1].key
    drawing = bank.show(key, at=[(60, 45)])
    assert drawing.notes == []  # the image was found
    drawing.save(tmp_path / "python.png")
    patchbank("show", place, key, "--at", "60,45", "-o", tmp_path / "command.png", check=0)
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "command.png").read_bytes() == drawing._repr_png_()
    with pytest.raises(ConfigError, match=r"^at 9999,45 is outside the part that the model saw"):
        bank.show(key, at=[(9999, 45)])
    written = bank.report(sample=2)
    assert written.path == place.with_name(f"{place.name}-report.html")
    patchbank("report", place, "--sample", "2", "-o", tmp_path / "page.html", check=0)
    assert written.path.read_bytes() == (tmp_path / "page.html").read_bytes()
    assert parsed(written._repr_html_())[0].text == str(written.path)


def test_a_bar_outside_of_a_notebook_is_a_line(
    tmp_path: Path, tiny_config: ExtractConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(tmp_path / "images", 3)
    data = load_dataset("folder", tmp_path / "images")
    for expected in (r"extracted: 100%\|.*\| 3/3 \[", r"nothing to extract \[00:\d\d\]"):
        extract(data, tmp_path / "bank", tiny_config, progress=True)
        said = capsys.readouterr()
        assert re.match(expected, said.err.rstrip().split("\r")[-1]) and not said.out


def test_a_pages_link_leads_to_it_whatever_its_name(
    tmp_path: Path, tiny_config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "images", 1)
    extract(load_dataset("folder", tmp_path / "images"), tmp_path / "bank", tiny_config)
    for name in ("javascript:alert(1).html", "50%#1.html"):
        [link] = re.findall('href="(.*?)"', open_bank("bank").report(name)._repr_html_())
        address = urljoin((tmp_path / "notebook.ipynb").as_uri(), link)
        assert url2pathname(urlparse(address).path) == str(tmp_path / name)
