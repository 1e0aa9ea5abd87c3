"""Calls to other deployments: Ray's errors turned into t2ray's, and what a dead replica held asked again.

Not here: which deployment is asked what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from t2ray.core import Busy, GenerationError, ResourceError, T2RayError

T = TypeVar("T")

TRIES = 4
PAUSE_S = 0.25
"""Between two tries, and doubled each time: the router learns of a death within it."""


async def retried(call: Callable[[], Awaitable[T]]) -> T:
    """The call's result; made again, on whatever replica lives, when the one that had it died.

    Raises:
        T2RayError: what the deployment raised; `Busy` where its queue is full, `GenerationError` where replicas die
            again and again.
    """
    for attempt in range(TRIES):
        try:
            return await call()
        except RayActorError as error:
            if attempt == TRIES - 1:
                raise GenerationError("the replica that answered died, and so did those that tried again") from error
            await asyncio.sleep(PAUSE_S * 2**attempt)
        except Exception as error:  # noqa: BLE001 (Ray wraps what a replica raised)
            raise translated(error) from error
    raise AssertionError("unreachable")


def translated(error: Exception) -> Exception:
    """The error to tell a user, of what a call to a deployment raised; itself where it is a fault of ours."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, T2RayError):
        return error.cause
    if isinstance(error, BackPressureError):
        return Busy("the endpoint is at its limit; try again in a few seconds")
    if isinstance(error, DeploymentUnavailableError):
        return ResourceError("no replica can be started; look at `serve status`")
    if isinstance(error, RayActorError):
        return GenerationError("the replica that answered died before the end")
    return error
