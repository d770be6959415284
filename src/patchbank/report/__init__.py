"""A bank as one page: what it is, whether it is sound, and a gallery whose features can be looked at in a browser."""
