"""Generate and score with a mixture a row."""

from t2ray.engine.engine import Engine

__all__ = ["Engine"]
