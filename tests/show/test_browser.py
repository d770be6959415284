"""Pages in a real browser: nothing is loaded, nothing hostile runs, and maps show what numpy computes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from patchbank import Bank, Dataset, extract, load_dataset, open_bank, pool_regions, union_boxes
from patchbank.config import ExtractConfig
from patchbank.show.figure import _limits
from patchbank.show.gallery import Common
from patchbank.show.maps import similarities, unit
from patchbank.show.page import write_report
from tests.browser import until
from tests.show.conftest import HOSTILE
from tests.show.test_page import made_bank, random_tokens
from tests.support import hico_list, photographs, write_json

Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Open a page from the disk; at the end it must have said nothing on the console, and asked for nothing."""
    said: list[str] = []
    contexts = []

    def opened(path: Path, width: int = 1200, **options: Any) -> Any:
        viewport = {"width": width, "height": 900}
        context = browser.new_context(
            viewport=viewport, reduced_motion="reduce", **options
        )  # places stay where they are
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url)
        )
        tab.goto(path.as_uri())
        until(tab, "window.patchbank")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def page(annotated: tuple[Bank, Dataset], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The page of the annotated bank, and the error that it states."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    return path, write_report(annotated[0], path, annotated[1]).error + 1e-5


def shown(tab: Any, key: str, side: str = "left") -> None:
    """Show one of the sample's images in the pair."""
    tab.locator(f"#{side} select").select_option(label=key)


@contextmanager
def redrawn(tab: Any) -> Iterator[None]:
    """Wait for the maps of another query."""
    tab.evaluate("window.before = window.patchbank.asked")
    yield
    until(tab, "window.patchbank.asked !== window.before")


def at(tab: Any, bank: Bank, key: str, token: int, shot: str) -> dict[str, float]:
    """A patch's centre on a picture of a whole image, in CSS pixels."""
    tab.locator(shot).scroll_into_view_if_needed()
    area, transform = tab.locator(shot).bounding_box(), bank.transform(key)
    x, y = transform.points_from_grid([token % 4 + 0.5, token // 4 + 0.5])
    return {"x": float(area["width"] * x / transform.width), "y": float(area["height"] * y / transform.height)}


def hover(tab: Any, bank: Bank, key: str, token: int, shot: str = "#left .photo") -> Any:
    """Point at a patch; returns what the page then says."""
    place = at(tab, bank, key, token, shot)
    with redrawn(tab):
        tab.locator(shot).hover(position=place)
    return tab.evaluate("window.patchbank")


def click(tab: Any, bank: Bank, key: str, token: int, shot: str = "#left .photo") -> Any:
    """Click a patch; returns what the page then says."""
    hover(tab, bank, key, token, shot)
    with redrawn(tab):
        tab.locator(shot).click(position=at(tab, bank, key, token, shot))
    return tab.evaluate("window.patchbank")


def map_of(tab: Any, shot: str) -> np.ndarray:
    """(N, 4) from 0 to 1: the colours of a map's patches."""
    canvas = f"document.querySelector({json.dumps(shot + ' canvas')})"
    content = base64.b64decode(tab.evaluate(f"{canvas}.toDataURL()").partition(",")[2])
    return np.asarray(Image.open(BytesIO(content)).convert("RGBA"), np.float32).reshape(-1, 4) / 255


def inferno(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(N, 3): colours between both ends of a scale, as the page has them."""
    stops = colormaps["inferno"](np.linspace(0, 1, 17))[:, :3]
    places = ((values - low) / (high - low)).clip(0, 1) * 16
    return np.stack([np.interp(places, range(17), stops[:, each]) for each in range(3)], axis=1)


def text_of(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def test_the_map_is_what_numpy_computes(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank, (path, error) = annotated[0], page
    tab = visit(path)
    for key in list(bank)[2:4]:
        shown(tab, key)
        tokens = bank[key].numpy()
        for token in (0, 5, 15):
            found = hover(tab, bank, key, token)
            assert (found["image"], found["token"], found["chosen"], found["held"]) == (key, token, [], False)
            assert np.abs(np.array(found["values"]) - similarities(tokens, tokens[token])).max() <= error
            assert f"row {token // 4}, column {token % 4} (x " in tab.inner_text("#readout")


@pytest.mark.parametrize("release", ["Escape", "click", "button"])
def test_a_held_patch_lights_its_matches_in_every_image(
    release: str, annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    """In both large images and in all tiles, on the scale of the patch's own image; released, components come back."""
    bank, (path, error) = annotated[0], page
    keys = list(bank)
    tab = visit(path)
    components = Common.of(bank, bank.manifest.main, keys).components
    shown(tab, keys[2])
    shown(tab, keys[5], "right")
    places = {f"#all li:nth-child({number}) .map": key for number, key in enumerate(keys, 1)}
    places |= {f"#first li:nth-child({number}) .map": key for number, key in enumerate(keys[:6], 1)}
    places |= {"#left .map": keys[2], "#right .map": keys[5]}

    def components_are_shown() -> None:
        for place, key in places.items():
            assert np.abs(map_of(tab, place)[:, :3] - components.colours(bank[key].numpy())).max() < 0.01, place

    components_are_shown()
    click(tab, bank, keys[2], 5)
    hover(tab, bank, keys[5], 3, "#right .photo")  # what is held stays
    until(tab, f"Object.keys(window.patchbank.best).length === {len(keys)}")
    found = tab.evaluate("window.patchbank")
    assert (found["image"], found["token"], found["held"]) == (keys[2], 5, True)
    assert found["reading"] == [keys[5], 3]
    query = unit(bank[keys[2]].numpy()[5])
    own = unit(bank[keys[2]].numpy()) @ query
    for place, key in places.items():
        values = unit(bank[key].numpy()) @ query
        expected = inferno(values, own.min(), own.max())
        assert np.abs(map_of(tab, place)[:, :3] - expected).max() < 0.03 + 8 * error, place
        assert values[found["best"][key]] >= values.max() - 4 * error
    beside = (unit(bank[keys[5]].numpy()) @ query).max()
    assert tab.inner_text("#right .value") in {text_of(beside + each) for each in (-error, 0, error)}
    assert " at row 0, column 3 (x " in tab.inner_text("#readout") and "held" in tab.inner_text("#readout")
    if release == "button":
        tab.locator("#release").click()
    elif release == "click":
        click(tab, bank, keys[2], 5)
    else:
        tab.keyboard.press("Escape")
    until(tab, "!window.patchbank.held")
    tab.mouse.move(0, 0)
    until(tab, "!window.patchbank.image")
    components_are_shown()


def test_tiles_answer_and_open(annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit) -> None:
    """A tile is asked like a large image. A click holds its patch and opens it; the next ones open beside it."""
    bank, keys = annotated[0], list(annotated[0])
    tab = visit(page[0])
    found = hover(tab, bank, keys[3], 6, "#first li:nth-child(4) .photo")
    assert (found["image"], found["token"], found["held"]) == (keys[3], 6, False)
    tab.mouse.move(0, 0)
    until(tab, "!window.patchbank.image")  # and let go
    found = click(tab, bank, keys[3], 9, "#first li:nth-child(4) .map")
    assert (found["image"], found["token"], found["held"]) == (keys[3], 9, True)
    hover(tab, bank, keys[7], 2, "#all li:nth-child(8) .photo")
    tab.mouse.down()
    tab.mouse.up()
    until(tab, "document.querySelector('#right select').value === '7'")
    found = tab.evaluate("window.patchbank")
    assert (found["image"], found["token"], found["held"]) == (keys[3], 9, True)
    sides = [tab.locator(f"#{side} select").input_value() for side in ("left", "right")]
    assert sides == ["3", "7"]
    shown(tab, keys[7])  # each image is on one side: they change places
    assert [tab.locator(f"#{side} select").input_value() for side in ("left", "right")] == ["7", "3"]


def test_the_nearest_patches_of_other_images_are_shown_and_lead_there(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank, (path, error) = annotated[0], page
    key = list(bank)[2]
    tab = visit(path)
    shown(tab, key)
    click(tab, bank, key, 5)
    until(tab, "window.patchbank.held && window.patchbank.nearest")
    found = tab.evaluate("window.patchbank.nearest")
    assert [each["value"] for each in found] == sorted((each["value"] for each in found), reverse=True)
    assert sorted(each["image"] for each in found) == sorted(set(bank) - {key})
    for each in found:
        values = unit(bank[each["image"]].numpy()) @ unit(bank[key].numpy()[5])
        assert abs(each["value"] - values.max()) <= 2 * error and values[each["token"]] >= values.max() - 4 * error
    tab.locator("#nearest button").first.focus()
    tab.keyboard.press("Enter")
    until(tab, "window.patchbank.reading")
    now = tab.evaluate("window.patchbank")
    assert (now["image"], now["token"], now["reading"]) == (key, 5, [found[0]["image"], found[0]["token"]])
    assert tab.evaluate("document.querySelector('#right .shot') === document.activeElement")
    assert tab.locator("#right option:checked").inner_text() == found[0]["image"]


def test_patches_are_drawn_where_they_lie_in_the_colours_of_their_values(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    """Of the map, the colours between both ends of the scale; at rest, the components of all images."""
    bank = annotated[0]
    key = list(bank)[1]  # a broad image: the patches lie in its middle
    transform = bank.transform(key)
    assert transform.width > transform.height
    tab = visit(page[0])
    shown(tab, key)
    expected = Common.of(bank, bank.manifest.main, list(bank)).components.colours(bank[key].numpy())
    for asked in (False, True):
        if asked:
            values = np.array(hover(tab, bank, key, 6)["values"])
            expected = inferno(values, values.min(), values.max())
            assert tab.inner_text("#low") == text_of(values.min()) and tab.inner_text("#high") == "1.00"
        pixels = np.asarray(Image.open(BytesIO(tab.locator("#left .map").screenshot())).convert("RGB")) / 255
        scale = pixels.shape[1] / transform.width
        for token in range(16):
            x, y = scale * transform.points_from_grid([token % 4 + 0.5, token // 4 + 0.5])
            assert np.abs(pixels[int(y), int(x)] - expected[token]).max() < 0.04, (asked, token)
        beside = pixels[int(scale * transform.height / 2), int(scale * transform.visible[0] / 2)]
        assert beside.min() > 0.5  # what the model did not see is faint
    ramp = np.asarray(Image.open(BytesIO(tab.locator("#ramp").screenshot())).convert("RGB")) / 255
    ends = inferno(np.array([0.0, 1.0]), 0, 1)
    assert np.abs(ramp[5, 3] - ends[0]).max() < 0.1 and np.abs(ramp[5, -4] - ends[1]).max() < 0.1


@pytest.mark.parametrize("resize", ["center-crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(150, 60), (60, 150)])
def test_boxes_of_any_geometry(
    size: tuple[int, int], resize: str, tmp_path: Path, tiny_config: ExtractConfig, visit: Visit
) -> None:
    """Landscape and portrait, cropped, squashed and padded; boxes that reach beyond what the model saw."""
    root, (width, height) = tmp_path / "root", size
    images = root / "hicodet/hico_20160224_det/images/train2015"
    photographs(images, 1, (min(size), max(size)) if width < height else size)
    with Image.open(images / "photo_0000.jpg") as image:
        image.resize(size).save(images / "photo_0000.jpg")
    boxes = [[2, 3, width * 0.6, height * 0.8], [width * 0.45, height * 0.3, width - 1, height - 2]]
    entry = hico_list(["photo_0000.jpg"])[0] | {
        "annotations": [{"bbox": box, "category_id": 1 + number} for number, box in enumerate(boxes)],
        "hoi_annotation": [{"subject_id": 0, "object_id": 1, "category_id": 77}],
    }
    write_json(root / "hicodet/trainval_hico.json", [entry])
    dataset = load_dataset("hicodet", root, "train")
    extract(dataset, tmp_path / "bank", replace(tiny_config, resize=resize))  # type: ignore[arg-type]
    bank = open_bank(tmp_path / "bank")
    error = write_report(bank, tmp_path / "page.html", dataset).error
    tab = visit(tmp_path / "page.html")
    assert ("dimmed part" in tab.inner_text("#left .notes")) == (resize == "center-crop")
    tokens, transform, target = (
        bank["photo_0000.jpg"],
        bank.transform("photo_0000.jpg"),
        dataset.target("photo_0000.jpg"),
    )
    for button, box in zip(
        ("#left .boxes .human", "#left .boxes .object", "#left .boxes .union"),
        torch.cat([target.boxes_h, target.boxes_o, union_boxes(target.boxes_h, target.boxes_o)]),
        strict=True,
    ):
        with redrawn(tab):
            tab.locator(button).click()
        pooled = pool_regions(tokens, box[None], transform)[0].numpy()
        values = np.array(tab.evaluate("window.patchbank.values"))
        assert np.abs(values - similarities(tokens.numpy(), pooled)).max() <= 2 * error + 1e-4
        seen = float(transform.visible_fraction(box))
        assert ("% visible)" in tab.inner_text("#readout")) == (seen < 0.995)
        if seen < 0.995:
            assert f"({max(1, round(100 * seen))}% visible)" in tab.inner_text("#readout")
        with redrawn(tab):
            tab.keyboard.press("Escape")
    # Padding has no colour in the map, and does not count in its range.
    with redrawn(tab):
        tab.locator("#left .photo").press("Home")
    valid = transform.valid.flatten()
    values = np.array(tab.evaluate("window.patchbank.values"))[valid]
    assert tab.inner_text("#low") == text_of(values.min())
    assert ((map_of(tab, "#left .map")[:, 3] > 0) == valid).all()
    pixels = np.asarray(Image.open(BytesIO(tab.locator("#left .map").screenshot())).convert("RGB")) / 255
    expected = inferno(np.array(tab.evaluate("window.patchbank.values")), values.min(), values.max())
    x1, y1, x2, y2 = _limits(transform)
    for token in np.flatnonzero(valid):
        x, y = transform.points_from_grid([token % 4 + 0.5, token // 4 + 0.5])
        column, row = pixels.shape[1] * (x - x1) / (x2 - x1), pixels.shape[0] * (y - y1) / (y2 - y1)
        if 4 < row < len(pixels) - 4 and 4 < column < pixels.shape[1] - 4:  # of a patch that is half padding, an edge
            assert np.abs(pixels[int(row), int(column)] - expected[token]).max() < 0.05, token
    # The keyboard stays among the patches that show the image.
    rows, columns = (np.flatnonzero(transform.valid.any(axis)) for axis in (1, 0))
    for press, ends in (("Home", columns[0]), ("End", columns[-1])):
        tab.locator("#left .photo").press(press)
        until(tab, f"window.patchbank.token % 4 === {ends}")
    for _ in range(5):
        tab.locator("#left .photo").press("ArrowDown")
    until(tab, f"window.patchbank.token === {4 * rows[-1] + columns[-1]}")
    for _ in range(2):
        tab.locator("#left .photo").press("ArrowRight")
    assert tab.evaluate("window.patchbank.token") == 4 * rows[-1] + columns[-1]


@pytest.mark.parametrize("kept", [True, False])
def test_the_policy_is_in_force(kept: bool, page: tuple[Path, float], browser: Any, tmp_path: Path) -> None:
    """Content injected into a page can neither run nor load anything; without the policy, it could."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    content = page[0].read_text()
    (tmp_path / "page.html").write_text(content if kept else content.replace("Content-Security-Policy", "nothing"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        tab = browser.new_page()
        tab.goto((tmp_path / "page.html").as_uri())
        until(tab, "window.patchbank")
        tab.evaluate(
            """(address) => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const place = document.createElement("div");
            place.innerHTML = `<img src="${address}/image" onerror="window.hackedToo = 1">`;
            document.body.append(place);
            fetch(`${address}/fetched`).catch(() => 0);
        }""",
            address,
        )
        if not kept:
            until(tab, "window.hackedToo")
        tab.wait_for_timeout(300)
        assert tab.evaluate("[window.hacked, window.hackedToo]") == ([None, None] if kept else [1, 1])
        tab.close()
        server.shutdown()
    assert sorted(asked) == ([] if kept else ["/fetched", "/image"])


def test_boxes_and_their_union_are_pooled_as_the_library_does(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank, dataset = annotated
    path, error = page
    key = next(key for key in bank if len(dataset.target(key)))
    target, tokens = dataset.target(key), bank[key]
    tab = visit(path)
    shown(tab, key)
    human, thing = (tab.locator(f"#left .boxes .{kind}").first for kind in ("human", "object"))

    def expected(box: torch.Tensor) -> np.ndarray:
        pooled = pool_regions(tokens, box[None], bank.transform(key))[0]
        return similarities(tokens.numpy(), pooled.numpy())

    with redrawn(tab):
        human.click()
    values = np.array(tab.evaluate("window.patchbank.values"))
    assert np.abs(values - expected(target.boxes_h[0])).max() <= 2 * error
    with redrawn(tab):
        thing.click()
    values = np.array(tab.evaluate("window.patchbank.values"))
    union = union_boxes(target.boxes_h, target.boxes_o)[0]
    assert np.abs(values - expected(union)).max() <= 2 * error
    assert np.abs(values - expected(target.boxes_h[0])).max() > 2 * error
    assert "union" in tab.inner_text("#readout")
    with redrawn(tab):
        thing.click()
    assert tab.evaluate("window.patchbank.chosen") == [0]
    pair = tab.locator("#left .boxes .union").first
    assert pair.inner_text() == "human 1, race, motorcycle 2"
    with redrawn(tab):
        pair.click()
    assert np.abs(np.array(tab.evaluate("window.patchbank.values")) - expected(union)).max() <= 2 * error
    assert [each.get_attribute("aria-pressed") for each in (human, thing, pair)] == ["true"] * 3


def test_boxes_are_outlined_where_they_lie(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    """While their button is pointed at or has the focus, and while they are chosen; then their union too."""
    bank, dataset = annotated
    key = next(key for key in bank if len(dataset.target(key)))
    tab = visit(page[0])
    shown(tab, key)
    outline = tab.locator("#left .photo .box")
    assert outline.count() == 0
    tab.locator("#left .boxes .object").first.hover()
    until(tab, "document.querySelector('#left .photo .object')")
    area, box = tab.locator("#left .photo").bounding_box(), outline.bounding_box()
    corner = [box["x"] - area["x"], box["y"] - area["y"]]
    found = np.array([*corner, corner[0] + box["width"], corner[1] + box["height"]])
    expected = dataset.target(key).boxes_o[0].numpy() * area["width"] / bank.transform(key).width
    assert np.abs(found - expected).max() < 1
    with redrawn(tab):
        tab.locator("#left .boxes .union").first.click()
    tab.locator("#left .boxes .union").first.blur()
    tab.mouse.move(0, 0)
    until(tab, "document.querySelectorAll('#left .photo .box').length === 3")


def test_the_keyboard_and_a_finger_reach_everything(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank = annotated[0]
    keys = list(bank)
    tab = visit(page[0], 390, has_touch=True)
    assert tab.locator("#runs td:last-child").last.bounding_box()["width"] > 300  # it scrolls, and stays low
    tab.locator("#query").focus()
    for _ in range(2):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # the second image: its middle patch is held, and it gets the focus
    assert tab.evaluate("document.activeElement === document.querySelector('#left .shot')")
    until(tab, "window.patchbank.held")
    found = tab.evaluate("window.patchbank")
    assert (found["token"], found["image"]) == (10, keys[1])  # in the middle of 4 x 4
    with redrawn(tab):
        tab.keyboard.press("Enter")
    assert not tab.evaluate("window.patchbank.held")
    token = 10
    for press, step in (("ArrowRight", 1), ("ArrowUp", -4), ("ArrowUp", -4), ("ArrowDown", 4), ("ArrowLeft", -1)):
        with redrawn(tab):
            tab.keyboard.press(press)
        token += step
        assert tab.evaluate("window.patchbank.token") == token
    with redrawn(tab):
        tab.keyboard.press("Enter")
    assert tab.evaluate("window.patchbank.held") and tab.locator("#release").is_visible()
    with redrawn(tab):
        tab.keyboard.press("ArrowRight")  # what is held stays, and is read out
    found = tab.evaluate("window.patchbank")
    assert found["token"] == token and found["reading"] == [keys[1], token + 1]
    assert tab.inner_text("#readout").startswith(f"{text_of(found['values'][token + 1])} at row")
    with redrawn(tab):
        tab.keyboard.press("Escape")
    assert tab.locator("#release").is_hidden()
    for shot, token, key in (("#left .photo", 9, keys[1]), ("#first li:nth-child(4) .photo", 6, keys[3])):
        place, area = at(tab, bank, key, token, shot), tab.locator(shot).bounding_box()
        with redrawn(tab):
            tab.touchscreen.tap(area["x"] + place["x"], area["y"] + place["y"])
        found = tab.evaluate("window.patchbank")
        assert (found["image"], found["token"], found["held"]) == (key, token, True)
        with redrawn(tab):
            tab.locator("#release").tap()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_first_screen_is_whole_and_nothing_is_cut(
    width: int, scheme: str, annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    """What the bank is, and six images with their components, without scrolling; no part wider than the screen."""
    tab = visit(page[0], width, color_scheme=scheme)
    for place in ("h1", ".numbers", "#first li:nth-child(6) .map"):
        area = tab.locator(place).bounding_box()
        assert area["y"] + area["height"] <= (844 if width == 390 else 800), place
    assert tab.locator("#first li").count() == 6
    click(tab, annotated[0], next(iter(annotated[0])), 5)
    until(tab, "window.patchbank.nearest")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wider = """() => [...document.querySelectorAll("body *")].filter((each) => {
        const area = each.getBoundingClientRect();
        return area.right > innerWidth + 1 && !each.closest(".wide, .sheet, .unseen");
    }).map((each) => each.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wider) == []
    paper = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (int(paper.strip("rgb()").split(",")[0]) > 128) == (scheme == "light")


def test_the_search_filters(annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit) -> None:
    tab = visit(page[0])
    buttons = tab.locator("#all li:visible")
    assert buttons.count() == 10
    tab.fill("#query", "0007")
    assert buttons.count() == 1 and "1 of 10" in tab.inner_text("#found")
    tab.fill("#query", "motorcycle")  # an object; every second image has one
    assert buttons.count() == 5
    tab.fill("#query", "race train")
    assert buttons.count() == 5
    tab.fill("#query", "unicorn")
    assert buttons.count() == 0 and "0 of 10" in tab.inner_text("#found")
    tab.fill("#query", "0003")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement === document.querySelector('#left .shot')")
    assert "0003" in tab.locator("#left option:checked").inner_text()


def test_hostile_names_are_shown_and_not_run(hostile: tuple[Bank, Dataset], tmp_path: Path, visit: Visit) -> None:
    write_report(hostile[0], tmp_path / "page.html", hostile[1])
    tab = visit(tmp_path / "page.html")
    names = tab.locator("#left option").all_inner_texts()
    assert len(names) == len(HOSTILE)
    assert HOSTILE[0] in names and HOSTILE[2] in names and HOSTILE[3] in names
    assert "\\u202egpj.exe\\x07.jpg" in names  # what cannot be seen, and would turn the text round, is spelt out
    for number in range(len(names)):
        tab.locator("#all button .photo").nth(number).click()
        until(tab, "window.patchbank.held && window.patchbank.nearest")
        with redrawn(tab):
            tab.keyboard.press("Escape")
    assert tab.evaluate("window.hacked") is None
    assert "<b>broken<" in tab.inner_text("#failures") or tab.locator("#failures details").count() == 1
    assert tab.locator("main svg[onload], main img:not([src^='data:image/jpeg']), main b:not(.value)").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(
    scheme: str, annotated: tuple[Bank, Dataset], hostile: tuple[Bank, Dataset], tmp_path: Path, visit: Visit
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for bank, dataset in (annotated, hostile):
        write_report(bank, tmp_path / "page.html", dataset)
        tab = visit(tmp_path / "page.html", color_scheme=scheme, bypass_csp=True)
        results = axe.run(tab).response["violations"]
        serious = [
            (each["id"], [node["html"][:120] for node in each["nodes"]][:3])
            for each in results
            if each["impact"] in ("serious", "critical", "moderate")
        ]
        assert serious == []


def test_a_link_opens_an_image(page: tuple[Path, float], visit: Visit) -> None:
    """Also after a reload."""
    tab = visit(page[0])
    tab.evaluate("location.hash = 'image-4'")
    until(tab, "document.activeElement === document.querySelector('#left .shot')")
    assert tab.locator("#left select").input_value() == "4"
    tab.locator("#all button").nth(2).focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#image-2"
    tab.reload()
    until(tab, "window.patchbank")
    assert tab.locator("#left select").input_value() == "2"


def test_an_image_of_numbers_that_are_none_says_so(tmp_path: Path, visit: Visit) -> None:
    features = {f"{number:02}.jpg": random_tokens(number) for number in range(10)}
    made_bank(tmp_path / "bank", features)
    [shard] = (tmp_path / "bank").glob("shard-*")
    row = features["03.jpg"].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(row[:4], b"\xff\xff\xff\x7f"))
    write_report(open_bank(tmp_path / "bank"), tmp_path / "page.html")
    tab = visit(tmp_path / "page.html")
    assert "1 of 10 images has an invalid feature" in tab.inner_text("header")
    tab.locator(".outliers a").click()
    assert tab.locator("#left option:checked").inner_text() == "03.jpg"
    assert "not finite" in tab.inner_text("#left .notes")
    tab.locator("#left .shot").press("ArrowRight")
    tab.locator("#left .shot").click()
    tab.wait_for_timeout(100)
    assert not tab.evaluate("window.patchbank.image")
    tab.locator("#right .shot").click()  # the others answer; that image has no map
    until(tab, "window.patchbank.nearest")
    assert len(tab.evaluate("window.patchbank.nearest")) == 8


def test_a_link_to_what_stands_out_works_again_and_again(tmp_path: Path, visit: Visit) -> None:
    features = {f"{number:02}.jpg": random_tokens(number) for number in range(20)}
    features["99.jpg"] = random_tokens(30, scale=300)
    write_report(made_bank(tmp_path / "bank", features), tmp_path / "page.html")
    tab = visit(tmp_path / "page.html")
    for _ in range(2):
        tab.locator(".outliers a").click()
        assert tab.locator("#left option:checked").inner_text() == "99.jpg"
        tab.locator("#all button").first.click()
        assert tab.locator("#left option:checked").inner_text() == "00.jpg"
        tab.keyboard.press("Escape")
