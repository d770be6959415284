"""Make docs/images from a fresh demo: the README's top, a figure of `patchbank show`, and a page in Debian's Chromium.

python scripts/pictures.py        in an environment with ".[test]"; look at all before you commit them
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from tests.browser import headless_browser, until  # noqa: E402

from patchbank import ExtractConfig, extract, load_dataset, open_bank  # noqa: E402
from patchbank.datasets.example import _load_photographs  # noqa: E402
from patchbank.encoders import trained  # noqa: E402
from patchbank.show.gallery import Common  # noqa: E402

BANK = "patchbank-demo/hicodet_pkl_files/demo_img_hicodet_train"
KEY = "HICO_train2015_00000002.jpg"
IMAGES = REPOSITORY / "docs" / "images"
# Public-domain photographs, and the left border of the square that is shown, as a share of what is cut off.
PHOTOGRAPHS = {"astronaut": 0.5, "chelsea": 0.3, "coffee": 0.5, "rocket": 0.5, "motorcycle": 0.45, "camera": 0.5}
PATCHES, SIDE, GAP = 52, 260, 8  # a side of the hero's grids; pixels of its tiles, and between them


def patchbank(*arguments: str, directory: Path) -> None:
    subprocess.run([sys.executable, "-m", "patchbank", *arguments], cwd=directory, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _hero(directory)
        patchbank("demo", directory=directory)
        asked = ("--at", "520,262", "--box", "475,54,914,344", "-o", "show.png")
        patchbank("show", BANK, KEY, *asked, directory=directory)
        _shrunk(directory / "show.png", IMAGES / "show.jpg")
        with headless_browser() as browser:
            tab = browser.new_page(viewport={"width": 1280, "height": 1000}, reduced_motion="reduce")
            tab.goto((directory / f"{BANK}-report.html").as_uri())
            until(tab, "window.patchbank")
            for side, number in (("left", "3"), ("right", "6")):  # the astronaut and a cup, and she and a cat
                tab.locator(f"#{side} select").select_option(number)
            tab.wait_for_timeout(500)
            area = tab.locator("#left .photo").bounding_box()
            tab.mouse.click(area["x"] + 0.18 * area["width"], area["y"] + 0.24 * area["height"])  # her face
            until(tab, "window.patchbank.nearest")
            tab.wait_for_timeout(500)
            tab.screenshot(path=directory / "report.png")
        _shrunk(directory / "report.png", IMAGES / "report.jpg")


def _hero(directory: Path) -> None:
    """Photographs above their trained components, without a border: on light and dark pages alike."""
    (directory / "photographs").mkdir()
    photographs = _load_photographs()
    for number, (name, left) in enumerate(PHOTOGRAPHS.items()):
        image = photographs[name]
        side = min(image.size)
        x, y = int(left * (image.width - side)), (image.height - side) // 2
        image.convert("RGB").crop((x, y, x + side, y + side)).save(directory / f"photographs/{number}.png")
    config = ExtractConfig(
        model=trained.MODEL, weights=trained.obtain(), resize="squash", input_size=(14 * PATCHES, 14 * PATCHES)
    )
    extract(load_dataset("folder", directory / "photographs"), directory / "bank", config)
    bank = open_bank(directory / "bank")
    common = Common.of(bank, bank.manifest.main, list(bank))
    step = SIDE + GAP
    hero = Image.new("RGB", (step * len(bank) - GAP, 2 * SIDE + GAP), "#14171b")
    for number, key in enumerate(bank):
        colours = common.components.colours(bank[key].float().numpy()).reshape(*bank.manifest.grid, 3)
        components = Image.fromarray((255 * colours).round().astype(np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.NEAREST
        )
        with Image.open(directory / "photographs" / key) as image:
            hero.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (number * step, 0))
        hero.paste(components, (number * step, step))
    hero.save(IMAGES / "hero.jpg", quality=85, subsampling=0, optimize=True)


def _shrunk(source: Path, target: Path) -> None:
    """In at most 1,280 pixels across, as a JPEG without subsampled colours, so that the repository stays small."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
        picture.thumbnail((1280, 2000), Image.Resampling.LANCZOS)
        picture.save(target, quality=78, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
