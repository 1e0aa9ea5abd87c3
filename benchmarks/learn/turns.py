"""What the process of a side says to the benchmark, line by line as JSON, and how its time is counted.

A line that comes in asks for a step, or, as a list, for the KL on rollouts, after which the process ends. Standard
library only.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

Rows = list[tuple[list[int], list[int]]]
"""Rollouts: the ids of a prompt, and those of its answer."""

STEP = "step"


class Turns:
    """The line to the benchmark. Whatever else the process prints goes to its error output."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def asked(self) -> Any:
        """Waits for what is asked next: STEP, or a list of rollouts; None where the benchmark has ended."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def reply(self, **figures: Any) -> None:
        """Sends figures, with the most memory that this process has had, in GiB (Linux counts in KiB)."""
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**figures, "peak_gib": peak_gib}), file=self._out, flush=True)


class Clock:
    """Seconds, by the clock on the wall and by the processor, between `start` and `stop`, summed until `take`."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def start(self) -> None:
        """Counts from here on."""
        self.wall -= time.perf_counter()
        self.processor -= time.process_time()

    def stop(self) -> None:
        """Counts no further."""
        self.wall += time.perf_counter()
        self.processor += time.process_time()

    def take(self) -> dict[str, float]:
        """Stops, returns the sums, and begins again at 0."""
        self.stop()
        taken = {"wall_s": self.wall, "seconds": self.processor}
        self.wall = self.processor = 0.0
        return taken
