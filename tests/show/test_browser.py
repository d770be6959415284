"""Pages in a real browser: nothing is loaded, nothing hostile runs, and maps show what numpy computes."""

from __future__ import annotations

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
    """A patch's centre on the canvas, in CSS pixels."""
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
            assert f"row {token // 4}, column {token % 4} (x " in tab.inner_text("#readout")


def test_the_nearest_patches_of_other_images_are_shown_and_lead_there(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank, (path, error) = annotated[0], page
    key = list(bank)[2]
    tab = visit(path)
    shown(tab, key)
    x, y = at(tab, bank, key, 5)
    tab.locator("#image").hover(position={"x": x, "y": y})
    until(tab, "window.patchbank.token === 5 && window.patchbank.nearest")
    found = tab.evaluate("window.patchbank.nearest")
    assert [each["value"] for each in found] == sorted((each["value"] for each in found), reverse=True)
    assert sorted(each["image"] for each in found) == sorted(set(bank) - {key})
    for each in found:
        values = unit(bank[each["image"]].numpy()) @ unit(bank[key].numpy()[5])
        assert abs(each["value"] - values.max()) <= 2 * error and values[each["token"]] >= values.max() - 4 * error
    tab.locator("#nearest button").first.click()
    until(tab, f"window.patchbank.image === {json.dumps(found[0]['image'])}")
    until(tab, f"window.patchbank.token === {found[0]['token']}")
    assert tab.is_checked("#fixed")


def test_patches_are_drawn_where_they_lie_in_the_colours_of_their_values(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    """Of the map, the colours between both ends of the scale; of the components, those of all images."""
    bank = annotated[0]
    key = list(bank)[1]  # a broad image: the patches lie in its middle
    transform = bank.transform(key)
    assert transform.width > transform.height
    tab = visit(page[0])
    shown(tab, key)
    x, y = at(tab, bank, key, 6)
    with redrawn(tab):
        tab.locator("#image").hover(position={"x": x, "y": y})
    values = np.array(tab.evaluate("window.patchbank.values"))
    tab.mouse.move(0, 0)
    cividis = colormaps["cividis"](np.linspace(0, 1, 13))[:, :3]
    places = (values - values.min()) / (values.max() - values.min()) * 12
    expected = np.stack([np.interp(places, range(13), cividis[:, each]) for each in range(3)], axis=1)
    of_components = Common.of(bank, bank.manifest.main, list(bank)).components.colours(bank[key].numpy())
    for canvas, colours in (("map", expected), ("components", of_components)):
        tab.locator(f"#{canvas}").scroll_into_view_if_needed()
        pixels = np.asarray(Image.open(BytesIO(tab.locator(f"#{canvas}").screenshot())).convert("RGB")) / 255
        scale = pixels.shape[1] / transform.width
        for token in range(16):
            x, y = scale * transform.points_from_grid([token % 4 + 0.5, token // 4 + 0.5])
            assert np.abs(pixels[int(y), int(x)] - colours[token]).max() < 0.03, (canvas, token)
        beside = pixels[int(scale * transform.height / 2), int(scale * transform.visible[0] / 2)]
        assert beside.min() > 0.5  # what the model did not see is faint
    assert tab.inner_text("#low") == f"{values.min():.2f}".replace("-", "\u2212")
    assert tab.inner_text("#high") == "1.00"
    ramp = np.asarray(Image.open(BytesIO(tab.locator("#ramp").screenshot())).convert("RGB")) / 255
    assert np.abs(ramp[5, 3] - cividis[0]).max() < 0.05 and np.abs(ramp[5, -4] - cividis[-1]).max() < 0.05


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
    assert tab.locator("#dimmed").is_visible() == (resize == "center-crop")
    tokens, transform, target = (
        bank["photo_0000.jpg"],
        bank.transform("photo_0000.jpg"),
        dataset.target("photo_0000.jpg"),
    )
    for button, box in zip(
        ("#boxes .human", "#boxes .object", "#relations button"),
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
        tab.locator("#image").press("Escape")
    # Padding has no colour in the map, and does not count in its range.
    valid = transform.valid.flatten()
    values = np.array(tab.evaluate("window.patchbank.values"))[valid]
    assert tab.inner_text("#low") == f"{values.min():.2f}".replace("-", "\u2212")
    pixels = np.asarray(Image.open(BytesIO(tab.locator("#map").screenshot())).convert("RGB")).astype(int)
    x1, y1, x2, y2 = limits = _limits(transform)
    for token in range(16):
        x, y = transform.points_from_grid([token % 4 + 0.5, token // 4 + 0.5])
        column, row = pixels.shape[1] * (x - x1) / (x2 - x1), pixels.shape[0] * (y - y1) / (y2 - y1)
        shade = pixels[int(row), int(column)]
        assert (abs(shade - 255).max() > 8) == valid[token], (token, shade, limits)
    # The keyboard stays among the patches that show the image.
    rows, columns = (np.flatnonzero(transform.valid.any(axis)) for axis in (1, 0))
    for press, ends in (("Home", columns[0]), ("End", columns[-1])):
        tab.locator("#image").press(press)
        until(tab, f"window.patchbank.token % 4 === {ends}")
    for _ in range(5):
        tab.locator("#image").press("ArrowDown")
    until(tab, f"window.patchbank.token === {4 * rows[-1] + columns[-1]}")
    for _ in range(2):
        tab.locator("#image").press("ArrowRight")
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
        until(tab, "window.patchbank && window.patchbank.values")
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
    assert tab.locator("#runs td:last-child").last.bounding_box()["width"] > 300  # it scrolls, and stays low
    tab.locator("#query").focus()
    for _ in range(2):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # the second image: its name gets the focus
    assert tab.evaluate("document.activeElement.id") == "name"
    tab.locator("#image").focus()
    token = tab.evaluate("window.patchbank.token")
    assert token == 10  # in the middle of 4 x 4
    for press, step in (("ArrowRight", 1), ("ArrowUp", -4), ("ArrowUp", -4), ("ArrowDown", 4), ("ArrowLeft", -1)):
        with redrawn(tab):
            tab.keyboard.press(press)
        token += step
        assert tab.evaluate("window.patchbank.token") == token
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
        f"{found['values'][found['reading']]:.2f} at row".replace("-", "\u2212")
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


def test_many_boxes_have_their_numbers_in_the_image(
    annotated: tuple[Bank, Dataset], tmp_path: Path, visit: Visit
) -> None:
    """Forty boxes of one place, and one outside: each number is clicked where it stands; none lies on another."""
    bank, dataset = annotated
    entries = json.loads(dataset.annotations.read_text())
    key = entries[1]["file_name"]
    width, height = bank.size(key)
    boxes = [[width - 30 - each / 8, height - 20 - each / 8, width - 1, height - 1] for each in range(40)]
    boxes[-1] = [width + 5, 3, width + 20, 30]
    entries[1]["annotations"] = [{"bbox": box, "category_id": 1 + each % 2} for each, box in enumerate(boxes)]
    entries[1]["hoi_annotation"] = [
        {"subject_id": each, "object_id": each + 1, "category_id": 77} for each in range(0, 40, 2)
    ]
    write_json(tmp_path / "list.json", entries)
    crowded = replace(dataset, annotations=tmp_path / "list.json")
    write_report(bank, tmp_path / "page.html", crowded)
    for screen in (1200, 390):
        tab = visit(tmp_path / "page.html", screen)
        shown(tab, key)
        found = tab.evaluate(
            """() => {
            const canvas = document.getElementById("image"), area = canvas.getBoundingClientRect(), found = new Set();
            for (let y = 4; y < area.height; y += 6)
                for (let x = 4; x < area.width; x += 6) {
                    const event = { clientX: area.left + x, clientY: area.top + y, pointerType: "mouse" };
                    canvas.dispatchEvent(new PointerEvent("pointermove", event));
                    if (canvas.style.cursor === "pointer") found.add(canvas.title);
                }
            return [...found];
        }"""
        )
        assert len(found) == 39, (screen, found)  # all but the one outside


def test_a_finger_reads_what_is_held(annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit) -> None:
    bank = annotated[0]
    key = list(bank)[2]
    tab = visit(page[0], 390, has_touch=True)
    shown(tab, key)
    tab.locator("#fixed").check()
    held = tab.evaluate("window.patchbank.token")
    x, y = at(tab, bank, key, 3)
    area = tab.locator("#image").bounding_box()
    with redrawn(tab):
        tab.touchscreen.tap(area["x"] + x, area["y"] + y)
    found = tab.evaluate("window.patchbank")
    assert (found["token"], found["reading"]) == (held, 3) and tab.locator("#fixed").is_checked()


def test_what_is_held_stays_while_the_pointer_reads_others(
    annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit
) -> None:
    bank = annotated[0]
    key = list(bank)[2]
    tab = visit(page[0])
    shown(tab, key)
    for token, click in ((5, True), (11, False), (6, False)):
        x, y = at(tab, bank, key, token)
        with redrawn(tab):
            (tab.locator("#image").click if click else tab.locator("#image").hover)(position={"x": x, "y": y})
        found = tab.evaluate("window.patchbank")
        assert found["token"] == 5 and (click or found["reading"] == token)
    assert tab.inner_text("#readout").startswith(f"{found['values'][6]:.2f} at row 1, column 2 ".replace("-", "\u2212"))
    x, y = at(tab, bank, key, 5)
    tab.locator("#image").click(position={"x": x, "y": y})  # once more lets go
    assert not tab.locator("#fixed").is_checked()
    x, y = at(tab, bank, key, 9)
    with redrawn(tab):
        tab.locator("#image").hover(position={"x": x, "y": y})
    assert tab.evaluate("window.patchbank.token") == 9


def test_the_search_filters(annotated: tuple[Bank, Dataset], page: tuple[Path, float], visit: Visit) -> None:
    tab = visit(page[0])
    buttons = tab.locator("#thumbnails li:visible")
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
    """A link opens an image, also after a reload."""
    write_report(annotated[0], tmp_path / "page.html", annotated[1])
    tab = visit(tmp_path / "page.html")
    tab.evaluate("location.hash = 'image-4'")
    until(tab, "document.activeElement.id === 'name'")
    assert tab.inner_text("#name") == tab.locator("#image-4 .name").inner_text()
    tab.locator("#thumbnails button").nth(2).click()
    assert tab.evaluate("location.hash") == "#image-2"
    tab.reload()
    until(tab, "window.patchbank && window.patchbank.values")
    assert tab.inner_text("#name") == tab.locator("#image-2 .name").inner_text()


def test_an_image_of_numbers_that_are_none_says_so(tmp_path: Path, visit: Visit) -> None:
    features = {f"{number:02}.jpg": random_tokens(number) for number in range(10)}
    made_bank(tmp_path / "bank", features)
    [shard] = (tmp_path / "bank").glob("shard-*")
    row = features["03.jpg"].numpy().tobytes()
    shard.write_bytes(shard.read_bytes().replace(row[:4], b"\xff\xff\xff\x7f"))
    write_report(open_bank(tmp_path / "bank"), tmp_path / "page.html")
    tab = visit(tmp_path / "page.html")
    assert "1 of 10 images has an invalid feature" in tab.inner_text("header")
    with redrawn(tab):
        tab.locator(".outliers a").click()
    assert tab.inner_text("#name") == "03.jpg"
    assert tab.inner_text("#readout") == "This image has no similarities."
    assert "not finite" in tab.inner_text("#notes") and tab.locator("#help").is_hidden()
    before = tab.evaluate("window.patchbank.token")
    tab.locator("#image").press("ArrowRight")
    tab.locator("#image").click()
    assert tab.evaluate("window.patchbank.token") == before


def test_a_link_to_what_stands_out_works_again_and_again(tmp_path: Path, visit: Visit) -> None:
    features = {f"{number:02}.jpg": random_tokens(number) for number in range(20)}
    features["99.jpg"] = random_tokens(30, scale=300)
    write_report(made_bank(tmp_path / "bank", features), tmp_path / "page.html")
    tab = visit(tmp_path / "page.html")
    for _ in range(2):
        tab.locator(".outliers a").click()
        assert tab.inner_text("#name") == "99.jpg"
        tab.locator("#thumbnails button").first.click()
        assert tab.inner_text("#name") == "00.jpg"
