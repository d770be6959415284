"""Measuring this machine: how fast it can be, and so how far patchbank is from that."""
