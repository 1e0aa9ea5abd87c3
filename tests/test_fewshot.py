"""From labelled shots to a mixture, against models whose best weights are known."""

import asyncio

import numpy as np
import pytest

from t2ray.adapt.fewshot import fewshot
from t2ray.config.search import CEMConfig
from t2ray.core import ConfigError, Example, Mixture, SamplingParams, user
from t2ray.grades import Grade
from t2ray.testing import FakeGenerate, FakeScore

SHOTS = [Example(id=f"t/train/{i}", messages=user(f"q{i}"), row={"answer": str(i), "i": i}) for i in range(10)]
SAMPLING = SamplingParams(max_tokens=8)


async def verify(completions, rows):
    return [Grade.of(1.0 if text == row["answer"] else -1.0) for text, row in zip(completions, rows, strict=True)]


def weight(mixture, name):
    return float(np.mean(dict(mixture.weights).get(name, (0.0,))))


def needs(goal, width=0.25):
    """A model that answers question i when its weights are near enough to `goal`, the later questions nearer."""

    def answer(messages, mixture):
        i = int(messages[-1].content[1:])
        distance = max(abs(weight(mixture, name) - at) for name, at in goal.items())
        return str(i) if distance <= width * (1.2 - i / 10) else "wrong"

    return FakeGenerate(answer)


def near(goal):
    return FakeScore(lambda m, label, mixture: -sum(abs(weight(mixture, n) - at) for n, at in goal.items()))


def search(generate, score, experts=("code", "math"), shots=SHOTS, gold=lambda row: row["answer"], layers=None, **kw):
    settings = CEMConfig(**{"iterations": 8} | kw)
    return asyncio.run(
        fewshot(
            generate, score, verify, shots, experts, settings=settings, sampling=SAMPLING, gold=gold, n_layers=layers
        )  # fmt: skip
    )


def test_finds_a_mixture_that_no_single_expert_equals():
    goal = {"code": 0.2, "math": 0.7}
    result = search(needs(goal), near(goal))
    assert result.accuracy == 1.0
    assert weight(result.mixture, "math") == pytest.approx(0.7, abs=0.07)
    assert weight(result.mixture, "code") == pytest.approx(0.2, abs=0.07)


def test_a_population_is_one_batch_of_generations_and_golds_are_scored_once_each():
    generate, score = needs({"math": 0.7}), near({"math": 0.7})
    search(generate, score, iterations=1)
    assert generate.peak == 320
    assert len(generate.calls) == len(score.calls) == 320 + 5 * 10
    assert {call[1] for call in score.calls} == {(str(i),) for i in range(10)}


def test_the_first_population_holds_the_mean_the_base_and_each_expert_alone():
    generate = needs({"math": 0.7})
    search(generate, near({"math": 0.7}), iterations=1)
    first = [call[1] for call in generate.calls[:40:10]]
    assert [str(m) for m in first] == ["code:0.5,math:0.5", "base", "code:1", "math:1"]


def test_is_at_least_as_good_on_its_shots_as_the_best_single_expert():
    generate = FakeGenerate(
        lambda messages, mixture: messages[-1].content[1:] if mixture == Mixture.parse("math") else "wrong"
    )
    result = search(generate, near({"code": 0.5}))  # the likelihood points elsewhere
    assert result.mixture == Mixture.parse("math")
    assert result.accuracy == 1.0


def test_without_golds_ties_are_broken_by_the_models_own_correct_answers():
    # The fake's log-probabilities are all -0.5; a model that is always right must tie at just that.
    result = search(FakeGenerate(lambda messages, mixture: messages[-1].content[1:]), near({}), gold=None, iterations=1)
    assert (result.accuracy, result.log_likelihood) == (1.0, -0.5)


def test_a_weight_for_every_layer():
    goal = {"code": 0.0, "math": 0.8}
    result = search(needs(goal, width=0.4), near(goal), layers=4)
    assert all(len(alpha) == 4 for _, alpha in result.mixture.weights)
    assert weight(result.mixture, "math") == pytest.approx(0.8, abs=0.2)


def test_the_same_seed_gives_the_same_mixture():
    goal = {"code": 0.4, "math": 0.5}
    assert search(needs(goal), near(goal)).mixture == search(needs(goal), near(goal)).mixture


def test_ties_on_the_shots_are_settled_by_likelihood_which_generalises():
    # With three easy shots a third of the square is "perfect"; the golds' likelihood still finds the middle.
    goal = {"code": 0.1, "math": 0.6}
    result = search(needs(goal, width=0.5), near(goal), shots=SHOTS[:3])
    assert weight(result.mixture, "math") == pytest.approx(0.6, abs=0.07)
    assert weight(result.mixture, "code") == pytest.approx(0.1, abs=0.07)


def test_no_shots_or_no_experts_is_a_clear_error():
    with pytest.raises(ConfigError, match="no examples"):
        search(needs({}), near({}), shots=[])
    for experts in ((), ("math", "math")):
        with pytest.raises(ConfigError, match="each once"):
            search(needs({}), near({}), experts=experts)
