"""Whether the Ray that this process is connected to still lives. Ray itself may wait for a dead one for ever."""

from __future__ import annotations

import socket
import time

import ray

KNOCK_S = 2.0
LOST_S = 5.0
"""A head that is started anew, as one that keeps its state elsewhere can be, comes back within it."""


class Lifeline:
    """What a driver cannot live without: the cluster's head, and the raylet of its own machine."""

    def __init__(self) -> None:
        own = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == own)
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._places = {
            "the head of the Ray cluster (its GCS)": (host, int(port)),
            "the raylet of this machine": (node["NodeManagerAddress"], int(node["NodeManagerPort"])),
        }
        self._missed: dict[str, float] = {}

    def lost(self) -> str | None:
        """What has not answered for `LOST_S`, in words; None if all answers, or did until just now."""
        now = time.monotonic()
        for what, place in self._places.items():
            if listens(*place):
                self._missed.pop(what, None)
            elif now - self._missed.setdefault(what, now) > LOST_S:
                return f"{what} at {place[0]}:{place[1]} has died"
        return None

    def frays(self) -> bool:
        """Whether anything does not answer just now."""
        return not all(listens(*place) for place in self._places.values())


def listens(host: str, port: int) -> bool:
    """Whether somebody takes a connection there."""
    try:
        socket.create_connection((host.strip("[]"), port), KNOCK_S).close()
    except OSError:
        return False
    return True
