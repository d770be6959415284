"""Features made visible: one image as a figure, and a whole bank as a page."""
