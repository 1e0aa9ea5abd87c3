"""`python vllm_apart.py second|parallel`: requests of several mixtures through vLLM's second runner, by Triton's
interpreter on a CPU, or through two tensor parallel processes; exits with 1 where they are not the offline engine's.

In a process of its own, since vLLM chooses both when it is imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

warnings.simplefilter("ignore")


def interpreted() -> None:
    """Triton with a backend "cpu" that interprets, as far as vLLM looks for one."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: False)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]


def main(kind: str) -> None:
    if kind == "second":
        interpreted()
    from test_vllm import ALL, SamplingParams, answers, experts, same, started

    from t2ray.adapters.factors import decompose
    from t2ray.adapters.model import load_model
    from t2ray.config.serve import EngineConfig
    from t2ray.engine.offline import OfflineEngine

    with tempfile.TemporaryDirectory() as folder:
        factors = decompose("tiny", Path(folder) / "factors")
        model = load_model("tiny", factors.folder, device="cpu")
        offline = OfflineEngine(model)
        offline.set_experts(experts(model))
        small = EngineConfig(kv_tokens=160, batch_rows=8)  # in pieces, and with preemption
        config = small if kind == "second" else EngineConfig(kv_tokens=4096, batch_rows=8, tensor_parallel=2)
        engine = started(factors, model, config, max_num_batched_tokens=24, enable_chunked_prefill=True)
        assert engine._pump.engine.vllm_config.use_v2_model_runner == (kind == "second")
        requests, sampling = ALL[::2], SamplingParams(max_tokens=8)
        wanted = answers(offline, requests, sampling)
        for _ in range(2):  # the second time with prefixes from the cache
            same(answers(engine, requests, sampling), wanted)
        engine.stop()
    print("same", len(requests))


if __name__ == "__main__":
    main(sys.argv[1])
