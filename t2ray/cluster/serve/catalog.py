"""A `Watch` keeps a `Generator`'s catalog at hand, a second old at most, for those that hold no model."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from t2ray.api.backend import Catalog
from t2ray.cluster.serve.handles import retried
from t2ray.core import T2RayError


class Watch:
    """`catalog` is what some replica saw last; `refresh` asks again at once."""

    catalog: Catalog

    def __init__(self, generator: Any, poll_s: float) -> None:
        self._generator, self._poll_s = generator, poll_s
        self._seen = ""
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Asks for the first time, and goes on asking in the background."""
        await self.refresh()
        self._following = asyncio.create_task(self._follow())

    async def refresh(self) -> None:
        """Asks now; raises as `replies.retried` does."""
        self._seen, catalog = await retried(lambda: self._generator.catalog.remote(self._seen))
        if catalog is not None:
            self.catalog = catalog

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            with suppress(T2RayError):  # no replica just now: what was seen last stands
                await self.refresh()
