"""Traces of requests for OpenTelemetry, which Ray Serve makes: from the proxy through the ingress to the replicas.

Ray calls `processors` in each of Serve's processes where `TRACED` stands in its environment: `t2ray serve` sees to
that on a private Ray where `OTEL_EXPORTER_OTLP_ENDPOINT` names a collector, on a cluster whoever starts its nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from t2ray.core import ConfigError

TRACED = {
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "t2ray.cluster.serve.traces:processors",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",  # all, unless the request's `traceparent` says otherwise
}
"""Has Ray Serve trace requests, and send the traces where OpenTelemetry's own variables say."""

COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def processors() -> list[Any]:
    """Returns what sends spans, in batches, by OTLP over HTTP."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def traced(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what of `TRACED` must be added to an environment: nothing if it names no collector.

    Raises:
        ConfigError: it names one, and the extra is not installed.
    """
    named = [name for name in COLLECTORS if environment.get(name)]
    if not named:
        return {}
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # not even what is around it
        found = None
    if found is None:
        raise ConfigError(
            f"{named[0]} names a collector of traces, and what sends them is not installed here; "
            "pip install 't2ray[traces]', or unset it"
        )
    return {name: value for name, value in TRACED.items() if name not in environment}
