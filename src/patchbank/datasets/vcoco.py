"""V-COCO in an EZ-HOI checkout. Its ``val`` is V-COCO's test list, on the images of COCO's val2014."""

from __future__ import annotations

IMAGES = {split: f"vcoco/mscoco2014/{split}2014" for split in ("train", "val")}
ANNOTATIONS = {"train": ("vcoco/instances_vcoco_trainval.json",), "val": ("vcoco/instances_vcoco_test.json",)}
