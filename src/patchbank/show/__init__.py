"""Features that one can see: one image's as a figure, and what a page of many shows."""
