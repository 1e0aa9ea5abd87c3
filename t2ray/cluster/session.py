"""Attaching to a Ray cluster, or starting a private one on this machine, and saying in time when a job does not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from t2ray.core import ResourceError


@contextmanager
def session(num_cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Yields a cluster's resources: the connected one's, `RAY_ADDRESS`'s, or a local one's that ends with the block."""
    if ray.is_initialized():
        yield dict(ray.cluster_resources())
        return
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": num_cpus, "include_dashboard": False}
    # "local": without an address Ray would join whatever cluster was started on this machine last.
    ray.init(address=address or "local", log_to_driver=False, logging_level="error", **local)
    try:
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()


def slots(need: Mapping[str, float], have: Mapping[str, float], what: str) -> int:
    """How many times `need` fits into a cluster that has `have`.

    Raises:
        ResourceError: not once: "needs X, the cluster has Y".
    """
    lacking = {key: amount for key, amount in need.items() if amount > have.get(key, 0.0)}
    if lacking:
        needs = ", ".join(f"{amount:g} {key}" for key, amount in lacking.items())
        has = ", ".join(f"{have.get(key, 0.0):g} {key}" for key in lacking)
        raise ResourceError(f"{what} needs {needs}, the cluster has {has}; lower workers, cpus or gpus, or add nodes")
    return int(min(have[key] // amount for key, amount in need.items() if amount > 0))
