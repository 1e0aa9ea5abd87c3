"""vLLM as an engine, beside the offline engine on the tiny model; `make vllm` has an environment with it.

On a CPU vLLM runs its first runner. Its second one, the one of GPUs, and two processes are `test_vllm_apart.py`'s.
"""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from small import rollout
from test_grammar import FITS

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
with warnings.catch_warnings():  # of vLLM's own imports
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vLLM (make vllm)")
    from t2ray.engine.vllm import seams
    from t2ray.engine.vllm.engine import VLLMEngine

from t2ray.adapters.factors import Factors, decompose
from t2ray.adapters.model import Model, load_model
from t2ray.cli.main import main
from t2ray.config.serve import EngineConfig
from t2ray.config.train import TrainConfig
from t2ray.core import (
    Completion,
    ConfigError,
    ContextExceeded,
    GenerationError,
    Mixture,
    SamplingParams,
    UnknownExpert,
    user,
)
from t2ray.engine import choose
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.protocol import Engine
from t2ray.experts.registry import SHIPPED, Registry
from t2ray.models.load import load_chat
from t2ray.models.weights import TINY
from t2ray.training.domain import domain_store, finished, train_domain
from t2ray.training.loss import backward
from t2ray.training.metrics import StepMetrics, read_metrics

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings are not t2ray's

PROMPTS = (
    "17+25",
    "98-13",
    "What is 6*7?",
    "reverse abc",
    "a b c d e",
    "pick one: red",
    "def add(a, b):",
    "one two three four five six seven eight nine",
)  # the last one has more tokens than a block of the cache
LAYERED = Mixture.of({"math": [0.2, 0.9, 0.4, 0.7], "code": 0.3})
NAMES = ("base", "math", "code", "math:0.7,code:0.3", "pick:1.2,math:-0.3")
MIXTURES = (*map(Mixture.parse, NAMES), LAYERED)
GREEDY = SamplingParams(max_tokens=24)
CLOSE = 1e-3  # nats, in float32


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
    seams.EngineArgs = lambda **given: plain(**{**given, "block_size": 32, **options})  # type: ignore[misc,assignment]
    try:
        engine = VLLMEngine(TINY, factors, load_chat(TINY)[0], config, mode=mode)
    finally:
        seams.EngineArgs = plain  # type: ignore[misc]
    engine.start()
    engine.set_experts(experts(model))
    return engine


@pytest.fixture(scope="module")
def engine(factors: Factors, model: Model) -> Iterator[VLLMEngine]:
    """The cache is small enough for preemption, prefixes are shared, and prompts are read in pieces of 24 tokens."""
    pieces = {"max_num_batched_tokens": 24, "enable_chunked_prefill": True}
    engine = started(factors, model, EngineConfig(kv_tokens=480, batch_rows=16), **pieces)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def folding(factors: Factors, model: Model) -> Iterator[VLLMEngine]:
    engine = started(factors, model, EngineConfig(kv_tokens=4096, batch_rows=16), mode="one")
    yield engine
    engine.stop()


def observed(engine: VLLMEngine) -> Counter[str]:
    """Counts from here on the requests that its scheduler preempts, and the tokens that it finds in its cache."""
    seen, scheduler = Counter[str](), engine._pump.engine.engine_core.engine_core.scheduler
    preempt, make_stats = scheduler._preempt_request, scheduler.make_stats

    def preempting(*args: Any, **more: Any) -> Any:
        seen["preempted"] += 1
        return preempt(*args, **more)

    def counting(*args: Any, **more: Any) -> Any:
        stats = make_stats(*args, **more)
        seen["cached"] += stats.prefix_cache_stats.hits
        return stats

    scheduler._preempt_request, scheduler.make_stats = preempting, counting
    return seen


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
    wanted, seen = answers(offline, ALL, long), observed(engine)
    same(answers(engine, ALL, long), wanted)
    same(answers(engine, list(reversed(ALL)), long), wanted[::-1])
    assert seen["preempted"] and seen["cached"], seen


