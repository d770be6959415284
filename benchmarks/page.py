"""What does a bank's page cost? To write it, in bytes, and in the browser that opens it.

    python -m benchmarks.page [--keys 50000] [--samples 24,400] [--model ViT-B/16] [--layout shards] [--dtype float16]

A bank of many keys with human-object pairs; its features are those of a few photographs with untrained weights,
repeated. Of each page: the seconds to write it with every feature read, its bytes, and in headless Chromium the seconds
from its address to the first maps, the milliseconds in which a frame draws all maps in view as the pointer moves, and
the browser's memory after every image was opened. 50,000 features of ViT-B/16 take 10 GB of disk in float16. Prints a
table and ends in one JSON line.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tests.browser import NoBrowserError, headless_browser, until
from tests.support import TINY, write_json

from benchmarks.common import (
    batches,
    finish,
    hico_photographs,
    options_of,
    print_table,
    seconds_of,
    skipped,
    untrained,
)
from patchbank import Bank, Dataset, ExtractConfig, load_dataset, load_encoder, open_bank
from patchbank.bank.payload import Feature
from patchbank.bank.writer import BankWriter
from patchbank.encoders.openai.registry import MODELS, get_model
from patchbank.extraction.devices import Devices
from patchbank.extraction.plan import describe
from patchbank.show.page import write_report

_PHOTOGRAPHS = 32
_PAIRS = 4  # an image

# Moves the pointer over the image, patch after patch; the milliseconds in which each frame draws the maps in view.
_HOVER = """async () => {
    const shot = document.querySelector("#left .photo"), area = shot.getBoundingClientRect(), spent = [];
    for (let each = 0; each < 100; each++) {
        const place = [area.left + area.width * (0.3 + 0.004 * each), area.top + area.height * (0.3 + 0.004 * each)];
        const event = { clientX: place[0], clientY: place[1], pointerType: "mouse", bubbles: true };
        const before = window.patchbank;
        let began;
        requestAnimationFrame(() => (began = performance.now()));
        shot.dispatchEvent(new PointerEvent("pointermove", event));
        const ended = await new Promise((resolve) => requestAnimationFrame(() => resolve(performance.now())));
        if (window.patchbank !== before) spent.push(ended - began);
    }
    return spent;
}"""
_OPEN_ALL = """async () => {
    for (const button of document.querySelectorAll("#all button")) {
        const before = window.patchbank;
        button.click();
        while (window.patchbank === before) await new Promise((resolve) => setTimeout(resolve));
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    }
    return performance.memory.usedJSHeapSize;
}"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(
        __doc__,
        arguments,
        keys=50_000,
        samples=[24, 400],
        model="ViT-B/16",
        layout="shards",
        dtype="float16",
        directory=Path,
    )
    MODELS[TINY.name] = TINY
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        bank, dataset = _make(Path(directory), options)
        pages = [_page(bank, dataset, Path(directory) / f"{sample}.html", sample) for sample in options.samples]
        try:
            with headless_browser("--enable-precise-memory-info") as browser:
                for page in pages:
                    page |= _opened(browser, page["path"])
        except NoBrowserError as error:
            skipped("the browser", error)
    print_table(
        ["images", "written, s", "MB", "largest error", "first map, s", "next maps, ms", "at most", "all opened, MB"],
        [
            [
                page["images"],
                page["seconds"],
                page["bytes"] / 1e6,
                page["error"],
                page.get("first_map_seconds", 0.0),
                page.get("next_map_milliseconds", 0.0),
                page.get("longest_frame_milliseconds", 0.0),
                page.get("heap_bytes", 0) / 1e6,
            ]
            for page in pages
        ],
    )
    finish(
        "page",
        "playwright",
        model=options.model,
        layout=options.layout,
        dtype=options.dtype,
        keys=options.keys,
        features_per_second=options.keys / pages[0]["seconds"],
        pages=[{name: value for name, value in page.items() if name != "path"} for page in pages],
    )


def _make(place: Path, options: Any) -> tuple[Bank, Dataset]:
    """The bank, and its images with their annotations."""
    model = get_model(options.model)
    paths = hico_photographs(place / "pictures", _PHOTOGRAPHS)
    config = ExtractConfig(
        model=model.name, weights=untrained(model, place), layout=options.layout, dtype=options.dtype
    )
    runner = load_encoder(model.name, weights=config.weights, device="cpu")
    features, sizes = [], []
    for path in paths:
        with Image.open(path) as image:
            features.append({name: value[0] for name, value in runner.encode([image]).items()})
            sizes.append(image.size)
    # A few hundred names a directory, each a link to the same one.
    names = [f"{number // _PHOTOGRAPHS:05}/{paths[number % _PHOTOGRAPHS].name}" for number in range(options.keys)]
    (place / "images").mkdir()
    for name in names[::_PHOTOGRAPHS]:
        (place / "images" / name).parent.symlink_to(place / "pictures")
    write_json(place / "list.json", [_listed(name, *sizes[number % _PHOTOGRAPHS]) for number, name in enumerate(names)])
    dataset = load_dataset("hicodet", place, "test", images=place / "images", annotations=place / "list.json")
    manifest = describe(dataset, options.layout, config, Devices(("cpu",)), runner.spec)
    with BankWriter(place / "bank", manifest, names) as writer:
        for batch in batches(list(enumerate(names)), 512):
            places = [(name, number % _PHOTOGRAPHS) for number, name in batch]
            writer.add([Feature(name, features[each], sizes[each]) for name, each in places], [])
    return open_bank(place / "bank"), dataset


def _listed(name: str, width: int, height: int) -> dict[str, Any]:
    """HICO-DET's entry of an image, with some pairs."""
    boxes = [
        {"bbox": [5 * each, 3 * each, width - 9 * each, height - 7 * each], "category_id": 1 if each % 2 == 0 else 2}
        for each in range(2 * _PAIRS)
    ]
    pairs = [{"subject_id": 2 * each, "object_id": 2 * each + 1, "category_id": 77} for each in range(_PAIRS)]
    return {"file_name": name, "annotations": boxes, "hoi_annotation": pairs}


def _page(bank: Bank, dataset: Dataset, path: Path, sample: int) -> dict[str, Any]:
    began = time.perf_counter()
    written = write_report(bank, path, dataset, sample=sample)
    seconds = time.perf_counter() - began
    return {"path": path, "images": written.images, "seconds": seconds, "bytes": written.bytes, "error": written.error}


def _opened(browser: Any, path: Path) -> dict[str, float]:
    """Seconds and memory of a page in a browser."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)

    def first() -> None:
        tab.goto(path.as_uri(), wait_until="commit")
        until(tab, "window.patchbank")

    seconds = seconds_of(first)
    spent = tab.evaluate(_HOVER)
    found = {"first_map_seconds": seconds, "next_map_milliseconds": sum(spent) / len(spent)}
    found["longest_frame_milliseconds"] = max(spent)
    found["heap_bytes"] = tab.evaluate(_OPEN_ALL)
    tab.close()
    return found


if __name__ == "__main__":
    main()
