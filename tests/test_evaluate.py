"""Accuracy, intervals and the report's dictionary, on fakes whose right answers are known."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2ray.adapt.strategies import classify, fixed
from t2ray.core import ConfigError, DataError, Example, Mixture, SamplingParams, user
from t2ray.evals.answers import Baseline
from t2ray.evals.evaluate import (
    Cell,
    build_report,
    confusion,
    dispatch_counts,
    evaluate,
    methods,
    oracle_choice,
    targets,
)
from t2ray.evals.intervals import wilson
from t2ray.evals.measured import result_of, table
from t2ray.grades import Grade
from t2ray.testing import FakeGenerate, FakeScore

EXAMPLES = [Example(id=f"math/test/{i}", messages=user(f"math {i}"), row={"answer": str(i)}) for i in range(10)]
SAMPLING = SamplingParams(max_tokens=8)
LABELS = ("math", "code", "others")


async def verify(completions, rows):
    return [Grade.of(1.0 if text == row["answer"] else -1.0) for text, row in zip(completions, rows, strict=True)]


def expert_only(messages, mixture):
    return messages[-1].content.split()[-1] if mixture == Mixture.parse("math") else "?"


def run(strategy, generate=None, examples=EXAMPLES, **options):
    generate = generate or FakeGenerate(expert_only)
    return asyncio.run(evaluate("math", examples, strategy, generate, verify, SAMPLING, **options))


def cell(right, n=10, **fields):
    return Cell(task="t", correct=(True,) * right + (False,) * (n - right), **fields)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(8, 10, 0.4901, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (450, 500, 0.8705, 0.9234), (0, 0, 0, 1)],
)
def test_wilson_gives_the_published_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_lies_in_the_unit_interval_and_mirrors(kn):
    k, n = kn
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12
    assert k / n - 1e-12 <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_the_mixture_of_pass_1_answers_in_pass_2():
    score = FakeScore(lambda m, label, mixture: 0.0 if label in m[-1].content.rpartition("\n")[2] else -5.0)
    right = run(classify(score, LABELS, Mixture.base()))
    assert (right.acc, right.n, right.labels) == (1.0, 10, {"math": 10})
    wrong = run(fixed(Mixture.base()))
    assert (wrong.acc, wrong.labels) == (0.0, {})


@pytest.mark.parametrize(("batch_tokens", "rows"), [(1, 1), (10, 1), (30, 3), (39, 3), (100, 10), (10_000, 10)])
def test_the_tokens_of_a_batch_change_its_rows_and_nothing_else(batch_tokens, rows):
    """A prompt of 6 characters counts as 2 tokens, and its answer as 8."""
    generate, seen = FakeGenerate(expert_only), []
    result = run(fixed(Mixture.parse("math")), generate, batch_tokens=batch_tokens, progress=seen.append)
    assert generate.peak == rows
    assert result.correct == (True,) * 10
    assert seen == [0, *range(rows, 10, rows), 10]


def test_long_prompts_share_no_batch_with_many_short_ones():
    lengths = [3, 3000, 3, 30, 3000, 3]
    examples = [
        Example(id=str(i), messages=user("x" * n + f" {i}"), row={"answer": str(i)}) for i, n in enumerate(lengths)
    ]
    generate, seen = FakeGenerate(expert_only), []
    result = run(fixed(Mixture.parse("math")), generate, examples, batch_tokens=2100, progress=seen.append)
    assert seen == [0, 2, 6] and generate.peak == 4
    assert result.correct == (True,) * 6
    asked = [len(messages[-1].content) for messages, *_ in generate.calls]
    assert asked == sorted(asked, reverse=True)


def test_what_does_not_fit_is_wrong_and_counted_and_never_asked():
    generate = FakeGenerate(expert_only)
    result = run(fixed(Mixture.parse("math")), generate, fits=lambda m: m != EXAMPLES[3].messages)
    assert result.correct == tuple(i != 3 for i in range(10))
    assert (result.too_long, len(generate.calls)) == (1, 9)


def test_an_abstained_answer_is_neither_right_nor_wrong_and_is_told():
    async def judge(completions, rows):
        numbers = [int(row["answer"]) for row in rows]
        return [Grade.of(None if n < 4 else 1.0 if n < 9 else -1.0) for n in numbers]

    def measured(verify, examples=EXAMPLES):
        job = evaluate("math", examples, fixed(Mixture.base()), FakeGenerate(expert_only), verify, SAMPLING)
        return asyncio.run(job)

    some, none = measured(judge), measured(judge, EXAMPLES[:4])
    assert some.correct == (None,) * 4 + (True,) * 5 + (False,)
    assert (some.acc, some.n, some.ci95) == (5 / 6, 6, wilson(5, 6))
    assert none.row() == {"acc": None, "n": 0, "ci95": [0.0, 1.0]}
    results = {
        name: result_of("math", ["base"], {"base": cell}, Baseline(), [], 8, unseen=True)
        for name, cell in {"some": some, "none": none}.items()
    }
    head, *lines = table(results, ["base"]).splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["(44-97)", "-"]
    assert lines[2:] == [
        "some base: 4 of 10 answers count nowhere: the verifier abstained from them",
        "none base: 4 of 4 answers count nowhere: the verifier abstained from them",
    ]
    assert oracle_choice({"base": none, "math": some}) == "math"


def test_a_conversation_that_the_model_refuses_is_named():
    def fits(messages):
        if messages == EXAMPLES[3].messages:
            raise ConfigError("no such role")
        return True

    with pytest.raises(ConfigError, match="^math/test/3: no such role$"):
        run(fixed(Mixture.base()), fits=fits)


def test_truncated_answers_are_counted():
    result = run(fixed(Mixture.base()), FakeGenerate(lambda m, mixture: "far too long an answer"))
    assert (result.truncated, result.acc) == (10, 0.0)


def test_no_examples_is_a_clear_error():
    with pytest.raises(DataError, match="'math' has no examples"):
        run(fixed(Mixture.base()), examples=[])


def test_the_oracle_is_the_best_single_mixture_and_the_base_is_one_of_them():
    row = methods({"base": cell(3), "math": cell(2), "code": cell(1)}, "math", {"cls": cell(9)})
    assert {name: c.acc for name, c in row.items()} == {"base": 0.3, "expert": 0.2, "oracle": 0.3, "cls": 0.9}


def test_a_table_of_what_was_run_and_nothing_else():
    assert list(methods({}, None, {"prompt": cell(1)})) == ["prompt"]
    assert list(methods({"base": cell(1)}, None, {})) == ["base"]


def test_confusion_has_every_label_in_order():
    assert confusion({"math": {"code": 1}}, LABELS) == {"math": {"math": 0, "code": 1, "others": 0}}
    assert list(confusion({"math": {"code": 1}}, LABELS)["math"]) == list(LABELS)


def test_prompts_without_a_task_are_counted_by_label():
    score = FakeScore(lambda m, label, mixture: float(label == "others"))
    assert asyncio.run(dispatch_counts(EXAMPLES, classify(score, LABELS, Mixture.base()))) == {"others": 10}


def report(**change):
    from collections import Counter

    fields = {
        "trained": ["math"],
        "own": {"math": "math", "math_long": "math"},
        "singles": {
            "math": {"base": cell(1), "math": cell(9), "code": cell(0)},
            "math_long": {"base": cell(2), "math": cell(6), "code": cell(7)},
        },
        "adaptive": {
            "math": {"cls": cell(9, labels=Counter(math=9, others=1)), "fewshot": cell(9)},
            "math_long": {"cls": cell(6, labels=Counter(math=10)), "fewshot": cell(8)},
        },
        "labels": LABELS,
        "others": {"cls": {"others": 5}},
        "classifier": {},
        "mixtures": {"math_long": Mixture.of({"math": 0.7}), "math": Mixture.of({"math": [0.5, 1.0]})},
        "experts": ["math", "code"],
        "timing_s": {"decompose": 1.0, "train": 2.0, "adapt": 3.0, "evaluate": 4.0, "total": 10.0},
        "pass1_share": 0.08,
        "seed": 7,
        "machine": "2 cores",
    }
    return build_report(**fields | change)


def test_the_report_has_the_promised_keys_and_is_json():
    made = json.loads(json.dumps(report(), allow_nan=False))
    assert made["tables"]["trained"]["math"]["expert"] == {"acc": 0.9, "n": 10, "ci95": list(wilson(9, 10))}
    assert set(made["tables"]["unseen"]["math_long"]) == {"base", "expert", "oracle", "cls", "fewshot"}
    assert made["choices"]["math_long"] == {"expert": "math", "oracle": "code"}
    assert made["mixtures"] == {"math_long": {"math": 0.7, "code": 0.0}, "math": {"math": [0.5, 1.0], "code": 0.0}}
    assert made["confusion"]["cls"]["others"] == {"math": 0, "code": 0, "others": 5}
    assert made["timing_s"]["total"] == 10.0
    assert (made["pass1_share"], made["seed"], made["machine"]) == (0.08, 7, "2 cores")


def test_targets_say_what_was_reached_and_what_was_not():
    reached = {row["name"].partition(",")[0]: row["met"] for row in report()["targets"]}
    assert reached == {
        "math: accuracy of its expert": True,
        "math: its expert above the base": True,
        "trained tasks: the better of prompt and cls over oracle": True,
        "unseen tasks: the smallest gain of fewshot over base": True,
        "unseen tasks: mean of fewshot against that of the best expert": True,
        "pass 1 as a share of pass 2 at 64 new tokens": True,
    }
    weak = report(pass1_share=0.2, adaptive={"math": {}, "math_long": {"fewshot": cell(2)}})
    assert [row["met"] for row in weak["targets"]] == [True, True, False, False, False]


def test_a_difference_of_exactly_the_target_meets_it():
    made = report(singles={"math": {"base": cell(11, 20), "math": cell(19, 20)}}, adaptive={})
    assert [row["met"] for row in targets(made)] == [True, True, True]


def test_the_classification_expert_is_held_to_the_targets_too() -> None:
    made = report(classifier={"base": cell(1), "expert": cell(7)})
    assert made["classifier"]["expert"]["acc"] == 0.7
    missed = {t["name"]: t["met"] for t in made["targets"] if t["name"].startswith("dispatch")}
    assert missed == {
        "dispatch: accuracy of its expert, at least": False,
        "dispatch: its expert above the base, at least": True,
    }


def test_strategies_are_compared_with_the_one_that_is_named_where_both_were_graded():
    cells = {
        "cls": Cell(task="math", correct=(True, True, False, None)),
        "soft": Cell(task="math", correct=(True, False, False, True)),
    }
    result = result_of("math", ["cls", "soft"], cells, Baseline(), [], 8, unseen=True, against="cls")
    assert [*result["differences"]] == ["soft"]
    gain = result["differences"]["soft"]
    assert (gain["gain"], gain["p"]) == (pytest.approx(-1 / 3), 1.0)  # of three examples one differs
    assert "math soft: -33.3 points" in table({"math": result}, ["cls", "soft"])
    alone = result_of("math", ["cls", "soft"], cells, Baseline(), [], 8, unseen=True)
    assert not alone["differences"] and "points" not in table({"math": alone}, ["cls", "soft"])
