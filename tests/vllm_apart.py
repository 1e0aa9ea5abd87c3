"""`python vllm_apart.py KIND`: requests of several mixtures through vLLM, held against the offline engine's answers.

KIND is "second" (vLLM's second runner, by Triton's interpreter on a CPU), "parallel" (two tensor parallel processes) or
"folded" (the same with one mixture in the weights at a time). It exits with 1 where an answer differs. In a process of
its own, since vLLM chooses both when it is imported.
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
    from test_vllm import ALL, SamplingParams, answers, experts, observed, same, started

    from t2ray.adapters.factors import decompose
    from t2ray.adapters.model import load_model
    from t2ray.config.serve import EngineConfig
    from t2ray.engine.offline import OfflineEngine

    with tempfile.TemporaryDirectory() as folder:
        factors = decompose("tiny", Path(folder) / "factors")
        model = load_model("tiny", factors.folder, device="cpu")
        offline = OfflineEngine(model)
        offline.set_experts(experts(model))
        config = EngineConfig(kv_tokens=192, batch_rows=8, tensor_parallel=1 if kind == "second" else 2)
        mode = "one" if kind == "folded" else "mixtures"
        engine = started(factors, model, config, mode=mode, max_num_batched_tokens=24, enable_chunked_prefill=True)
        assert engine._pump.engine.vllm_config.use_v2_model_runner == (kind == "second")
        requests, sampling, seen = ALL[1::2], SamplingParams(max_tokens=24, ignore_eos=True), observed(engine)
        wanted = answers(offline, requests, sampling)
        same(answers(engine, requests, sampling), wanted)
        for _ in range(2):  # the second time with its prefix from the cache
            same(answers(engine, requests[-1:], sampling), wanted[-1:])
        assert seen["cached"] and (seen["preempted"] or kind == "folded"), seen  # few requests have the folded mixture
        engine.stop()
    print("same", len(requests))


if __name__ == "__main__":
    main(sys.argv[1])
