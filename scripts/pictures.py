"""Make docs/images from a fresh demo: a figure of `patchbank show`, and a page in Debian's Chromium.

python scripts/pictures.py        in an environment with ".[test]"; look at both before you commit them
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from PIL import Image  # noqa: E402
from tests.browser import headless_browser, until  # noqa: E402

BANK = "patchbank-demo/hicodet_pkl_files/demo_img_hicodet_train"
KEY = "HICO_train2015_00000002.jpg"
IMAGES = REPOSITORY / "docs" / "images"


def patchbank(*arguments: str, directory: str) -> None:
    subprocess.run([sys.executable, "-m", "patchbank", *arguments], cwd=directory, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        patchbank("demo", directory=directory)
        asked = ("--at", "520,262", "--box", "475,54,914,344", "-o", "show.png")
        patchbank("show", BANK, KEY, *asked, directory=directory)
        _shrunk(Path(directory) / "show.png", IMAGES / "show.jpg")
        with headless_browser() as browser:
            tab = browser.new_page(viewport={"width": 1120, "height": 1000}, reduced_motion="reduce")
            tab.goto((Path(directory) / f"{BANK}-report.html").as_uri())
            until(tab, "window.patchbank && window.patchbank.values")
            tab.locator("#thumbnails button").first.click()
            area = tab.locator("#image").bounding_box()
            tab.locator("#image").click(position={"x": 0.5 * area["width"], "y": 0.3 * area["height"]})
            until(tab, "window.patchbank.nearest")
            tab.evaluate("document.getElementById('gallery').scrollIntoView()")
            tab.wait_for_timeout(500)
            tab.screenshot(path=Path(directory) / "report.png")
        _shrunk(Path(directory) / "report.png", IMAGES / "report.jpg")


def _shrunk(source: Path, target: Path) -> None:
    """In at most 1,120 pixels across, as a JPEG without subsampled colours, so that the repository stays small."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
        picture.thumbnail((1120, 2000), Image.Resampling.LANCZOS)
        picture.save(target, quality=88, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
