"""Who does a plan's work: this process, several processes of this machine, or a Ray cluster.

`local` does all of it in one stream. The others cut it into units (`work`), and give each to a worker that has loaded
the model once (`local.Worker`). Keys travel to the workers, and never pixels or features: a worker reads, encodes and
commits its unit's images itself. Commits are idempotent, so a unit whose worker died is simply done again.
"""
