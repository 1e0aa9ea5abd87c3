"""Looking again and again, for ever: what is followed may fail, the one who follows it goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from t2ray.core import GenerationError

LOG = logging.getLogger("ray.serve")

LOST_S = 60.0
"""After so long without a look a health check fails; a look that raises is one."""


class Looking:
    """Repeats a look in the background, whatever it raises. `what` names it in the log and to the health check."""

    def __init__(self, what: str, period_s: float) -> None:
        self._what, self._period_s = what, period_s
        self._looked, self._complaint = time.monotonic(), ""
        self._task: asyncio.Task[None] | None = None

    def start(self, look: Callable[[], Awaitable[object]]) -> None:
        """Looks for the first time after a period."""
        self._looked = time.monotonic()
        self._task = asyncio.create_task(self._forever(look))

    def check(self) -> None:
        """Raises where there has been no look for a minute: the task has ended, or a look hangs."""
        if self._task is not None and time.monotonic() - self._looked > LOST_S + self._period_s:
            raise GenerationError(f"{self._what}: no look for {time.monotonic() - self._looked:.0f} s")

    async def _forever(self, look: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await look()
            except Exception as error:  # noqa: BLE001 (the next look may succeed, and nobody else would look)
                self.complain(f"{type(error).__name__}: {error}")
            else:
                self.complain("")
            self._looked = time.monotonic()

    def complain(self, text: str) -> None:
        """Writes into the log why a look fails, once as long as it fails for the same reason."""
        if text != self._complaint:
            LOG.warning("%s: %s", self._what, " ".join(text.split()) or "all is well again")
            self._complaint = text
