"""`t2ray.open`: a model as a plain object answers as its engine does, alone, together, and where an event loop runs."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import t2ray
from t2ray.adaptive import AdaptiveModel, conversation
from t2ray.core import ConfigError, Message, Mixture, SamplingParams, UnknownExpert, user
from t2ray.experts.registry import SHIPPED, Registry


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdaptiveModel]:
    """The shipped tiny model with its experts, opened in an empty folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        with t2ray.open() as model:
            yield model


PAIRS = [("17+25", "math"), ("add 3 to n", "code"), ("17+25", "math:0.7,code:0.3"), ("17+25", "base")]


def test_the_model_finds_out_which_experts_a_prompt_needs(model: AdaptiveModel) -> None:
    answer = model.answer("17+25")
    assert (answer.text, str(answer.mixture)) == ("42", "math:1")
    dispatch = model.dispatch("17+25")
    assert dispatch.strategy == "cls" and dispatch.label == "math" and dispatch.probabilities["math"] > 0.9
    assert model.strategy == "cls" and set(model.experts) == {"math", "code", "pick"}


def test_prompts_that_are_asked_together_get_the_answers_that_they_get_alone(model: AdaptiveModel) -> None:
    together = model.answers(PAIRS)
    alone = [model.answer(prompt, mixture) for prompt, mixture in PAIRS]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [str(a.mixture) for a in together] == ["math:1", "code:1", "code:0.3,math:0.7", "base"]


def test_a_fifth_expert_changes_no_bit_of_what_the_four_answer_and_is_chosen_and_searched_too(
    model: AdaptiveModel, tmp_path: Path
) -> None:
    registry = Registry(shutil.copytree(SHIPPED, tmp_path / "experts"))
    math = registry.load("math")
    z = {name: z_r + 0.01 for name, z_r in math.z.items()}
    registry.save("sums", z, base_digest=math.manifest.base_digest)
    with t2ray.open(model="tiny", factors=tmp_path / "factors", experts=tmp_path / "experts") as five:
        for prompt, mixture in [*PAIRS, ("17+25", "cls"), ("17+25", "dispatch"), ("17+25", "fewshot/math")]:
            assert five.answer(prompt, mixture) == model.answer(prompt, mixture)  # every log-probability alike
        assert five.answer("17+25", "sums") != model.answer("17+25", "math")
        assert five.bench.dispatch_labels("cls") == model.bench.dispatch_labels("cls")
        asked = {*five.bench.dispatch_labels("prompt")} - {*model.bench.dispatch_labels("prompt")}
        assert asked == {"sums"} and five.bench.dispatch_labels("prompt")[-1] == "others"
        assert set(five.experts) == {*model.experts, "sums"}  # of which a search mixes all


def test_prompts_that_are_asked_together_share_one_batch(model: AdaptiveModel) -> None:
    steps = model.bench.engine.stats.steps
    model.answers(PAIRS)
    stats = model.bench.engine.stats
    assert (stats.steps - steps, stats.rows, stats.mixtures) == (1, 4, 4)


def test_a_mixture_is_named_in_every_form_alike(model: AdaptiveModel) -> None:
    forms = ["math:0.7,code:0.3", {"math": 0.7, "code": 0.3}, Mixture.of({"math": 0.7, "code": 0.3})]
    assert len({model.answer("17+25", form) for form in forms}) == 1
    assert model.answer("17+25", Mixture.base()) == model.answer("17+25", "base")


def test_a_conversation_is_given_in_every_form_alike(model: AdaptiveModel) -> None:
    forms = ["17+25", Message(role="user", content="17+25"), user("17+25"), [{"role": "user", "content": "17+25"}]]
    assert len({model.answer(form, "math") for form in forms}) == 1
    two = (Message(role="user", content="hello"), Message(role="user", content="17+25"))
    assert model.answers([two])[0].prompt_ids == model.answer(two).prompt_ids  # no prompt with a mixture


def test_the_twins_to_await_answer_alike_in_a_loop_that_runs(model: AdaptiveModel) -> None:
    """As in a notebook's cell, where the plain methods must work, too."""

    async def cell() -> None:
        first, second = await asyncio.gather(
            model.answer_async("17+25", "math"), model.answers_async(PAIRS, max_tokens=8)
        )
        assert first.token_ids == model.answer("17+25", "math").token_ids
        assert [a.text for a in second] == [a.text for a in model.answers(PAIRS, max_tokens=8)]
        assert (await model.dispatch_async("17+25")).label == "math"

    asyncio.run(cell())


