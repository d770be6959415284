"""Find the human-object pairs nearest to one, by the features of their unions, and draw them on a sheet.

    python examples/find_pairs.py BANK [IMAGE] [--pair 0] [--root patchbank-demo] [--count 5] [--out pairs.png]

BANK holds crops of annotated pairs. `patchbank demo` prepares their images; with the weights that it fetched,

    patchbank extract pairs hicodet --split test --root patchbank-demo --model timm/vit_small_patch14_dinov2 --out pairs

makes one. Without IMAGE, the first one of the bank. The mean of all features is subtracted, since what all pairs share
says nothing: with few pairs, most cosines are negative. Needs `pip install -e ".[show]"`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize

import patchbank

try:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise SystemExit('error: this example needs matplotlib: pip install "patchbank[show]"') from error

HUMAN, OBJECT = "#2a78d6", "#e8590c"


def draw(axes: Any, path: Path, target: patchbank.HOITarget, pair: int, title: str) -> None:
    """One pair's part of its image, with its boxes; the sheet shows a square around both."""
    boxes = torch.stack([target.boxes_h[pair], target.boxes_o[pair]])
    (x1, y1), (x2, y2) = boxes[:, :2].amin(0).tolist(), boxes[:, 2:].amax(0).tolist()
    half = 0.55 * max(x2 - x1, y2 - y1)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    with Image.open(path) as image:
        axes.imshow(image.convert("RGB"))
    for box, colour in zip(boxes.tolist(), (HUMAN, OBJECT), strict=True):
        axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, edgecolor=colour, linewidth=2))
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xticks=[], yticks=[], facecolor="black")
    axes.set_title(title, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("image", nargs="?")
    parser.add_argument("--pair", type=int, default=0, help="number of the pair in its image")
    parser.add_argument("--root", type=Path, default=Path("patchbank-demo"))
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("pairs.png"))
    options = parser.parse_intermixed_args()

    regions = patchbank.open_regions(options.bank)
    manifest = regions.bank.manifest
    if manifest.dataset not in ("hicodet", "vcoco"):
        raise SystemExit(f"error: {options.bank} holds no annotated pairs: `patchbank extract pairs` makes such a bank")
    dataset = patchbank.load_dataset(manifest.dataset, options.root, manifest.split)
    pairs = [(key, number) for key in regions for number in range(len(dataset.target(key)))]
    wanted = (options.image or pairs[0][0], options.pair)
    if wanted not in pairs:
        known = ", ".join(f"{number} of {key}" for key, number in pairs[:3])
        raise SystemExit(f"error: {options.bank} has no pair {wanted[1]} of {wanted[0]}, but for example {known}")
    features = torch.cat([regions[key].pairs().union.float() for key in regions])
    features = normalize(features - features.nanmean(0), dim=1)  # what all pairs share says nothing
    similarity = features @ features[pairs.index(wanted)]

    order = similarity.nan_to_num(-2).argsort(descending=True)[: options.count + 1].tolist()
    figure = Figure(figsize=(2.4 * len(order), 2.9), layout="constrained")
    for place, index in enumerate(order):
        key, number = pairs[index]
        target, classes = dataset.target(key), dataset.classes
        name = f"{classes.verbs[target.verb[number]]} {classes.objects[target.object[number]]}".replace("_", " ")
        print(f"  {similarity[index]:+.3f}  {key}, pair {number}: {name}")
        title = f"{name}\n{'this one' if not place else f'cosine {similarity[index]:.2f}'}"
        draw(figure.add_subplot(1, len(order), 1 + place), dataset.images / key, target, number, title)
    figure.savefig(options.out, dpi=150)
    print(f"drawn in {options.out}: humans blue, objects orange")


if __name__ == "__main__":
    try:
        main()
    except patchbank.PatchbankError as error:
        raise SystemExit(f"error: {error}") from error
