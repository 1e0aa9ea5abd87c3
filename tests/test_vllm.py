"""vLLM as an engine, beside the offline engine on the tiny model; `make vllm` has an environment with it.

On a CPU vLLM runs its first runner. Its second one, the one of GPUs, is tested through Triton's interpreter in
`test_vllm_second.py`, and two processes in `test_vllm_processes.py`, since what vLLM reads at its start is different.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
with warnings.catch_warnings():  # of vLLM's own imports
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vLLM (make vllm)")
    from t2ray.engine.vllm import seams
    from t2ray.engine.vllm.engine import VLLMEngine

from t2ray.adapters.factors import Factors, decompose
from t2ray.adapters.model import Model, load_model
from t2ray.config.serve import EngineConfig
from t2ray.core import Completion, ConfigError, ContextExceeded, Mixture, SamplingParams, UnknownExpert, user
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.protocol import Engine
from t2ray.experts.registry import SHIPPED, Registry
from t2ray.models.load import load_chat
from t2ray.models.weights import TINY

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings are not t2ray's

PROMPTS = ("17+25", "98-13", "What is 6*7?", "reverse abc", "a b c d e", "pick one: red", "12+12=", "def add(a, b):")
LAYERED = Mixture.of({"math": [0.2, 0.9, 0.4, 0.7], "code": 0.3})
NAMES = ("base", "math", "code", "math:0.7,code:0.3", "pick:1.2,math:-0.3")
MIXTURES = (*map(Mixture.parse, NAMES), LAYERED)
GREEDY = SamplingParams(max_tokens=24)
CLOSE = 2e-4  # nats, in float32


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> Factors:
    return decompose("tiny", tmp_path_factory.mktemp("tiny") / "factors")


@pytest.fixture(scope="module")
def model(factors: Factors) -> Model:
    return load_model("tiny", factors.folder, device="cpu")


def experts(model: Model) -> dict[str, torch.Tensor]:
    registry = Registry(SHIPPED)
    return {name: model.adapter.join(registry.load(name).z) for name in registry.names()}


@pytest.fixture(scope="module")
def offline(model: Model) -> OfflineEngine:
    engine = OfflineEngine(model)
    engine.set_experts(experts(model))
    return engine


def started(factors: Factors, model: Model, config: EngineConfig, **options: Any) -> VLLMEngine:
    """An engine with the shipped experts; blocks of 32 tokens, so that requests of some tokens have several."""
    mode, plain = options.pop("mode", "mixtures"), seams.EngineArgs
    seams.EngineArgs = partial(plain, block_size=32, **options)  # type: ignore[misc]
    try:
        engine = VLLMEngine(TINY, factors, load_chat(TINY), config, mode=mode)
    finally:
        seams.EngineArgs = plain  # type: ignore[misc]
    engine.start()
    engine.set_experts(experts(model))
    return engine


@pytest.fixture(scope="module")
def engine(factors: Factors, model: Model) -> Iterator[VLLMEngine]:
    """Prompts are read in pieces of 24 tokens, the cache is small enough for preemption, prefixes are shared."""
    engine = started(factors, model, EngineConfig(kv_tokens=512, batch_tokens=24, batch_rows=16))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def folding(factors: Factors, model: Model) -> Iterator[VLLMEngine]:
    engine = started(factors, model, EngineConfig(kv_tokens=4096, batch_tokens=256, batch_rows=16), mode="one")
    yield engine
    engine.stop()


def answers(engine: Engine, requests: Sequence[tuple[str, Mixture]], sampling: SamplingParams) -> list[Completion]:
    async def together() -> list[Completion]:
        return list(await asyncio.gather(*(engine.generate(user(text), mix, sampling) for text, mix in requests)))

    return asyncio.run(together())


def same(found: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert (one.prompt_ids, one.mixture) == (other.prompt_ids, other.mixture)
        assert torch.tensor(one.logprobs) == pytest.approx(torch.tensor(other.logprobs), abs=CLOSE)


ALL = [(text, mixture) for mixture in MIXTURES for text in PROMPTS]


def test_48_requests_of_6_mixtures_are_the_offline_engines(engine: VLLMEngine, offline: OfflineEngine) -> None:
    """In chunks, under preemption, and again with every prefix in the cache."""
    long = SamplingParams(max_tokens=48, ignore_eos=True)
    wanted = answers(offline, ALL, long)
    same(answers(engine, ALL, long), wanted)
    same(answers(engine, list(reversed(ALL)), long), wanted[::-1])
    assert engine._pump.engine.vllm_config.cache_config.enable_prefix_caching
