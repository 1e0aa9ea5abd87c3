"""The nouns: what they refuse, that equal mixtures are equal everywhere, and that everything crosses processes."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2ray import core
from t2ray.core import Completion, ConfigError, Mixture, SamplingParams, T2RayError, Token, UnknownExpert, check_name

ERRORS = [e for _, e in inspect.getmembers(core, inspect.isclass) if issubclass(e, T2RayError)]
NOUNS = [c for _, c in inspect.getmembers(core, inspect.isclass) if dataclasses.is_dataclass(c)]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_survives_the_way_to_another_process(error: type[T2RayError]) -> None:
    """Ray pickles what a worker raises; a KeyError's quotes must not come into the message."""
    there = pickle.loads(pickle.dumps(error("unknown expert 'maths'; did you mean 'math'?")))
    assert type(there) is error
    assert str(there) == "unknown expert 'maths'; did you mean 'math'?"


def test_an_unknown_expert_is_also_the_stdlibs_kind_of_error() -> None:
    with pytest.raises(KeyError):
        raise UnknownExpert("x")


@pytest.mark.parametrize("noun", NOUNS)
def test_nouns_are_frozen_slotted_and_keyword_only(noun: type) -> None:
    assert noun.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(noun)
    assert all(field.kw_only for field in dataclasses.fields(noun))


@pytest.mark.parametrize("name", ["math", "a", "0", "math-2.1_b", "a" * 63])
def test_names_that_a_folder_may_have(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "Math", "-a", ".a", "a/b", "a b", "..", "a" * 64, "a\n", "ä"])
def test_other_names_are_refused_with_what_is_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 63 of a-z"):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("base", ()),
        ("math", (("math", (1.0,)),)),
        ("math:0.7,code:0.3", (("code", (0.3,)), ("math", (0.7,)))),
        (" math:1 , code:-0.5 ", (("code", (-0.5,)), ("math", (1.0,)))),
        ("math:0", ()),
        ("math:1e-3", (("math", (0.001,)),)),
    ],
)
def test_a_mixture_is_read_from_text(text: str, weights: object) -> None:
    assert Mixture.parse(text).weights == weights


@pytest.mark.parametrize("text", ["", "math,math", "math:x", "math:", "math:nan", "math:inf", "Math:1", "a:1:2", ","])
def test_text_that_is_no_mixture_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Mixture.parse(text)


alphas = st.one_of(st.floats(-2, 2), st.lists(st.floats(-2, 2), min_size=1, max_size=3))


@given(st.dictionaries(st.sampled_from(["math", "code", "pick"]), alphas))
def test_a_mixture_does_not_depend_on_the_order_of_its_experts(weights: dict[str, float | list[float]]) -> None:
    one, other = Mixture.of(weights), Mixture.of(dict(reversed(weights.items())))
    assert one == other and hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_mixture_shows_its_weights() -> None:
    assert str(Mixture.base()) == "base"
    assert str(Mixture.of({"math": 0.7, "code": [0.5, 0.25]})) == "code:0.5/0.25,math:0.7"
    assert Mixture.parse("math:0.7,code:0.3").names == ("code", "math")


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(bad: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        SamplingParams(**bad)  # type: ignore[arg-type]


def test_a_completion_lists_the_ids_and_logprobs_of_its_tokens_in_order() -> None:
    tokens = (Token(id=2, text="4", logprob=-0.5), Token(id=3, text="2", logprob=-0.25))
    completion = Completion(prompt_ids=(1,), tokens=tokens, text="42", finish_reason="stop", mixture=Mixture.base())
    assert completion.token_ids == (2, 3) and completion.logprobs == (-0.5, -0.25)
