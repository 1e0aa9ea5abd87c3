"""The `Monitor`: one process that knows the load of all `Generator` replicas, because each tells it once a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

from t2ray.api.backend import EndpointLoad

LOST_S = 4.0
"""A replica that has not told for so long is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """One replica's load, and its counts since it started."""

    running: int
    waiting: int
    tokens_per_s: float
    kv_used: float
    requests: int
    aborted: int
    failed: int
    folds: int


class Monitor:
    """Deployed once, without a share of a processor. Restarted, it knows all again after a second."""

    def __init__(self) -> None:
        self._pulses: dict[str, tuple[float, Pulse]] = {}

    def beat(self, replica: str, pulse: Pulse) -> None:
        """What a replica tells."""
        self._pulses[replica] = (time.monotonic(), pulse)

    def pulses(self) -> dict[str, Pulse]:
        """The last of each replica that lives."""
        now = time.monotonic()
        self._pulses = {name: pair for name, pair in self._pulses.items() if now - pair[0] < LOST_S}
        return {name: pulse for name, (_, pulse) in self._pulses.items()}

    def load(self) -> EndpointLoad:
        """All replicas together."""
        pulses = list(self.pulses().values())
        return EndpointLoad(
            replicas=len(pulses),
            running=sum(pulse.running for pulse in pulses),
            waiting=sum(pulse.waiting for pulse in pulses),
            tokens_per_s=sum(pulse.tokens_per_s for pulse in pulses),
            requests=sum(pulse.requests for pulse in pulses),
            aborted=sum(pulse.aborted for pulse in pulses),
            kv_used=max((pulse.kv_used for pulse in pulses), default=0.0),
        )
