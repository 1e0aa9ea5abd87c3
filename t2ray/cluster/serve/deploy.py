"""Deploying a `serve_config.yaml` from this process: what `serve deploy` does over the dashboard, without one.

And what comes before and after: waiting for the registry, seeing that Ray has died, letting running answers end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import (
    ApplicationStatus,
    DeploymentSchema,
    ProxyStatus,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from t2ray.cluster.alive import Lifeline
from t2ray.config.files import nearest
from t2ray.core import ConfigError, ResourceError
from t2ray.store import Store

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "t2ray.cluster.serve.proxy:middlewares"}
"""Has Ray Serve's HTTP proxies call `cluster.serve.proxy`."""

ANNOUNCE_S = 10.0
LOOK_S = 1.0
PAUSE_S, QUIET = 0.25, 4
"""After so many looks without a request, the last pieces of the last answers have passed the proxy."""
REPLY_S = 5.0
CUT_S = 3.0
"""For the errors with which answers end at the limit."""


@contextmanager
def deployed(document: Mapping[str, Any], timeout_s: float, tell: Callable[[str], None]) -> Iterator[Lifeline]:
    """Yields when every application of the document runs, and ends Serve after the block, where Ray still lives.

    Raises:
        ConfigError: a document that Ray Serve refuses.
        ResourceError: an application that cannot start, or does not within `timeout_s`.
    """
    _known(ServeDeploySchema, document, "the configuration")
    for application in document["applications"]:
        _known(ServeApplicationSchema, application, "applications")
        for deployment in application.get("deployments") or ():
            _known(DeploymentSchema, deployment, f"deployment {deployment.get('name')}")
    try:
        schema = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise ConfigError(f"the configuration of Ray Serve is wrong at {where}: {detail['msg']}") from None
    lifeline = Lifeline()
    try:
        _start(schema, timeout_s)
        # Ray's own `serve run` deploys a file this way; `serve.run` knows no options by deployment.
        _get_global_client().deploy_apps(schema)
        _wait(timeout_s, tell)
        yield lifeline
    finally:
        if not lifeline.frays():
            serve.shutdown()


def wait_for_registry(uri: str, tell: Callable[[str], None]) -> None:
    """Returns when the registry can be listed, and tells why it cannot until then: replicas would wait in silence."""
    announced = -ANNOUNCE_S
    while True:
        try:
            Store(uri).tree()
            return
        except (ConfigError, ResourceError) as error:
            if time.monotonic() - announced >= ANNOUNCE_S:
                tell(f"waiting for the registry of experts: {error}; if it is a new one, make its folder")
                announced = time.monotonic()
        time.sleep(LOOK_S)


def stay(lifeline: Lifeline) -> None:
    """Returns never.

    Raises:
        KeyboardInterrupt: the user's signal.
        ResourceError: Ray has died, and what of it.
    """
    while (lost := lifeline.lost()) is None:
        time.sleep(LOOK_S)
    raise ResourceError(f"{lost}, and the endpoint with it; start it again")


def drain(application: str, limit_s: float) -> bool:
    """Closes the endpoint to new requests and waits until the running ones have been answered.

    Returns whether all were: those that run after `limit_s` end with an error.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the handle tells of itself
    ingress = serve.get_app_handle(application)
    start, quiet, cut = time.monotonic(), 0, False
    while quiet < QUIET and time.monotonic() - start < limit_s + CUT_S:
        cut = time.monotonic() - start >= limit_s
        try:
            inside = any(ingress.broadcast("close", cut).results(timeout_s=REPLY_S))
        except (RayError, RayServeException, TimeoutError):  # a replica that is busy or just being replaced
            inside = True
        quiet = 0 if inside else quiet + 1
        time.sleep(PAUSE_S)
    return not cut


def _known(schema: Any, keys: Mapping[str, Any], where: str) -> None:
    """Ray takes a misspelt option in silence."""
    for key in keys:
        if key not in schema.model_fields:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, schema.model_fields)}")


def _start(schema: ServeDeploySchema, timeout_s: float) -> None:
    """Starts Serve. On a slow machine Ray kills an HTTP proxy that is not ready in time, and starts another."""
    start = time.monotonic()
    while True:
        try:
            serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
            return
        except (TimeoutError, ActorDiedError) as error:
            if time.monotonic() - start > timeout_s:
                raise ResourceError(f"Ray Serve did not start within {timeout_s:g} s: {error}") from None


def _wait(timeout_s: float, tell: Callable[[str], None]) -> None:
    start = announced = time.monotonic()
    while True:
        status = serve.status()
        applications = status.applications
        states = {app.status for app in applications.values()}
        reachable = set(status.proxies.values()) == {ProxyStatus.HEALTHY}
        if applications and states == {ApplicationStatus.RUNNING} and reachable:
            return
        now = time.monotonic()
        failed = [app.message for app in applications.values() if app.status == ApplicationStatus.DEPLOY_FAILED]
        if failed or now - start > timeout_s:
            waiting = "; ".join(
                f"{name}: {deployment.message}"
                for app in applications.values()
                for name, deployment in app.deployments.items()
                if deployment.message
            )
            raise ResourceError(f"the endpoint did not start: {' '.join((failed or [waiting])[0].split())[-600:]}")
        if now - announced > ANNOUNCE_S:
            tell(f"starting, {now - start:.0f} s: {', '.join(f'{n} {a.status}' for n, a in applications.items())}")
            announced = now
        time.sleep(0.2)
