"""Sweeps over a job's settings: the space and its points (`space`), what came out (`results`), pictures (`pictures`).

No ray and no torch: `cluster.tune` runs the trials.
"""
