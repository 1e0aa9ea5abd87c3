"""Rollouts: everything random is a function of (seed, step); order, seeds and rewards reach the right rows."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from t2ray.core import Example, Mixture, RewardError, SamplingParams, user
from t2ray.grades import Grade
from t2ray.testing import FakeGenerate
from t2ray.training.rollout import prompts_of_step, roll_out, rollout_seed

EXAMPLES = [Example(id=f"t/train/{i}", messages=user(f"prompt {i}"), row={"i": i}) for i in range(10)]


def test_each_epoch_takes_every_prompt_once_in_an_order_of_its_own() -> None:
    taken = [e.id for step in range(1, 11) for e in prompts_of_step(EXAMPLES, 4, step, seed=0)]
    epochs = [taken[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(e.id for e in EXAMPLES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_may_take_more_prompts_than_there_are() -> None:
    counts = Counter(e.id for e in prompts_of_step(EXAMPLES[:3], 7, 1, seed=0))
    assert sorted(counts.values()) == [2, 2, 3]


def test_the_prompts_of_a_step_depend_on_the_seed_and_on_nothing_before() -> None:
    once = prompts_of_step(EXAMPLES, 4, 6, seed=1)
    assert prompts_of_step(EXAMPLES, 4, 6, seed=1) == once
    assert prompts_of_step(EXAMPLES, 4, 6, seed=2) != once


def test_seeds_are_the_same_in_every_process_and_differ_in_every_place() -> None:
    places = [
        (seed, step, prompt, sample) for seed in (0, 1) for step in (1, 2) for prompt in (0, 11) for sample in (0, 1)
    ]
    seeds = [rollout_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    code = "from t2ray.training.rollout import rollout_seed; print(rollout_seed(1, 2, 11, 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(other) == rollout_seed(1, 2, 11, 1)


def test_rollouts_stand_prompt_by_prompt_each_with_its_seed_and_reward() -> None:
    generate = FakeGenerate(lambda messages, mixture: messages[-1].content.upper())
    graded: list[tuple[str, Any]] = []

    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        graded.extend(zip(completions, rows, strict=True))
        return [Grade.of(row["i"] / 10) for row in rows]

    mixture, sampling = Mixture.parse("math"), SamplingParams(max_tokens=40, temperature=0.5)
    rollouts = asyncio.run(roll_out(generate, verify, EXAMPLES[:2], mixture, sampling, [[5, 6], [7, 8]]))
    assert [r.example.id for r in rollouts] == ["t/train/0", "t/train/0", "t/train/1", "t/train/1"]
    assert [r.completion.text for r in rollouts] == ["PROMPT 0", "PROMPT 0", "PROMPT 1", "PROMPT 1"]
    assert [r.reward for r in rollouts] == [0.0, 0.0, 0.1, 0.1]
    assert graded == [(r.completion.text, r.example.row) for r in rollouts]
    assert [call[2].seed for call in generate.calls] == [5, 6, 7, 8]
    assert all(call[1] == mixture and call[2].temperature == 0.5 for call in generate.calls)
    assert generate.peak == 4  # one batch


def test_no_prompts_are_no_rollouts() -> None:
    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        return [Grade.of(0.0)] * len(completions)

    assert asyncio.run(roll_out(FakeGenerate({}), verify, [], Mixture.base(), SamplingParams(), [])) == []


def test_a_verifier_that_fails_is_never_a_reward_of_zero() -> None:
    async def verify(completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[Grade]:
        raise RewardError("the reward function 'm:f' raised")

    generate = FakeGenerate(lambda messages, mixture: "x")
    with pytest.raises(RewardError, match="m:f"):
        asyncio.run(roll_out(generate, verify, EXAMPLES[:1], Mixture.base(), SamplingParams(), [[0]]))
