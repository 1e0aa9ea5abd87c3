"""Pass 1: which mixture a request gets, and what was asked of the model to know it."""

import asyncio
import math

import pytest

from t2ray.adapt.strategies import classify, classify_by_generation, fixed
from t2ray.core import ConfigError, ContextExceeded, Image, Message, Mixture, user
from t2ray.prompts import dispatch_prompt
from t2ray.testing import FakeGenerate, FakeScore

LABELS = ("math", "code", "others")


def by_word(messages, label, mixture):
    return 0.0 if label in messages[-1].content.rpartition("\n")[2] else -5.0


def ask(strategy, text):
    return asyncio.run(strategy(user(text)))


def test_fixed_is_the_same_for_every_request():
    strategy = fixed(Mixture.parse("math:0.7"), name="fewshot")
    assert ask(strategy, "a").mixture == ask(strategy, "b").mixture == Mixture.parse("math:0.7")
    assert ask(strategy, "a").strategy == "fewshot"
    assert ask(strategy, "a").label is None


@pytest.mark.parametrize(
    ("text", "mixture"), [("math please", "math"), ("write code", "code"), ("none of these, others", "base")]
)
def test_the_likeliest_label_becomes_the_mixture_and_others_the_base(text, mixture):
    assert ask(classify(FakeScore(by_word), LABELS, Mixture.base()), text).mixture == Mixture.parse(mixture)


def test_all_labels_are_scored_in_one_call_on_the_dispatch_prompt_with_the_classifying_mixture():
    score = FakeScore(by_word)
    messages = (Message(role="system", content="Be brief."), *user("write code"))
    dispatch = asyncio.run(classify(score, LABELS, Mixture.parse("dispatch"), name="cls")(messages))
    assert score.calls == [(dispatch_prompt(messages, LABELS), LABELS, Mixture.parse("dispatch"))]
    assert dispatch.strategy == "cls"
    assert dispatch.seconds > 0


def said(*turns):
    """A conversation of ("user", text) turns and others."""
    return tuple(Message(role=role, content=content) for role, content in turns)


FOLLOW = (("user", "math please"), ("assistant", "write code"))


@pytest.mark.parametrize(
    ("messages", "label", "read"),
    [
        (said(("user", "math please"), ("assistant", "write code")), "math", 1),
        (said(("user", "math please"), ("system", "write code")), "math", 1),
        (said(*FOLLOW, ("user", "and of 7?, others")), "math", 2),
        (said(*FOLLOW, ("user", "why? others"), ("assistant", "x"), ("user", "go on, others")), "math", 3),
        (said(*FOLLOW, ("user", "write code")), "code", 1),
        (said(*FOLLOW, ("user", "what a lovely day it is, others")), "others", 1),
        (said(("user", "hello, others")), "others", 1),
        (said(("system", "write code"), ("user", "math please")), "math", 1),
        (said(("system", "write code")), "code", 1),
    ],
)
@pytest.mark.parametrize("generated", [False, True])
def test_the_last_turn_of_the_user_decides_and_a_short_one_of_no_kind_takes_the_kind_of_the_one_before(
    messages, label, read, generated
):
    by_label = FakeGenerate(lambda m, x: next(w for w in LABELS if w in m[-1].content.rpartition("\n")[2]))
    score = FakeScore(by_word)
    if generated:
        dispatch = asyncio.run(classify_by_generation(by_label, LABELS, Mixture.base())(messages))
        assert len(by_label.calls) == read
    else:
        dispatch = asyncio.run(classify(score, LABELS, Mixture.base())(messages))
        assert len(score.calls) == read
    assert dispatch.label == label


PICTURE = Image(data=b"sums")


@pytest.mark.parametrize(
    ("content", "label", "read"),
    [
        ((PICTURE, "math please"), "math", [["math please"]]),
        ((PICTURE, "what is this, others"), "code", [["what is this, others"], [PICTURE, "what is this, others"]]),
        ((PICTURE,), "code", [[PICTURE, ""]]),
        (("what is ", PICTURE, "this, others"), "code", [["what is this, others"], [PICTURE, "what is this, others"]]),
    ],
)
def test_a_turn_is_read_with_its_pictures_where_its_words_are_of_no_kind(content, label, read):
    def by_sight(messages, label, mixture):
        return float(label == "code") if messages[-1].images else by_word(messages, label, mixture)

    score = FakeScore(by_sight)
    assert asyncio.run(classify(score, LABELS, Mixture.base())(user(content))).label == label
    asked = "Which kind of request is this: math, code, others? Answer with that one word.\n\n"
    found = [prompt[0].content for prompt, _, _ in score.calls]
    assert found == [(asked, *parts) if PICTURE in parts else asked + parts[0] for parts in read]


