"""A `Watch` keeps a `Generator`'s catalog at hand, a second old at most, for those that hold no model."""

from __future__ import annotations

import asyncio
from typing import Any

from t2ray.api.backend import Catalog
from t2ray.cluster.serve.handles import asked
from t2ray.cluster.serve.looking import Looking
from t2ray.core import ResourceError, T2RayError

LOOK_S = 10.0
"""Without a replica, as while the only one is started again, a look would wait for one."""


class Watch:
    """`catalog` is what some replica saw last; `refresh` asks again at once."""

    catalog: Catalog

    def __init__(self, generator: Any, poll_s: float) -> None:
        self._generator, self._poll_s = generator, poll_s
        self._seen = ""
        self.looking = Looking("the catalog of experts", poll_s)

    async def start(self) -> None:
        """Waits for the first answer, and goes on asking in the background. What was seen last stands meanwhile."""
        while not self._seen:
            try:
                await self.refresh()
            except T2RayError as error:
                self.looking.complain(str(error))
                await asyncio.sleep(self._poll_s)
        self.looking.start(self.refresh)

    async def refresh(self) -> None:
        """Asks now.

        Raises:
            ResourceError: no replica answered in time.
            T2RayError: as `handles.asked`.
        """
        try:
            async with asyncio.timeout(LOOK_S):
                self._seen, catalog = await asked(self._generator.catalog, self._seen)
        except TimeoutError:
            raise ResourceError(f"no replica told its experts within {LOOK_S:g} s; ask again later") from None
        if catalog is not None:
            self.catalog = catalog