def test_without_its_salt_the_cache_would_mix_mixtures(
    engine: VLLMEngine, offline: OfflineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the salt is for: the test of equality can fail."""
    monkeypatch.setattr("t2ray.engine.vllm.pump._salt", lambda mixture: "one")
    text = "What is 6*7? " * 8  # more than a block
    wanted = answers(offline, [(text, m) for m in MIXTURES], GREEDY)
    for _ in range(2):  # the first time fills the cache
        found = answers(engine, [(text, m) for m in MIXTURES], GREEDY)
    pairs = zip(found, wanted, strict=True)
    assert any(one.logprobs[0] != pytest.approx(other.logprobs[0], abs=CLOSE) for one, other in pairs)


def test_one_mixture_at_a_time_is_folded_and_answers_alike(folding: VLLMEngine, offline: OfflineEngine) -> None:
    same(answers(folding, ALL, GREEDY), answers(offline, ALL, GREEDY))
    assert folding.lost < 1e-5 and folding.stats.folds >= 5
    same(
        answers(folding, ALL[:8], GREEDY), answers(offline, ALL[:8], GREEDY)
    )  # the base again, bit for bit its weights
    assert folding.lost == 0.0


@pytest.mark.parametrize("which", ["engine", "folding"])
def test_scores_and_readings_are_the_offline_engines(
    which: str, offline: OfflineEngine, request: pytest.FixtureRequest
) -> None:
    engine, labels = request.getfixturevalue(which), ("math", "code", "others")

    async def asked(engine: Engine) -> list[Any]:
        scores = await asyncio.gather(*(engine.score(user("17+25"), labels, m) for m in MIXTURES))
        return [*scores, await engine.read("12+12=24", MIXTURES[3], 3)]

    *found, read = asyncio.run(asked(engine))
    *wanted, expected = asyncio.run(asked(offline))
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    assert [(t.id, t.text, [x.id for x in t.top]) for t in read] == [
        (t.id, t.text, [x.id for x in t.top]) for t in expected
    ]
    assert [t.logprob for t in read[1:]] == pytest.approx([t.logprob for t in expected[1:]], abs=CLOSE)


def test_stop_strings_top_tokens_and_streams(engine: VLLMEngine, offline: OfflineEngine) -> None:
    whole = answers(offline, [("98-13", MIXTURES[1])], GREEDY)[0]
    stop = whole.text[1:3]
    stopped = SamplingParams(max_tokens=24, stop=(stop,), top_logprobs=3)

    async def streamed() -> list[Any]:
        return [delta async for delta in engine.stream(user("98-13"), MIXTURES[1], stopped)]

    wanted = answers(offline, [("98-13", MIXTURES[1])], stopped)[0]
    found = answers(engine, [("98-13", MIXTURES[1])], stopped)[0]
    assert (found.text, found.finish_reason) == (wanted.text, "stop") and stop not in found.text
    assert "".join(delta.text for delta in asyncio.run(streamed())) == found.text
    for token in found.tokens:
        assert len(token.top) == 3 and token.top[0].logprob >= token.logprob


def test_answers_follow_their_own_grammars_as_the_offline_engines_do(
    engine: VLLMEngine, offline: OfflineEngine
) -> None:
    jobs = [(mixture, grammar) for mixture in MIXTURES[:4] for grammar in FITS]

    async def together(engine: Engine) -> list[Completion]:
        tokens = {grammar: 64 if grammar else 12 for grammar in FITS}
        return await asyncio.gather(
            *(
                engine.generate(user("17+25"), mixture, SamplingParams(max_tokens=tokens[grammar], grammar=grammar))
                for mixture, grammar in jobs
            )
        )

    found, wanted = asyncio.run(together(engine)), asyncio.run(together(offline))
    assert [one.token_ids for one in found] == [other.token_ids for other in wanted]
    for (_, grammar), answer in zip(jobs, found, strict=True):
        assert FITS[grammar](answer.text) and answer.finish_reason == "stop", (grammar, answer.text)
    with pytest.raises(ConfigError, match="grammar cannot be followed"):
        answers(engine, [("17+25", MIXTURES[0])], SamplingParams(max_tokens=4, grammar="start: ("))


def weighed(engine: VLLMEngine, model: Model, temperature: float) -> None:
    """The probabilities that a sampler gives for what it draws are the trainer's at that temperature: weights of 1."""
    sampling = SamplingParams(max_tokens=16, temperature=temperature, seed=3, ignore_eos=True)
    made = answers(engine, [(text, MIXTURES[2]) for text in PROMPTS], sampling)
    rollouts = [replace(rollout((), ()), completion=completion) for completion in made]
    terms = backward(
        model, experts(model)["code"][None].requires_grad_(), rollouts, [1.0] * len(rollouts),
        lam=0.0, temperature=temperature, batch=len(rollouts), truncate=2.0,
    )  # fmt: skip
    drawn = torch.tensor([logprob for completion in made for logprob in completion.logprobs])
    assert terms.chosen_N == pytest.approx(drawn, abs=CLOSE)
    assert terms.ratio / terms.tokens == pytest.approx(1.0, abs=1e-4) and terms.cut == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_rollouts_importance_weight_is_1_at_every_temperature(
    folding: VLLMEngine, model: Model, temperature: float
) -> None:
    weighed(folding, model, temperature)


def test_a_seed_draws_the_same_answer_whatever_else_runs(folding: VLLMEngine) -> None:
    def drawn(texts: Sequence[str], seed: int) -> list[tuple[int, ...]]:
        sampling = SamplingParams(max_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)
        return [one.token_ids for one in answers(folding, [(text, MIXTURES[1]) for text in texts], sampling)]

    assert drawn(PROMPTS, 7)[0] == drawn(PROMPTS[:1], 7)[0]
    assert len({drawn(PROMPTS[:1], seed)[0] for seed in range(6)}) > 1


def test_mistakes_are_refused_in_front_and_end_nobody(engine: VLLMEngine) -> None:
    for prompt, mixture, sampling, error in (
        ("x", Mixture.parse("maths"), GREEDY, UnknownExpert),
        ("", Mixture.base(), GREEDY, ConfigError),
        ("x", Mixture.base(), SamplingParams(max_tokens=9999), ContextExceeded),
        ((1, 99999), Mixture.base(), GREEDY, ConfigError),
    ):
        with pytest.raises(error):
            asyncio.run(engine.generate(prompt, mixture, sampling))
    with pytest.raises(GenerationError, match="refuses"):  # what vLLM itself refuses
        asyncio.run(engine.read("x", Mixture.base(), 50))
    engine.check()
    assert answers(engine, [("17+25", Mixture.base())], GREEDY)


def test_an_expert_that_is_replaced_while_a_request_runs_stays_its_own(
    engine: VLLMEngine, offline: OfflineEngine, model: Model
) -> None:
    """The running one keeps its z, the next one has the new; the old version is forgotten with its last request."""
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    old, new = (answers(offline, [("17+25", Mixture.parse(name))], long)[0].token_ids for name in ("math", "code"))

    async def replaced() -> tuple[Completion, Completion]:
        stream, seen = engine.stream(user("17+25"), Mixture.parse("math"), long), list[int]()
        async for delta in stream:
            if not seen:
                engine.set_experts({"math": experts(model)["code"]})
                other = asyncio.ensure_future(engine.generate(user("17+25"), Mixture.parse("math"), long))
            seen += [token.id for token in delta.tokens]
        return seen, await other

    try:
        seen, other = asyncio.run(replaced())
        assert tuple(seen) == old and other.token_ids == new and old != new
        (worker,) = engine._pump.engine.collective_rpc(
            lambda worker: list(worker.vllm_config.quant_config.bank.experts)
        )
        assert sorted(key.partition("@")[0] for key in worker) == sorted(engine.experts)
    finally:
        engine.set_experts({"math": experts(model)["math"]})


def test_no_request_meets_a_version_that_was_replaced_a_moment_before(engine: VLLMEngine, model: Model) -> None:
    """As in an endpoint, another thread replaces the expert; a worker without a version would end the engine."""
    z_K, short = experts(model)["math"], SamplingParams(max_tokens=2)
    engine.set_experts({"new": z_K})
    thread = threading.Thread(target=lambda: [engine.set_experts({"new": z_K}) for _ in range(60)])
    thread.start()
    try:
        while thread.is_alive():
            answers(engine, [("17+25", Mixture.parse("new"))] * 3, short)
    finally:
        thread.join()
        engine.set_experts({}, ["new"])
    engine.check()


def test_experts_come_and_go(engine: VLLMEngine, model: Model) -> None:
    engine.set_experts({"new": experts(model)["math"]})
    found = [answers(engine, [("17+25", Mixture.parse(name))], GREEDY)[0].text for name in ("new", "math")]
    assert found[0] == found[1]
    engine.set_experts({}, ["new"])
    with pytest.raises(UnknownExpert):
        answers(engine, [("17+25", Mixture.parse("new"))], GREEDY)


def test_a_caller_who_goes_frees_its_place(engine: VLLMEngine) -> None:
    async def gone() -> None:
        long = SamplingParams(max_tokens=200, ignore_eos=True)
        task = asyncio.ensure_future(engine.generate(user("x"), Mixture.base(), long))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    before = engine.stats.aborted
    asyncio.run(gone())
    answers(engine, [("17+25", Mixture.base())], GREEDY)
    stats = engine.stats
    assert (stats.aborted, stats.running, stats.waiting) == (before + 1, 0, 0) and stats.kv_total > 0


def test_a_mixture_that_overflows_fails_alone(engine: VLLMEngine) -> None:
    async def both() -> list[Any]:
        wrong = engine.generate(user("17+25"), Mixture.parse("math:1e30"), GREEDY)
        right = engine.generate(user("17+25"), Mixture.parse("math"), GREEDY)
        return list(await asyncio.gather(wrong, right, return_exceptions=True))

    wrong, right = asyncio.run(both())
    assert "overflow" in str(wrong) and isinstance(right, Completion)


def test_eval_answers_by_vllm_as_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factors: Factors
) -> None:
    """By every way: the base, an expert, and pass 1 by scores; each answer, what was read of it, and its reward."""
    monkeypatch.chdir(tmp_path)
    told = {}
    for kind in ("transformers", "vllm"):
        command = ["eval", "--tasks", "math,pick", "--strategies", "base,math,prompt", "--limit", "8", "--engine", kind]
        places = ["--factors", str(factors.folder), "--experts", str(SHIPPED), "--answers", f"{kind}.parquet"]
        assert main([*command, *places]) == 0
        told[kind] = parquet.read_table(f"{kind}.parquet").to_pylist()
    assert told["vllm"] == told["transformers"] and len(told["vllm"]) == 2 * 3 * 8


