"""Sweeps over a job's settings: the space and its points (`space`), trials and winner (`results`), `pictures`.

Not here: running the trials (`cluster.train.tune`).
"""
