"""COCO's 80 object classes, which HICO-DET's and V-COCO's annotations share."""

from __future__ import annotations

# COCO numbers its 80 classes from 1 to 90, without these.
_NOT_IN_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_91_TO_80 = {number: index for index, number in enumerate(sorted(set(range(1, 91)) - _NOT_IN_COCO))}

# By their numbers, from 0.
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
# fmt: on
