"""HICO-DET in an EZ-HOI checkout, and its verbs."""

from __future__ import annotations

IMAGES = {split: f"hicodet/hico_20160224_det/images/{split}2015" for split in ("train", "test")}
# The first one that exists counts: the original script's lists, else the files of UPT's `hicodet` repository.
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
