"""Names of the classes in HICO-DET's and V-COCO's annotations, by their numbers from 0."""

from __future__ import annotations

# COCO numbers its 80 classes from 1 to 90, without these.
_NOT_IN_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_91_TO_80 = {number: index for index, number in enumerate(sorted(set(range(1, 91)) - _NOT_IN_COCO))}

# fmt: off
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)

# HICO-DET's verbs; its own lists name no classes. (Chao et al., "Learning to Detect Human-Object Interactions", WACV
# 2018; hico_list_vb.txt)
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

# V-COCO's actions.
ACTIONS = (
    "hold obj", "sit instr", "ride instr", "look obj", "hit instr", "hit obj", "eat obj", "eat instr", "jump instr",
    "lay instr", "talk_on_phone instr", "carry obj", "throw obj", "catch obj", "cut instr", "cut obj",
    "work_on_computer instr", "ski instr", "surf instr", "skateboard instr", "drink instr", "kick obj", "read obj",
    "snowboard instr",
)
# fmt: on
