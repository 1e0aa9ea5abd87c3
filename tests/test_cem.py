"""The search over mixing weights: what it finds, how it breaks ties, what it may spend."""

import asyncio

import numpy as np
import pytest
from pydantic import ValidationError

from t2ray.adapt.cem import Fitness, cem
from t2ray.config.search import CEMConfig
from t2ray.core import ConfigError

START = np.array([[0.33, 0.33, 0.33]])


def run(objective, seeds=START, prompts_per_member=1, progress=None, **settings):
    async def evaluated(alphas):
        return objective(alphas)

    return asyncio.run(
        cem(evaluated, seeds, CEMConfig(**settings), prompts_per_member=prompts_per_member, progress=progress)
    )


def bowl(alphas):
    """Best at (0.7, 0, 0.2)."""
    return [Fitness(0.0, -float(((a - [0.7, 0.0, 0.2]) ** 2).sum())) for a in alphas]


def test_finds_the_optimum():
    np.testing.assert_allclose(run(bowl).alpha, [0.7, 0.0, 0.2], atol=0.03)


def test_finds_the_optimum_of_a_weight_per_expert_and_layer():
    goal = np.tile([0.8, 0.1], 6)
    result = run(lambda alphas: [Fitness(0.0, -float(((a - goal) ** 2).sum())) for a in alphas], np.full((1, 12), 0.5))
    np.testing.assert_allclose(result.alpha, goal, atol=0.15)


def test_the_same_seed_gives_the_same_search_and_another_seed_another():
    same, again, other = (run(bowl, iterations=4, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(same.alpha, again.alpha)
    assert [r.mean for r in same.history] == [r.mean for r in again.history]
    assert not np.array_equal(same.alpha, other.alpha)


def test_every_round_is_one_call_of_the_whole_population_and_the_last_one_compares_the_finalists():
    sizes = []
    run(lambda alphas: sizes.append(len(alphas)) or bowl(alphas), iterations=5)
    assert sizes == [32] * 5 + [5]


def test_the_prompts_of_a_search_are_those_of_every_member_that_was_evaluated():
    sizes = []
    found = run(lambda alphas: sizes.append(len(alphas)) or bowl(alphas), prompts_per_member=3, iterations=2)
    assert found.prompts == 3 * sum(sizes) > found.history[-1].prompts


def test_elites_of_equal_accuracy_are_chosen_by_log_likelihood():
    # All members are equally accurate: with accuracy alone, the elites would be the first members drawn and the mean
    # would stay where it began.
    result = run(lambda alphas: [Fitness(0.5, float(a[0])) for a in alphas], iterations=1)
    assert result.history[0].mean[0] > 0.6


def test_accuracy_comes_before_log_likelihood():
    result = run(lambda alphas: [Fitness(float(a[0] > 0.6), -100.0 * a[0]) for a in alphas], iterations=10)
    assert result.fitness.accuracy == 1.0
    assert 0.6 < result.alpha[0] < 0.65


def test_is_never_worse_than_a_seed():
    # A needle that no draw can hit.
    seeds = np.vstack([START, [[0.0, 1.0, 0.0]]])
    result = run(lambda alphas: [Fitness(float((a == [0, 1, 0]).all()), 0.0) for a in alphas], seeds, iterations=6)
    assert result.alpha.tolist() == [0.0, 1.0, 0.0]


def test_the_best_member_of_a_round_is_evaluated_again_in_the_next():
    populations = []

    def objective(alphas):
        populations.append(alphas)
        return bowl(alphas)

    run(objective, iterations=3)
    for before, after in zip(populations, populations[1:], strict=False):
        best = max(range(len(before)), key=bowl(before).__getitem__)
        assert (after == before[best]).all(axis=1).any()


def test_a_lucky_draw_does_not_win():
    calls = []

    def objective(alphas):  # the first evaluation of one bad member says 1.0; the truth is 0
        calls.append(1)
        return [Fitness(1.0 if len(calls) == 1 and i == 7 else float(a[0]), 0.0) for i, a in enumerate(alphas)]

    result = run(objective, iterations=6)
    assert result.fitness.accuracy == result.alpha[0] > 0.8


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, 0.5), (0.2, 0.4)])
def test_members_stay_within_the_bounds(low, high):
    seen = []
    run(lambda alphas: seen.append(alphas) or bowl(alphas), low=low, high=high, iterations=4, sigma=2.0)
    assert np.concatenate(seen).min() >= low
    assert np.concatenate(seen).max() <= high


def test_the_budget_in_prompts_is_never_exceeded():
    for budget in (370, 371, 700, 1000):
        spent = []
        run(lambda alphas, spent=spent: spent.append(len(alphas) * 10) or bowl(alphas), prompts_per_member=10,
            budget_prompts=budget)  # fmt: skip
        assert budget - 330 < sum(spent) <= budget


def test_a_budget_below_one_population_is_refused_with_what_it_takes():
    with pytest.raises(ConfigError, match="budget_prompts is 100; a population of 32 on 10 prompts needs 370"):
        run(bowl, prompts_per_member=10, budget_prompts=100)


def test_a_spent_time_budget_ends_the_search_after_the_round():
    assert len(run(bowl, budget_s=1e-9).history) == 1


def test_ends_early_when_nothing_is_left_to_search():
    rounds = []
    result = run(bowl, iterations=1000, progress=rounds.append)
    assert len(result.history) < 100
    assert tuple(rounds) == result.history


@pytest.mark.parametrize(
    "wrong", [{"population": 1}, {"elite": 0.0}, {"low": 1.0}, {"sigma": -1}, {"budget": 3}, {"iterations": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        CEMConfig(**wrong)
