"""Pages in a real browser: nothing is loaded, nothing hostile runs, and maps show what numpy computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchbank import Bank, Dataset, pool_regions, union_boxes
from patchbank.pictures.maps import similarities
from patchbank.report.page import write_report
from tests.browser import until
from tests.report.conftest import HOSTILE

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
        until(tab, "window.patchbank && window.patchbank.values")
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


def shown(tab: Any, key: str) -> Any:
    """Open one of the gallery's images."""
    tab.locator("#thumbnails button", has_text=key).click()
    until(tab, f"window.patchbank.image === {key!r}")
    return tab.evaluate("window.patchbank")


@contextmanager
def redrawn(tab: Any) -> Iterator[None]:
    """Wait for another map than the one that is shown."""
    tab.evaluate("window.before = window.patchbank")
    yield
    until(tab, "window.patchbank !== window.before")


def at(tab: Any, bank: Bank, key: str, token: int) -> tuple[float, float]:
    """Where a patch lies on the canvas, from its upper left corner."""
    tab.locator("#image").scroll_into_view_if_needed()
    area = tab.locator("#image").bounding_box()
    transform = bank.transform(key)
    columns = transform.grid[1]
    x, y = transform.points_from_grid([token % columns + 0.5, token // columns + 0.5])
    return area["width"] * x / transform.width, area["height"] * y / transform.height


def test_the_map_is_what_numpy_computes(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank, (path, error) = annotated[0], page
    tab = visit(path)
    for key in list(bank)[2:4]:
        shown(tab, key)
        tokens = bank[key].numpy()
        for token in (0, 5, 15):
            x, y = at(tab, bank, key, token)
            with redrawn(tab):
                tab.locator("#image").hover(position={"x": x, "y": y})
            found = tab.evaluate("window.patchbank")
            assert (found["image"], found["token"], found["chosen"]) == (key, token, [])
            assert np.abs(np.array(found["values"]) - similarities(tokens, tokens[token])).max() <= error
            assert f"row {token // 4 + 1}, column {token % 4 + 1}" in tab.inner_text("#readout")


def test_boxes_and_their_union_are_pooled_as_the_library_does(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank, dataset = annotated
    path, error = page
    key = next(key for key in bank if len(dataset.target(key)))
    target, tokens = dataset.target(key), bank[key]
    tab = visit(path)
    shown(tab, key)
    human, thing = tab.locator("#boxes .human").first, tab.locator("#boxes .object").first

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
    pair = tab.locator("#relations button").first
    assert pair.inner_text() == "human 1, race, motorcycle 2"
    with redrawn(tab):
        pair.click()
    assert np.abs(np.array(tab.evaluate("window.patchbank.values")) - expected(union)).max() <= 2 * error
    assert [each.get_attribute("aria-pressed") for each in (human, thing, pair)] == ["true"] * 3


def test_boxes_are_chosen_in_the_image(annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit) -> None:
    bank, dataset = annotated
    key = next(key for key in bank if len(dataset.target(key)))
    transform, target = bank.transform(key), dataset.target(key)
    tab = visit(page[0])
    shown(tab, key)
    tab.locator("#image").scroll_into_view_if_needed()
    area = tab.locator("#image").bounding_box()
    x1, y1, x2, y2 = (target.boxes_o[0].numpy() * area["width"] / transform.width).tolist()
    for place, chosen in (
        ((x2, (y1 + y2) / 2), [1]),
        ((4, 8), [1, 0]),
        (((x1 + x2) / 2, y2), [0]),
    ):  # an edge; a number
        with redrawn(tab):
            tab.locator("#image").click(position={"x": place[0], "y": place[1]})
        assert tab.evaluate("window.patchbank.chosen") == chosen
    tab.locator("#show-boxes").uncheck()  # what is not seen cannot be chosen: a patch is
    with redrawn(tab):
        tab.locator("#image").click(position={"x": (x1 + x2) / 2, "y": y2})
    assert tab.evaluate("window.patchbank.chosen") == [] and tab.locator("#fixed").is_checked()


def test_the_keyboard_and_a_finger_reach_everything(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank = annotated[0]
    key = next(iter(bank))
    tab = visit(page[0], 390, has_touch=True)
    tab.locator("#query").focus()
    for _ in range(2):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # the second image: its name gets the focus
    assert tab.evaluate("document.activeElement.id") == "name"
    tab.locator("#image").focus()
    start = tab.evaluate("window.patchbank.token")
    for press, step in (("ArrowRight", 1), ("ArrowDown", 4), ("ArrowLeft", -1), ("ArrowUp", -4)):
        before = tab.evaluate("window.patchbank.token")
        with redrawn(tab):
            tab.keyboard.press(press)
        after = tab.evaluate("window.patchbank.token")
        assert after == before + step or (step == 1 and after % 4 == 3) or (step == 4 and after >= 12)
    assert isinstance(start, int)
    tab.keyboard.press("Enter")
    assert tab.locator("#fixed").is_checked()
    held = tab.evaluate("window.patchbank")
    with redrawn(tab):
        tab.keyboard.press(
            "ArrowRight" if held["token"] % 4 < 3 else "ArrowLeft"
        )  # what is held stays, and is read out
    found = tab.evaluate("window.patchbank")
    assert found["token"] == held["token"] and abs(found["reading"] - held["token"]) == 1
    assert tab.inner_text("#readout").startswith(
        f"{found['values'][found['reading']]:.2f} in row".replace("-", "\u2212")
    )
    tab.keyboard.press("Escape")
    assert not tab.locator("#fixed").is_checked()
    shown(tab, key)
    x, y = at(tab, bank, key, 9)
    area = tab.locator("#image").bounding_box()
    with redrawn(tab):
        tab.touchscreen.tap(area["x"] + x, area["y"] + y)
    assert tab.evaluate("window.patchbank.token") == 9
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390  # nothing is cut at a phone's width


def test_the_search_filters(annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit) -> None:
    tab = visit(page[0])
    buttons = tab.locator("#thumbnails li:visible")
    assert buttons.count() == 10
    tab.fill("#query", "0007")
    assert buttons.count() == 1 and "1 of 10" in tab.inner_text("#matches")
    tab.fill("#query", "motorcycle")  # an object; every second image has one
    assert buttons.count() == 5
    tab.fill("#query", "race train")
    assert buttons.count() == 5
    tab.fill("#query", "unicorn")
    assert buttons.count() == 0 and "0 of 10" in tab.inner_text("#matches")
    tab.fill("#query", "0003")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "name" and "0003" in tab.inner_text("#name")


def test_hostile_names_are_shown_and_not_run(hostile: tuple[Bank, Dataset], tmp_path: Path, visit: Visit) -> None:
    write_report(hostile[0], tmp_path / "page.html", hostile[1])
    tab = visit(tmp_path / "page.html")
    names = tab.locator("#thumbnails .name").all_inner_texts()
    assert len(names) == len(HOSTILE)
    assert HOSTILE[0] in names and HOSTILE[2] in names and HOSTILE[3] in names
    assert "\\u202egpj.exe\\x07.jpg" in names  # what cannot be seen, and would turn the text round, is spelt out
    for number in range(len(names)):
        with redrawn(tab):
            tab.locator("#thumbnails button").nth(number).click()
    assert tab.evaluate("window.hacked") is None
    assert "<b>broken<" in tab.inner_text("#failures") or tab.locator("#failures details").count() == 1
    assert tab.locator("main img, main svg[onload], main b").count() == len(names)  # the thumbnails alone


def test_colours_and_pictures_are_drawn(page: tuple[Path, float], visit: Visit) -> None:
    """A map has many colours, and other ones as principal components; the picture is the image's."""
    tab = visit(page[0])

    def colours(id: str) -> int:
        picture = Image.open(BytesIO(tab.locator(f"#{id}").screenshot()))
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))

    assert colours("image") > 200
    assert colours("map") > 10 and colours("components") > 10
    assert "of the variance" in tab.inner_text("#shares")
    before = tab.locator("#map").screenshot()
    with redrawn(tab):
        tab.get_by_label("maps over the image").check()
    assert tab.locator("#map").screenshot() != before and colours("map") > 100


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


def test_many_images_open_and_answer(annotated: tuple[Bank, Dataset], tmp_path: Path, visit: Visit) -> None:
    """A list that is linked to: what stands out is opened by its link."""
    write_report(annotated[0], tmp_path / "page.html", annotated[1])
    tab = visit(tmp_path / "page.html")
    tab.evaluate("location.hash = 'image-4'")
    until(tab, "document.activeElement.id === 'name'")
    assert tab.inner_text("#name") == tab.locator("#image-4 .name").inner_text()
