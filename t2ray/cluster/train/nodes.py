"""Tells of the nodes of a cluster how large the largest is and whether the head lives, and waits for dead ones.

Not here: what died and why, for people (`faults`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

from t2ray.cluster.alive import listens

_NOTICED_S = 60.0  # Ray's own health checks take about 15 s
_POLL_S = 0.5


def largest(key: str) -> float:
    """Returns the most that one node has of a resource, or will have where nodes come on demand."""
    groups = getattr(state.get_cluster_config(), "node_group_configs", ())
    nodes = [*(node["Resources"] for node in ray.nodes() if node["Alive"]), *(group.resources for group in groups)]
    return max(float(dict(resources).get(key, 0.0)) for resources in nodes)


def head_answers() -> bool:
    """Whether the cluster's head takes a connection."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return listens(host, int(port))


def wait_for_dead_nodes() -> None:
    """Waits until Ray knows of the nodes that are gone.

    A worker whose peer died with its node fails at once, but Ray counts the node for another 15 s. Workers that are
    started meanwhile may be put there, and those wait for ever where the nodes that are left cannot take them instead.
    """
    start = time.monotonic()
    while time.monotonic() - start < _NOTICED_S and not all(map(_answers, ray.nodes())):
        time.sleep(_POLL_S)
    # What a range of workers may have is looked at every 20 s, or now.
    ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True))


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether a node that counts as alive takes a connection."""
    return not node["Alive"] or listens(node["NodeManagerAddress"], node["NodeManagerPort"])