def test_a_seed_makes_a_sampled_answer_the_same_again(model: AdaptiveModel) -> None:
    hot = [model.answer("say something", "base", temperature=20.0, seed=seed).token_ids for seed in (1, 1, 2, 3, 4)]
    assert hot[0] == hot[1] and len(set(hot)) > 1


@pytest.mark.parametrize(
    ("mistake", "error", "text"),
    [
        (lambda m: m.answer("x", "mth"), UnknownExpert, "did you mean 'math'"),
        (lambda m: m.answer("x", {"mth": 1.0}), UnknownExpert, "unknown expert 'mth'"),
        (lambda m: m.answer("x", Mixture.of({"mth": 1.0})), UnknownExpert, "unknown expert 'mth'"),
        (lambda m: m.answer("x", "math:much"), ConfigError, "'much' is not a number"),
        (lambda m: m.answer("x", max_token=3), ConfigError, "unknown setting 'max_token'.*did you mean 'max_tokens'"),
        (lambda m: m.answer("x", temperature=-1.0), ConfigError, "temperature is -1.0"),
        (lambda m: m.answer("x", max_tokens=100_000), ConfigError, "exceed the model's context"),
        (lambda m: m.answer([{"role": "robot", "content": "x"}]), ConfigError, "'robot'.* is no message"),
        (lambda m: m.answer([7]), ConfigError, "7 is no message"),
    ],
)
def test_a_mistake_is_told_and_the_model_still_answers(
    model: AdaptiveModel, mistake: object, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        mistake(model)  # type: ignore[operator]
    assert model.answer("17+25", "math").text == "42"


def test_a_closed_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = t2ray.open(model="tiny")
    model.close()
    model.close()
    with pytest.raises(ConfigError, match="was closed"):
        model.answer("17+25")


def test_a_run_and_a_model_are_not_opened_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="brings its own model"):
        t2ray.open("runs/demo", model="tiny")
    with pytest.raises(t2ray.RunError, match="no run in nowhere"):
        t2ray.open("nowhere")


def test_every_public_name_is_there_and_importing_them_loads_no_heavy_library() -> None:
    code = (
        "import sys, t2ray\nassert all(getattr(t2ray, name) for name in t2ray.__all__)\n"
        "print({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "set()", done.stderr + done.stdout


def test_sampling_is_by_the_names_of_its_fields(model: AdaptiveModel) -> None:
    answer = model.answer("17+25", "math", max_tokens=1)
    assert len(answer.tokens) == 1 and answer.finish_reason == "length"
    assert SamplingParams().max_tokens == 64
    assert conversation("x") == user("x")


SUMS = [(f"{a}+{b}", str(a + b)) for a, b in ((17, 25), (3, 4), (20, 19), (8, 8))]


def test_a_search_finds_the_expert_of_a_few_labelled_prompts(model: AdaptiveModel) -> None:
    found = model.adapt(SUMS, population=6, iterations=2, max_tokens=12)
    assert found.accuracy == 1.0 and dict(found.mixture.weights)["math"][0] > 0
    assert model.answer("31+14", found.mixture).text == "45"
    again = asyncio.run(model.adapt_async(SUMS, population=6, iterations=2, max_tokens=12))
    assert again.mixture == found.mixture


def test_a_search_by_a_reward_of_ones_own_and_by_chosen_experts_is_saved_by_name(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "experts")
    with t2ray.open(model="tiny", factors=tmp_path / "factors", experts=tmp_path / "experts") as model:
        found = model.adapt(
            [("add 3 to n", "return n+3")], name="wordy", experts=["code"],
            reward=lambda text, row: 1.0 if "return" in text else -1.0, population=4, iterations=1, max_tokens=12,
        )  # fmt: skip
        assert found.mixture.names == ("code",) and found.accuracy == 1.0
        assert model.answer("add 3 to n", "fewshot/wordy") == model.answer("add 3 to n", found.mixture)
    with t2ray.open(model="tiny", factors=tmp_path / "factors", experts=tmp_path / "experts") as model:
        assert "return" in model.answer("add 3 to n", "fewshot/wordy").text


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"populaton": 3}, ConfigError, "unknown key 'populaton'.*did you mean 'population'"),
        ({"experts": ["mth"]}, UnknownExpert, "no expert 'mth'; did you mean 'math'"),
        ({"name": "Not A Name"}, ConfigError, "cannot be this mixture's name"),
        ({"examples": []}, ConfigError, "no examples"),
    ],
)
def test_a_mistaken_search_is_told(
    model: AdaptiveModel, options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        model.adapt(**({"examples": SUMS} | options))  # type: ignore[arg-type]
