"""The endpoint on Ray Serve."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`t2ray.cluster.serve:build_app` is what `serve_config.yaml` names; imported when asked for, since a replica's
    process loads this package for one deployment alone."""
    if name == "build_app":
        from t2ray.cluster.serve.app import build_app

        return build_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
