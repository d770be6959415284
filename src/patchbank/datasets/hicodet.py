"""HICO-DET as an EZ-HOI checkout lays it out."""

from __future__ import annotations

from pathlib import Path

from patchbank.datasets.annotations import read_file_names
from patchbank.datasets.samples import Dataset, make_records
from patchbank.errors import DatasetError

SPLITS = ("train", "test")

IMAGES = {split: f"hicodet/hico_20160224_det/images/{split}2015" for split in SPLITS}
# The first that is there: the lists the original script reads, else the files of UPT's `hicodet` repository.
ANNOTATIONS = {
    "train": ("hicodet/trainval_hico.json", "hicodet/instances_train2015.json"),
    "test": ("hicodet/test_hico.json", "hicodet/instances_test2015.json"),
}

# The 117 verbs by their numbers, from 0. HICO-DET's own lists name no classes. (Chao et al., "Learning to Detect
# Human-Object Interactions", WACV 2018; hico_list_vb.txt)
# fmt: off
VERBS = (
    "adjust", "assemble", "block", "blow", "board", "break", "brush_with", "buy", "carry", "catch", "chase",
    "check", "clean", "control", "cook", "cut", "cut_with", "direct", "drag", "dribble", "drink_with", "drive",
    "dry", "eat", "eat_at", "exit", "feed", "fill", "flip", "flush", "fly", "greet", "grind", "groom", "herd",
    "hit", "hold", "hop_on", "hose", "hug", "hunt", "inspect", "install", "jump", "kick", "kiss", "lasso", "launch",
    "lick", "lie_on", "lift", "light", "load", "lose", "make", "milk", "move", "no_interaction", "open", "operate",
    "pack", "paint", "park", "pay", "peel", "pet", "pick", "pick_up", "point", "pour", "pull", "push", "race",
    "read", "release", "repair", "ride", "row", "run", "sail", "scratch", "serve", "set", "shear", "sign", "sip",
    "sit_at", "sit_on", "slide", "smell", "spin", "squeeze", "stab", "stand_on", "stand_under", "stick", "stir",
    "stop_at", "straddle", "swing", "tag", "talk_on", "teach", "text_on", "throw", "tie", "toast", "train", "turn",
    "type_on", "walk", "wash", "watch", "wave", "wear", "wield", "zip",
)
# fmt: on


def find_annotations(root: Path, split: str) -> Path:
    """The split's annotation file. Raises DatasetError where there is none."""
    places = [root / place for place in ANNOTATIONS[split]]
    if found := next((place for place in places if place.exists()), None):
        return found
    raise DatasetError(
        f"There is no annotation file of HICO-DET's {split} split: neither {places[0]} nor {places[1]}. "
        "Is --root an EZ-HOI checkout? Else name the file with --annotations."
    )


def load(root: Path, split: str, images: Path | None, annotations: Path | None) -> Dataset:
    """One split of HICO-DET. Raises DatasetError where its parts are missing or malformed."""
    annotations = annotations or find_annotations(root, split)
    names = read_file_names(annotations)
    directory = images or root / IMAGES[split]
    return Dataset("hicodet", split, directory, make_records(names, directory, annotations), annotations, root)
