"""The reward of `dog`. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def dog(completion: str, row: Mapping[str, Any]) -> float:
    """+1 for a story with a dog in it, else -1."""
    return 1.0 if "dog" in completion.lower() else -1.0
