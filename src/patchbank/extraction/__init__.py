"""Extraction: a plan, and the engines that carry it out: this process, a process per device, or a Ray cluster.

This process encodes all samples in one stream. The other engines split the work into units (`work`); each of their
workers (`work.Worker`) loads the model once and reads, encodes and commits units in turn. Samples travel to the
workers, never pixels or features. Commits are idempotent: if a worker dies, its unit is done again.
"""
