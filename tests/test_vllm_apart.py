"""vLLM's second runner, through Triton's interpreter, and two tensor parallel processes; see `vllm_apart`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from waiting import GUARD_S

HERE = Path(__file__).parent

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (make vllm)")]


@pytest.mark.parametrize("kind", ["second", "parallel", "folded"])
def test_24_requests_of_6_mixtures_are_the_offline_engines(kind: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [sys.executable, HERE / "vllm_apart.py", kind], env=environment, capture_output=True, text=True, timeout=GUARD_S
    )
    assert done.returncode == 0 and "same 24" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
