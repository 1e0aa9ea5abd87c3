"""vLLM's second runner, by Triton's interpreter, two processes, both, and a real model; see `vllm_apart`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import needs
import pytest
from waiting import GUARD_S

HERE = Path(__file__).parent

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (make vllm)")]


def compared(*what: object) -> str:
    """What `vllm_apart` prints of a comparison that has found nothing."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, str(HERE / "vllm_apart.py"), *map(str, what)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * GUARD_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(("kind", "requests"), [("second", 24), ("parallel", 24), ("both", 6), ("folded", 6)])
def test_requests_of_6_mixtures_are_the_offline_engines(kind: str, requests: int) -> None:
    assert f"same {requests}" in compared(kind)


def test_20_requests_of_5_mixtures_on_a_real_model_are_the_offline_engines() -> None:
    assert "same 20" in compared("real", needs.smollm2())
