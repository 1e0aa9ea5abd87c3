"""Calls to other deployments: Ray's errors turned into t2ray's, and what a dead replica held asked again.

Serve logs whatever a deployment raises with its traceback. So a deployment returns a `T2RayError` instead, which says
all there is to say (`told`), and it is raised where the call was made (`asked`). Not here: which deployment is asked
what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from t2ray.core import Busy, GenerationError, ResourceError, T2RayError

T = TypeVar("T")
P = ParamSpec("P")

TRIES = 4
PAUSE_S = 0.25
"""Between two tries, and doubled each time: the router learns of a death within it."""


def told(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T | T2RayError]]:
    """A deployment's method that returns a `T2RayError` rather than raise it."""

    @wraps(method)
    async def telling(*args: P.args, **kwargs: P.kwargs) -> T | T2RayError:
        try:
            return await method(*args, **kwargs)
        except T2RayError as error:
            return error

    return telling


def raised(value: T | T2RayError) -> T:
    """What a deployment returned; raised where it is an error."""
    if isinstance(value, T2RayError):
        raise value
    return value


async def asked(method: Any, *args: object) -> Any:
    """The reply of a deployment's method; asked again, of whatever replica lives, when the one that had it died.

    The call is cancelled there too when the caller goes.

    Raises:
        T2RayError: what the deployment raised; `Busy` where its queue is full, `GenerationError` where replicas die
            again and again.
    """
    for attempt in range(TRIES):
        reply = method.remote(*args)
        try:
            value = await reply
        except asyncio.CancelledError:
            reply.cancel()
            raise
        except RayActorError as error:
            if attempt == TRIES - 1:
                raise GenerationError("the replica that answered died, and so did those that tried again") from error
            await asyncio.sleep(PAUSE_S * 2**attempt)
        except Exception as error:
            raise translated(error) from error
        else:
            return raised(value)
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
