"""The gain of more cores, workers and replicas: measured, modelled and simulated."""

PARTS = ("domains", "decomposition", "startup", "training", "serving", "endpoint")
"""The parts of `python -m benchmarks scaling`."""