# What is below ends an engine of this process, and with it what vLLM has once per process: it comes last.


def test_the_demos_code_domain_trains_with_rollouts_by_vllm(
    factors: Factors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the demo does it; the weights of the loss say that sampler and trainer are one policy in float32."""
    made, plain = list[VLLMEngine](), choose.vllm_engine

    def kept(*given: Any, **more: Any) -> VLLMEngine:
        made.append(plain(*given, **more))
        return made[-1]

    monkeypatch.setattr(choose, "vllm_engine", kept)
    rl = {"prompts": 128, "samples": 1, "lr": 0.01, "kl": 0.002, "eval_prompts": 100, "steps": 20,
          "engine": "vllm"}  # fmt: skip
    config = TrainConfig.model_validate(
        {"model": "tiny", "out": str(tmp_path), "factors": str(factors.folder), "cpus": 1, "workers": 0, "rl": rl,
         "domains": {"code": {"task": "code"}}, "unsafe_code": True, "chat_template_kwargs": {"brief": True}}
    )  # fmt: skip
    rows: list[StepMetrics] = []
    train_domain(config, "code", rows.append)
    result = finished(domain_store(config, "code"))
    assert result is not None and result.accuracy >= 0.95 > 0.2 > result.base_accuracy
    every = read_metrics(domain_store(config, "code"))
    assert [row.importance for row in every] == pytest.approx([1.0] * 20, abs=0.01)
    assert {row.importance_cut for row in every} == {0.0}
    assert [engine.chat.template for engine in made] == [{"brief": True}]