def test_pictures_that_exceed_the_context_are_left_out_before_the_request_is_given_up():
    calls = []

    async def score(prompt, labels, mixture):
        calls.append(prompt[0])
        if prompt[0].images:
            raise ContextExceeded("too long", 500 + len(prompt[0].text), 4, 200)
        return (0.0, -1.0, 2.0)

    dispatch = asyncio.run(classify(score, LABELS, Mixture.base())(user((PICTURE, "a lovely day, is it not?"))))
    assert dispatch.label == "others" and not calls[-1].images and calls[-1].text.endswith("a lovely day, is it not?")


def test_a_question_of_one_user_turn_is_the_one_that_the_tiny_model_was_trained_on():
    question = "Which kind of request is this: math, code, others? Answer with that one word.\n\n17+25"
    assert dispatch_prompt(user("17+25"), LABELS) == user(question)


@pytest.mark.parametrize("room", [90, 200, 1000])
def test_of_a_text_that_exceeds_the_context_the_beginning_and_the_end_are_read(room):
    calls = []

    async def score(prompt, labels, mixture):
        calls.append(prompt[0].content)
        if (size := len(calls[-1])) + 4 > room:
            raise ContextExceeded("too long", size, 4, room)
        return (0.0, -1.0, -2.0)

    dispatch = asyncio.run(classify(score, LABELS, Mixture.base())(user("begins" + "x" * 5000 + "ends")))
    assert dispatch.label == "math" and len(calls) < 30
    text = calls[-1].rpartition("\n")[2]
    assert room == 90 or (text.startswith("begins") and text.endswith("ends") and len(text) > (room - 90) / 2)


def test_labels_that_exceed_the_context_are_no_fault_of_the_text():
    async def score(prompt, labels, mixture):
        raise ContextExceeded("too long", 500, 4, 64)

    with pytest.raises(ConfigError, match="3 labels, which exceed the model's context; name an expert"):
        asyncio.run(classify(score, LABELS, Mixture.base())(user("17+25")))


def test_probabilities_are_the_softmax_of_the_scores():
    scores = dict(zip(LABELS, (math.log(6), math.log(3), math.log(1)), strict=True))
    dispatch = ask(classify(FakeScore(lambda m, label, x: scores[label]), LABELS, Mixture.base()), "?")
    assert dispatch.probabilities == pytest.approx({"math": 0.6, "code": 0.3, "others": 0.1})


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    for shift in (-1e4, 1e4):
        score = FakeScore(lambda m, label, x, shift=shift: shift + (label == "code"))
        dispatch = ask(classify(score, LABELS, Mixture.base()), "?")
        assert dispatch.label == "code"
        assert sum(dispatch.probabilities.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("math", "math"),
        (" Kind: CODE.\n", "code"),
        ("others", "others"),
        ("math or code", "others"),
        ("mathematics", "others"),
        ("math.v2", "others"),
        ("math-long", "others"),
        ("", "others"),
    ],
)
def test_a_generated_label_is_read_as_a_word_and_anything_unclear_is_others(answer, label):
    generate = FakeGenerate(lambda messages, mixture: answer)
    dispatch = ask(classify_by_generation(generate, LABELS, Mixture.base()), "17+25")
    assert dispatch.label == label
    assert dispatch.mixture == (Mixture.base() if label == "others" else Mixture.parse(label))
    assert generate.calls[0][0] == dispatch_prompt(user("17+25"), LABELS)


def test_a_label_that_begins_another_is_told_from_it():
    generate = FakeGenerate(lambda messages, mixture: "math-long")
    strategy = classify_by_generation(generate, ("math", "math-long", "others"), Mixture.base())
    assert ask(strategy, "?").label == "math-long"
