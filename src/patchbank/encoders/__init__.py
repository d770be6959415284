"""CLIP's image tower: which models there are, where their weights are found, and pixels to patch tokens."""
