"""What some tests need beside the package, and where to get it: the reasons of skips, each beginning with "needs".

The suite's last lines count them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = "needs chromium (apt-get install chromium)"
CURL = "needs curl (apt-get install curl)"
CUDA = "needs a CUDA device (a machine with an NVIDIA GPU and a torch for it)"
REAL = "needs real models and data sets in ../shared (CONTRIBUTING.md, Tests, lists them)"
ROOT = "needs root (a mount that only one process sees)"
SMAPS = "needs /proc/self/smaps (Linux)"
WALLS = {
    "namespaces": "needs user namespaces (a kernel and a container that allow them)",
    "bubblewrap": "needs bubblewrap (apt-get install bubblewrap)",
}

SMOLLM2 = "needs SmolLM2-135M-Instruct in float32 (name its folder by T2RAY_SMOLLM2, or have it in the hub's cache)"

SHARED = Path(__file__).parents[2] / "shared"


def real(path: str) -> Path:
    """A model or a data set in the folder `shared` beside the checkout; skips the test where it is not there."""
    if not (SHARED / path).exists():
        pytest.skip(REAL)
    return SHARED / path


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, named by T2RAY_SMOLLM2; skips the test where it is not there by itself."""
    from t2ray.core import ModelError
    from t2ray.models.weights import resolve

    if named := os.environ.get("T2RAY_SMOLLM2"):
        return resolve(named)
    try:
        return resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    except ModelError:
        pytest.skip(SMOLLM2)


def extra(name: str, of: str = "") -> Any:
    """The module `name` of the package's extra `of` (else of that name); skips the test where it is not installed."""
    return pytest.importorskip(name, reason=f"needs {name} (pip install 't2ray[{of or name}]')")


def counted(reasons: list[str]) -> list[str]:
    """A line for each reason, the most frequent first: `skipped: 41 tests need chromium (apt-get install chromium)`."""
    lines = []
    for reason in sorted(set(reasons), key=lambda reason: (-reasons.count(reason), reason)):
        count, (_, _, what) = reasons.count(reason), reason.partition("needs ")
        tests, need = ("1 test", "needs") if count == 1 else (f"{count} tests", "need")
        lines.append(f"skipped: {tests} {need} {what}" if what else f"skipped: {tests}: {reason}")
    return lines
