"""Deploying a `serve_config.yaml` from this process: what `serve deploy` does over the dashboard, without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from t2ray.config.files import nearest
from t2ray.core import ConfigError, ResourceError

ANNOUNCE_S = 10.0


@contextmanager
def deployed(document: Mapping[str, Any], timeout_s: float, tell: Callable[[str], None]) -> Iterator[None]:
    """Yields when every application of the document runs, and ends Serve after the block.

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
    serve.start(proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump())
    try:
        # Ray's own `serve run` deploys a file this way; `serve.run` knows no options by deployment.
        _get_global_client().deploy_apps(schema)
        _wait(timeout_s, tell)
        yield
    finally:
        serve.shutdown()


def _known(schema: Any, keys: Mapping[str, Any], where: str) -> None:
    """Ray takes a misspelt option in silence."""
    for key in keys:
        if key not in schema.model_fields:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, schema.model_fields)}")


def _wait(timeout_s: float, tell: Callable[[str], None]) -> None:
    start = announced = time.monotonic()
    while True:
        applications = serve.status().applications
        states = {app.status for app in applications.values()}
        if applications and states == {ApplicationStatus.RUNNING}:
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
