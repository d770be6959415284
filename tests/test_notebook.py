"""What notebooks show of objects: all of it escaped."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from patchbank import ExtractConfig, ImageTransform, extract, load_dataset, open_bank
from patchbank.config import ResizeMode
from patchbank.datasets.classes import OBJECTS
from patchbank.errors import ConfigError
from tests.support import hico_root, patchbank, photographs


def parsed(html: str) -> ElementTree.Element:
    """The markup, which must be well formed."""
    return ElementTree.fromstring(f"<div>{html}</div>")


def text(html: str) -> str:
    return " ".join(parsed(html).itertext())


def test_banks_datasets_and_targets(tmp_path: Path, tiny_config: ExtractConfig) -> None:
    data = load_dataset("hicodet", hico_root(tmp_path, 4, splits=["train"]), "train")
    extract(data, tmp_path / "bank", tiny_config)
    bank = open_bank(tmp_path / "bank")
    shown = text(bank._repr_html_())
    assert "4, such as HICO_train2015_0000.jpg" in shown and "patch_tokens (16, 32) float32" in shown
    assert "hicodet train" in text(data._repr_html_()) and "4, such as" in text(data._repr_html_())
    key = next(sample.key for sample in data if len(data.target(sample.key)))
    target = data.target(key)
    first = next(row for body in parsed(target._repr_html_()).iter("tbody") for row in body)
    assert first[2].text == OBJECTS[int(target.object[0])]
    assert text(bank.transform(key)._repr_html_()).startswith("ImageTransform image")


@pytest.mark.parametrize("mode", ["center-crop", "squash", "pad"])
def test_a_transform_is_drawn_to_scale(mode: ResizeMode) -> None:
    transform = ImageTransform(640, 320, mode, (224, 224), 16)
    oblong = ImageTransform(640, 320, mode, (224, 336), 16)
    assert f"224x336 (height x width), {mode}" in text(oblong._repr_html_())
    svg = parsed(transform._repr_html_()).find("svg")
    assert svg is not None
    [rect], [path] = svg.findall("rect"), svg.findall("path")
    # The first line is the input's left border, in pixels of the image.
    lines = [[float(each) for each in re.split("[ l]", line)] for line in path.get("d", "").split("M")[1:]]
    assert len(lines) == 30
    x, y, _, length = lines[0]
    expected = {"center-crop": (160, 0, 320), "squash": (0, 0, 320), "pad": (0, -160, 640)}[mode]
    assert (x - float(rect.get("x", 0)), y - float(rect.get("y", 0)), length) == expected


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
