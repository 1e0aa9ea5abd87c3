"""`python vllm_apart.py KIND [FOLDER]`: requests of several mixtures through vLLM, beside the offline engine's answers.

KIND is "second" (vLLM's second runner, by Triton's interpreter on a CPU), "parallel" (two tensor parallel processes),
"both" (two processes of the second runner), "folded" (the same with one mixture in the weights at a time), or "real"
(the model in FOLDER). It exits with 1 where an answer differs. In a process of its own, since vLLM chooses when it is
imported, and since a process has what is vLLM's own but once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

warnings.simplefilter("ignore")

SECOND = ("second", "both", "folded")

if sys.argv[1] in SECOND:
    # Triton with a backend "cpu" that interprets, as far as vLLM looks for one. Here, and not in `main`, since each of
    # vLLM's processes begins by importing this module: without it, its kernels would be placeholders.
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: False)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)  # type: ignore[assignment]


def tiny(kind: str) -> int:
    """Compares on the tiny model; returns the number of requests."""
    from test_vllm import ALL, SamplingParams, answers, experts, observed, same, started, weighed

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
        assert engine._pump.engine.vllm_config.use_v2_model_runner == (kind in SECOND)
        slow = kind in ("both", "folded")  # two interpreters that wait for each other
        requests = ALL[7::8] if slow else ALL[1::2]  # the longest prompt by every mixture
        sampling, seen = SamplingParams(max_tokens=8 if slow else 24, ignore_eos=True), observed(engine)
        wanted = answers(offline, requests, sampling)
        same(answers(engine, requests, sampling), wanted)
        for _ in range(2):  # the second time with its prefix from the cache
            same(answers(engine, requests[-1:], sampling), wanted[-1:])
        assert seen["cached"] and (seen["preempted"] or slow), seen
        if kind == "folded":
            weighed(engine, model, 0.7)
        engine.stop()
    return len(requests)


def real(folder: Path) -> int:
    """Compares on a model of a user's, with experts drawn at random; returns the number of requests."""
    import torch
    from test_vllm import CLOSE, PROMPTS, SamplingParams, answers

    from t2ray.adapters.factors import decompose
    from t2ray.adapters.model import load_model
    from t2ray.config.serve import EngineConfig
    from t2ray.core import Mixture
    from t2ray.engine.offline import OfflineEngine
    from t2ray.engine.vllm.engine import VLLMEngine
    from t2ray.models.load import load_chat

    with tempfile.TemporaryDirectory() as made:
        factors = decompose(str(folder), Path(made) / "factors")
        model = load_model(str(folder), factors.folder, device="cpu")
        torch.manual_seed(0)
        experts = {name: 1 + 0.05 * torch.randn(model.adapter.size) for name in "ab"}
        offline, config = OfflineEngine(model), EngineConfig(kv_tokens=4096, batch_rows=16)
        engine = VLLMEngine(folder, factors, load_chat(folder)[0], config)
        engine.start()
        for one in (offline, engine):
            one.set_experts(experts)
        layers = max(target.layer for target in factors.layout) + 1
        layered = Mixture.of({"a": [i / layers for i in range(layers)], "b": 0.3})
        mixtures = (*map(Mixture.parse, ("base", "a", "b", "a:0.7,b:0.3")), layered)
        requests = [(text, mixture) for mixture in mixtures for text in PROMPTS[:4]]
        sampling = SamplingParams(max_tokens=16, ignore_eos=True)
        wanted, found = (answers(one, requests, sampling) for one in (offline, engine))
        engine.stop()
        assert len({one.token_ids for one in wanted}) > 12  # the mixtures differ, and so can the engines
        for one, other in zip(found, wanted, strict=True):
            pairs = zip(one.token_ids, other.token_ids, strict=True)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))
            near = torch.tensor(one.logprobs[:at]) - torch.tensor(other.logprobs[:at])
            assert near.abs().max() < CLOSE, near
            if at < len(one.token_ids):
                ids_1T = torch.tensor([[*one.prompt_ids, *one.token_ids[:at]]])
                with torch.no_grad(), model.adapter.rows(offline.vector(one.mixture)[None]):
                    logit_V = model.logits(model.hidden(ids_1T, torch.ones_like(ids_1T))[:, -1])[0]
                apart = float(logit_V[one.token_ids[at]] - logit_V[other.token_ids[at]])
                print(f"{one.mixture}, token {at}: the two likeliest are {apart:.1e} nats apart")
                assert abs(apart) < CLOSE, apart
    return len(requests)


if __name__ == "__main__":
    print("same", real(Path(sys.argv[2])) if sys.argv[1] == "real" else tiny(sys.argv[1]))
