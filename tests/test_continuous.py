"""The continuous engine: rows share every step, and none notices."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import load_as, random_z
from torch import Tensor
from waiting import GUARD_S

from t2ray.adapters.model import Model
from t2ray.config.serve import EngineConfig
from t2ray.core import (
    Completion,
    ConfigError,
    ContextExceeded,
    Delta,
    ExpertError,
    GenerationError,
    Message,
    Mixture,
    SamplingParams,
    UnknownExpert,
    user,
)
from t2ray.engine import loop
from t2ray.engine.offline import OfflineEngine
from t2ray.engine.online import OnlineEngine
from t2ray.engine.transformers import salted

T = TypeVar("T")
MIXTURES = [Mixture.parse(text) for text in ("math", "code", "math:0.5,code:0.5", "base", "math:-0.3,code:1.2")]
PROMPTS = ["17+25", "a", "which is larger, a or b, and why should it matter?", "add 3 then times 2"]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    loaded = load_as(torch.float32, tiny_llama, tmp_path_factory.mktemp("continuous"))
    loaded.adapter.bank = {"math": random_z(loaded.adapter.size, 1), "code": random_z(loaded.adapter.size, 2)}
    return loaded


@pytest.fixture
def engine(model: Model) -> Iterator[OnlineEngine]:
    yield from started(model, EngineConfig(kv_tokens=2048, batch_tokens=64, batch_rows=16))


def started(model: Model, config: EngineConfig) -> Iterator[OnlineEngine]:
    bank = dict(model.adapter.bank)
    engine = OnlineEngine(model, config)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        model.adapter.bank = bank


def run(call: Callable[[], Awaitable[T]], timeout_s: float = GUARD_S) -> T:
    return asyncio.run(asyncio.wait_for(call(), timeout_s))


async def all_of(engine: OnlineEngine, sampling: SamplingParams) -> list[Completion]:
    jobs = [(prompt, mixture) for prompt in PROMPTS for mixture in MIXTURES]
    return list(await asyncio.gather(*(engine.generate(user(p), mixture, sampling) for p, mixture in jobs)))


async def idle(engine: OnlineEngine) -> None:
    while (stats := engine.stats).running or stats.waiting or stats.kv_free != stats.kv_total:
        await asyncio.sleep(0.005)


def test_a_row_of_a_mixed_batch_equals_the_row_alone_and_the_static_engine(engine: OnlineEngine) -> None:
    sampling = SamplingParams(max_tokens=12)

    async def both() -> tuple[list[Completion], list[Completion]]:
        mixed = await all_of(engine, sampling)
        alone = [await engine.generate(user(p), mixture, sampling) for p in PROMPTS for mixture in MIXTURES]
        return mixed, alone

    mixed, alone = run(both)
    assert [done.token_ids for done in mixed] == [done.token_ids for done in alone]
    static = OfflineEngine(engine.model)
    for done, prompt in zip(mixed, [p for p in PROMPTS for _ in MIXTURES], strict=True):
        expected = run(lambda prompt=prompt, done=done: static.generate(user(prompt), done.mixture, sampling))
        assert (done.token_ids, done.text, done.prompt_ids) == (expected.token_ids, expected.text, expected.prompt_ids)
        torch.testing.assert_close(torch.tensor(done.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)
        assert done.finish_reason == expected.finish_reason
    assert len({done.token_ids for done in mixed}) > len(PROMPTS)  # the mixtures do differ


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(engine: OnlineEngine) -> None:
    sampling = SamplingParams(max_tokens=16, temperature=1.3, top_p=0.9, seed=11)

    async def draws() -> tuple[Completion, Completion, Completion]:
        alone = await engine.generate(user("17+25"), MIXTURES[0], sampling)
        noise = [
            engine.generate(user("b" * i), MIXTURES[i % 5], SamplingParams(max_tokens=30, temperature=2.0))
            for i in range(9)
        ]
        among, *_ = await asyncio.gather(engine.generate(user("17+25"), MIXTURES[0], sampling), *noise)
        other = await engine.generate(
            user("17+25"), MIXTURES[0], SamplingParams(max_tokens=16, temperature=1.3, seed=12)
        )
        return alone, among, other

    alone, among, other = run(draws)
    assert alone.token_ids == among.token_ids != other.token_ids


def test_both_engines_choose_alike_by_every_parameter(engine: OnlineEngine) -> None:
    hot: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "seed": 5}
    many = [
        SamplingParams(**hot | other)
        for other in (
            {"top_k": 3}, {"min_p": 0.2}, {"top_p": 0.7, "top_k": 5}, {"presence_penalty": 2.0},
            {"frequency_penalty": -2.0}, {"logit_bias": ((70, 8.0), (71, -100.0))}, {"temperature": 0.0},
            {"temperature": 0.0, "frequency_penalty": 2.0},
        )
    ]  # fmt: skip

    async def all_at_once(engine: OnlineEngine | OfflineEngine) -> list[tuple[int, ...]]:
        calls = [engine.generate(user("why?"), MIXTURES[0], sampling) for sampling in many]
        return [answer.token_ids for answer in await asyncio.gather(*calls)]

    online, offline = run(lambda: all_at_once(engine)), run(lambda: all_at_once(OfflineEngine(engine.model)))
    assert online == offline and len(set(online)) >= 7
    with pytest.raises(ConfigError, match=r"logit_bias has the token 999; the model's tokens are 0\.\."):
        run(lambda: engine.generate(user("why?"), MIXTURES[0], SamplingParams(logit_bias=((999, 1.0),))))


def test_a_stream_adds_up_to_the_whole_answer(engine: OnlineEngine) -> None:
    async def compare() -> None:
        for seed in range(6):
            sampling = SamplingParams(max_tokens=40, temperature=1.5, seed=seed, stop=("q", "ab"))
            whole = await engine.generate(user("hi"), MIXTURES[1], sampling)
            pieces = [delta async for delta in engine.stream(user("hi"), MIXTURES[1], sampling)]
            assert "".join(delta.text for delta in pieces) == whole.text
            assert tuple(token.id for delta in pieces for token in delta.tokens) == whole.token_ids
            assert [delta.finish_reason for delta in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]
            assert {delta.prompt_tokens for delta in pieces} == {len(whole.prompt_ids)}

    run(compare)


@pytest.mark.parametrize(("deltas_per_s", "expected"), [(1e-9, 2), (1e9, 10)])
def test_a_streams_first_token_comes_at_once_and_later_ones_by_the_rate(
    engine: OnlineEngine, monkeypatch: pytest.MonkeyPatch, deltas_per_s: float, expected: int
) -> None:
    monkeypatch.setattr(loop, "DELTAS_PER_S", deltas_per_s)
    monkeypatch.setattr(loop, "LONGEST_GAP_S", 1 / deltas_per_s)
    wakes, wake = [], loop._wake
    monkeypatch.setattr(loop, "_wake", lambda rows: wakes.append(wake(rows)))

    async def follow() -> None:
        async for _ in engine.stream(user("hi"), MIXTURES[0], SamplingParams(max_tokens=10, ignore_eos=True)):
            pass

    run(follow)
    assert len(wakes) == expected


def test_a_stop_string_is_never_shown_and_ends_the_answer(engine: OnlineEngine) -> None:
    async def stopped() -> tuple[Completion, list[Delta], str]:
        free = await engine.generate(user("go"), MIXTURES[0], SamplingParams(max_tokens=40, ignore_eos=True))
        stop = free.text[4:6]
        sampling = SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop, "never"))
        cut = await engine.generate(user("go"), MIXTURES[0], sampling)
        return cut, [delta async for delta in engine.stream(user("go"), MIXTURES[0], sampling)], free.text

    cut, pieces, text = run(stopped)
    stop = text[4:6]
    assert cut.text == text[: text.index(stop)] == "".join(delta.text for delta in pieces)
    assert cut.finish_reason == "stop"


def test_top_logprobs_are_the_likeliest_tokens_with_the_chosen_one_on_top_when_greedy(engine: OnlineEngine) -> None:
    async def answer() -> list[Delta]:
        return [d async for d in engine.stream(user("x"), MIXTURES[0], SamplingParams(max_tokens=5, top_logprobs=3))]

    for delta in run(answer):
        for token in delta.tokens:
            values = [top.logprob for top in token.top]
            assert len(values) == 3 and values == sorted(values, reverse=True)
            assert (token.top[0].id, token.top[0].logprob) == (token.id, pytest.approx(token.logprob))


def test_scores_equal_the_static_engine_s_also_between_steps(engine: OnlineEngine) -> None:
    labels = ("math", "code", "others")

    async def both() -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        busy = asyncio.gather(*(engine.generate(user("z"), m, SamplingParams(max_tokens=40)) for m in MIXTURES))
        scores = await asyncio.gather(*(engine.score(user(p), labels, m) for p in PROMPTS for m in MIXTURES))
        await busy
        static = OfflineEngine(engine.model)
        return list(scores), [await static.score(user(p), labels, m) for p in PROMPTS for m in MIXTURES]

    scores, expected = run(both)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------ ends and faults


def test_prompts_are_read_between_steps_as_the_static_engine_reads_them(engine: OnlineEngine) -> None:
    async def busy() -> list[Any]:
        calls = [engine.read(text, mixture, 2) for text in PROMPTS for mixture in MIXTURES[:2]]
        rows = [engine.generate(text, MIXTURES[0], SamplingParams(max_tokens=20)) for text in PROMPTS]
        return (await asyncio.gather(*calls, *rows))[: len(calls)]

    static = OfflineEngine(engine.model)
    for online, offline in zip(
        run(busy),
        (run(lambda t=t, m=m: static.read(t, m, 2)) for t in PROMPTS for m in MIXTURES[:2]),
        strict=True,
    ):
        assert [t.id for t in online] == [t.id for t in offline]
        assert [t.logprob for t in online[1:]] == pytest.approx([t.logprob for t in offline[1:]], abs=1e-4)
    ids = engine.chat.encode_text("17+25")
    greedy = SamplingParams(max_tokens=8)
    text = run(lambda: engine.generate("17+25", MIXTURES[0], greedy))
    assert text == run(lambda: engine.generate(ids, MIXTURES[0], greedy))


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_a_request_that_is_given_up_frees_its_pages(engine: OnlineEngine, way: str) -> None:
    long = SamplingParams(max_tokens=180, ignore_eos=True)

    async def give_up() -> None:
        other = asyncio.create_task(engine.generate(user("other"), MIXTURES[1], SamplingParams(max_tokens=20)))
        if way == "close":
            stream = engine.stream(user("long"), MIXTURES[0], long)
            await anext(stream)
            await stream.aclose()
        else:
            task = asyncio.create_task(engine.generate(user("long"), MIXTURES[0], long))
            while not engine.stats.running:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await other
        await idle(engine)
        assert engine.stats.aborted == 1 and engine.stats.finished == 1

    run(give_up)


def test_a_row_whose_numbers_overflow_fails_alone(engine: OnlineEngine) -> None:
    engine.set_experts({**engine.model.adapter.bank, "broken": torch.full((engine.model.adapter.size,), 1e38)})

    async def mixed() -> list[Any]:
        calls = [
            engine.generate(user("x"), Mixture.parse(n), SamplingParams(max_tokens=8))
            for n in ("math", "broken", "code")
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await idle(engine)
        return results

    math, broken, code = run(mixed)
    assert isinstance(broken, ExpertError) and "not finite" in str(broken)
    assert isinstance(math, Completion) and isinstance(code, Completion)
    assert engine.stats.failed == 1


def test_a_prompt_that_cannot_fit_and_an_unknown_expert_are_refused_before_anything_runs(model: Model) -> None:
    for engine in started(model, EngineConfig(kv_tokens=64, batch_tokens=64, batch_rows=4)):

        async def refused(engine: OnlineEngine = engine) -> None:
            with pytest.raises(ConfigError, match="cache of 64 tokens"):
                await engine.generate(user("x"), Mixture.base(), SamplingParams(max_tokens=63))
            with pytest.raises(ConfigError, match="model's context of"):
                await engine.generate(user("x" * 4000), Mixture.base(), SamplingParams(max_tokens=1))
            with pytest.raises(UnknownExpert, match="'math'"):
                await engine.generate(user("x"), Mixture.parse("maths"), SamplingParams(max_tokens=1))

        run(refused)
        assert engine.stats.steps == 0


def test_an_answer_without_a_limit_of_its_own_goes_on_to_the_end_of_what_has_room(model: Model) -> None:
    free = SamplingParams(max_tokens=1000, ignore_eos=True, to_end=True)
    for engine in started(model, EngineConfig(kv_tokens=64, batch_tokens=64, batch_rows=4)):
        answer = run(lambda engine=engine: engine.generate("abcd", Mixture.base(), free))
        assert len(answer.tokens) == 60 and answer.finish_reason == "length"
        with pytest.raises(ContextExceeded, match="cache of 64 tokens"):
            run(lambda engine=engine: engine.generate("x" * 64, Mixture.base(), free))
    offline = OfflineEngine(model)
    assert len(run(lambda: offline.generate("x" * 500, Mixture.base(), free)).tokens) == 12


def test_a_cache_too_small_for_all_serves_all_in_turn(model: Model) -> None:
    """Requests that find no page wait or are computed again; their answers stay the same."""
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    expected: list[Completion] = []
    for kv_tokens in (4096, 160):
        for engine in started(model, EngineConfig(kv_tokens=kv_tokens, batch_tokens=64, batch_rows=16)):

            async def load(engine: OnlineEngine = engine) -> list[Completion]:
                done = await asyncio.gather(
                    *(engine.generate(user(f"p{i}"), MIXTURES[i % 5], sampling) for i in range(12))
                )
                await idle(engine)
                return list(done)

            answers = run(load)
            expected = expected or answers
            assert [a.token_ids for a in answers] == [e.token_ids for e in expected]


def test_what_waits_fails_when_the_engine_stops(model: Model) -> None:
    engine = OnlineEngine(model, EngineConfig(kv_tokens=1024, batch_tokens=64, batch_rows=4))
    engine.start()

    async def stop() -> None:
        calls = [engine.generate(user("x"), m, SamplingParams(max_tokens=200, ignore_eos=True)) for m in MIXTURES]
        tasks = [asyncio.create_task(call) for call in calls]
        while not engine.stats.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.stop)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, GenerationError) for result in results)
        with pytest.raises(GenerationError, match="stopped"):
            await engine.generate(user("x"), MIXTURES[0], SamplingParams(max_tokens=1))

    run(stop)


# ------------------------------------------------------------------------------------------------------ folds, experts


def test_one_mixture_alone_is_folded_once_and_alternating_mixtures_never(engine: OnlineEngine) -> None:
    svf = engine.model.adapter
    engine.set_experts({"math": random_z(svf.size, 7), "code": random_z(svf.size, 8)})
    need, sampling = svf.tokens_to_fold(), SamplingParams(max_tokens=64, ignore_eos=True)

    async def alone() -> tuple[Completion, Completion]:
        first = await engine.generate(user("fold me"), MIXTURES[0], sampling)
        for _ in range(need // 64 + 1):
            await engine.generate(user("fold me"), MIXTURES[0], sampling)
        return first, await engine.generate(user("fold me"), MIXTURES[0], sampling)

    factored, folded = run(alone)
    assert engine.stats.folds == 1 and svf.is_folded(svf.mix(MIXTURES[0]))
    assert factored.token_ids == folded.token_ids

    async def alternating() -> None:
        for i in range(8):
            await engine.generate(user("hop"), MIXTURES[1 + i % 2], SamplingParams(max_tokens=4, ignore_eos=True))

    run(alternating)
    assert engine.stats.folds == 1


def test_a_request_keeps_the_expert_that_it_began_with(engine: OnlineEngine) -> None:
    sampling = SamplingParams(max_tokens=120, ignore_eos=True)

    async def replace_meanwhile() -> tuple[Completion, Completion, Completion]:
        before = await engine.generate(user("keep"), MIXTURES[0], sampling)
        task = asyncio.create_task(engine.generate(user("keep"), MIXTURES[0], sampling))
        while not engine.stats.running:
            await asyncio.sleep(0)
        engine.set_experts({"math": random_z(engine.model.adapter.size, 99)})
        after = await engine.generate(user("keep"), MIXTURES[0], sampling)
        return before, await task, after

    before, kept, after = run(replace_meanwhile)
    assert before.token_ids == kept.token_ids != after.token_ids


def test_experts_can_be_replaced_and_scored_under_load(engine: OnlineEngine) -> None:
    """Everything that touches the model goes through its loop: a load with folds, scorings and new experts is exact."""
    bank: dict[str, Tensor] = dict(engine.model.adapter.bank)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)

    async def load() -> None:
        expected = {m: await engine.generate(user("steady"), m, sampling) for m in MIXTURES}
        for turn in range(6):
            engine.set_experts({**bank, f"new-{turn}": random_z(engine.model.adapter.size, turn)})
            answers, scores = await asyncio.gather(
                asyncio.gather(*(engine.generate(user("steady"), m, sampling) for m in MIXTURES)),
                engine.score(user("steady"), ("a", "b"), MIXTURES[turn % 5]),
            )
            assert len(scores) == 2
            for mixture, answer in zip(MIXTURES, answers, strict=True):
                assert answer.token_ids == expected[mixture].token_ids

    run(load)


def test_mixtures_that_nobody_asks_for_any_more_are_let_go(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    mix = model.adapter.mix

    def noted(mixture: Mixture) -> Tensor:
        z_K = mix(mixture)
        made.append(weakref.ref(z_K))
        return z_K

    monkeypatch.setattr(model.adapter, "mix", noted)
    again = Mixture.parse("math:0.5")
    with contextmanager(started)(model, EngineConfig(kv_tokens=2048, batch_rows=4)) as engine:

        async def ask() -> None:
            for i in range(20):
                for mixture in (Mixture.parse(f"math:{i + 1},code:0.5"), again):
                    await engine.generate(user("a"), mixture, SamplingParams(max_tokens=2))

        run(ask)
        gc.collect()
        assert len(made) == 21  # the one that is asked for again and again was made once
        assert sum(z() is not None for z in made) <= 4 + 1  # and one that the loop was bound to last


# ------------------------------------------------------------------------------------------------------------- prefixes

LONG = " ".join(f"{i} plus {i}" for i in range(12))  # of many pages


def counting(engine: OnlineEngine) -> list[int]:
    """The tokens of every step from now on."""
    bound, steps = engine._loop.bound, list[int]()

    def counted(requests: list[tuple[str, int]]) -> Any:
        steps.append(sum(length for _, length in requests))
        return bound(requests)

    engine._loop.bound = counted  # type: ignore[method-assign]
    return steps


def test_a_conversation_goes_on_from_what_was_read_and_answers_as_if_read_anew(engine: OnlineEngine) -> None:
    steps, sampling, mixture = counting(engine), SamplingParams(max_tokens=20, ignore_eos=True), MIXTURES[2]
    static = OfflineEngine(engine.model)
    turns, known = list(user(LONG)), 0
    for turn in range(4):
        before = sum(steps)
        prompt = tuple(turns)
        done = run(lambda prompt=prompt: engine.generate(prompt, mixture, sampling))
        expected = run(lambda prompt=prompt: static.generate(prompt, mixture, sampling))
        assert done.token_ids == expected.token_ids
        torch.testing.assert_close(torch.tensor(done.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)
        read = sum(steps) - before - (sampling.max_tokens - 1)
        new = len(done.prompt_ids) - known
        assert read == new if turn == 0 else read < new + 16, (turn, read, new)  # but for a page that was not whole
        known = len(done.prompt_ids)
        turns += [Message(role="assistant", content=done.text), Message(role="user", content=f"and {turn}?")]


def test_another_mixture_or_another_version_of_an_expert_shares_no_prefix(engine: OnlineEngine) -> None:
    steps, sampling = counting(engine), SamplingParams(max_tokens=8, ignore_eos=True)

    def read(mixture: Mixture) -> int:
        before = sum(steps)
        done = run(lambda: engine.generate(user(LONG), mixture, sampling))
        expected = run(lambda: OfflineEngine(engine.model).generate(user(LONG), mixture, sampling))
        assert done.token_ids == expected.token_ids
        return sum(steps) - before - 7

    whole = [read(mixture) for mixture in MIXTURES]
    assert len(set(whole)) == 1 and whole[0] > 60
    assert all(read(mixture) <= 16 for mixture in MIXTURES)  # what is not a whole page
    engine.set_experts({"math": random_z(engine.model.adapter.size, 9)})
    assert read(MIXTURES[0]) == whole[0] and read(MIXTURES[0]) <= 16
    assert read(Mixture.base()) <= 16  # which no expert changes


def test_a_prefix_whose_keys_overflowed_is_shared_with_nobody(engine: OnlineEngine) -> None:
    engine.set_experts({"huge": torch.full((engine.model.adapter.size,), 1e30)})
    (allocator,) = engine._manager.batch_processor.cache.cache_allocators.values()
    for prompt in LONG, LONG[:40]:  # read in several steps, and in one
        with pytest.raises(ExpertError, match="overflow"):
            run(lambda prompt=prompt: engine.generate(user(prompt), Mixture.of({"huge": 1.0}), SamplingParams()))
        run(lambda: idle(engine))
        assert not allocator.ledger.hash_to_block and not engine._manager.overflowed


@given(
    st.tuples(st.integers(0, 2**44 - 1), st.lists(st.integers(0, 2**20 - 1), min_size=16, max_size=20)),
    st.tuples(st.integers(0, 2**44 - 1), st.lists(st.integers(0, 2**20 - 1), min_size=16, max_size=20)),
)
def test_salted_tokens_are_equal_for_equal_salts_and_tokens_alone(
    one: tuple[int, list[int]], other: tuple[int, list[int]]
) -> None:
    (salt, ids), (other_salt, other_ids) = one, other
    assert (salted(f"{salt}-1", ids) == salted(f"{other_salt}-2", other_ids)) == (one == other)
    assert salted(f"{salt}-1", ids) == salted(f"{salt}-9", ids)
    assert salted("0-1", ids) == ids and all(0 <= id < 2**31 for id in salted(f"{salt}-1", ids))
