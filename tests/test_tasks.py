"""The tasks: golds score +1, everything else -1, and no row of one split is in another."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import needs
import pytest
from waiting import GUARD_S

from t2ray.core import ConfigError, DataError, user
from t2ray.tasks import BUILTIN, arc, builtin, gsm8k, mbpp, tiny
from t2ray.tasks.dispatch import dispatch
from t2ray.tasks.task import Task
from t2ray.tasks.verifier import Verifier, verify

FILES = {
    "gsm8k": ("gsm8k/train.jsonl", 7473),
    "arc_easy": ("arc/easy-train.jsonl", 2251),
    "arc_challenge": ("arc/challenge-train.jsonl", 1119),
    "mbpp": ("mbpp/mbpp.jsonl", 974),
}


def rewards_of(check: Verifier, completions: list[str], rows: Any) -> list[float | None]:
    return [grade.reward for grade in asyncio.run(check(completions, rows))]


def real(name: str) -> Task:
    return builtin(name, str(needs.real(f"data/{FILES[name][0]}")))


# -------------------------------------------------------------------------------------------------------------- by name


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown task 'gsm8'; did you mean 'gsm8k'"):
        builtin("gsm8")
    with pytest.raises(ConfigError, match="unknown task 'zzz'; there are math, "):
        builtin("zzz")


def test_the_built_in_names_are_those_of_the_tasks_modules() -> None:
    assert {*BUILTIN} - {*tiny.TASKS} >= {"gsm8k", "arc_easy", "arc_challenge", "mbpp"} and {*tiny.TASKS} < {*BUILTIN}


@pytest.mark.parametrize("name", tiny.TASKS)
def test_tiny_tasks_grade_their_golds_and_nothing_else(name: str) -> None:
    task = builtin(name)
    examples = task.examples("test", 50)
    assert task.gold is not None
    golds = [task.gold(example.row) for example in examples]
    rows = [example.row for example in examples]
    prompts = [example.messages[-1].content for example in examples]
    with Verifier(task.reward, workers=0) as check:
        assert rewards_of(check, golds, rows) == [1.0] * 50
        for wrong in ([""] * 50, prompts, [gold[:-1] for gold in golds], [f"{gold} {gold}" for gold in golds]):
            assert rewards_of(check, wrong, rows) == [-1.0] * 50
    assert len(task.rows("all")) == sum(len(task.rows(split)) for split in ("train", "validation", "test"))


def test_a_tiny_task_takes_no_file_and_a_split_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"'math' makes its own rows and takes no data file; leave out 'x.jsonl'"):
        builtin("math", "x.jsonl")
    with pytest.raises(ConfigError, match="no split 'dev'; a task has train, validation, test, all"):
        builtin("math").examples("dev")


@pytest.mark.parametrize("name", FILES)
def test_a_bad_local_file_is_told_when_the_task_is_made(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match="no such data file"):
        builtin(name, str(path))
    path.write_text('{"question": "why?", "answer": 3, "choices": 1, "task_id": "x"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: the column '\w+' (holds|is missing)"):
        builtin(name, str(path))


def test_without_a_network_a_hub_set_says_how_to_use_a_file() -> None:
    with pytest.raises(DataError, match="give a local .jsonl"):
        builtin("gsm8k").examples("test", 1)


# ------------------------------------------------------------------------------------------------------------ real rows


@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "arc_challenge"])
def test_every_real_gold_passes_and_wrong_answers_fail(name: str) -> None:
    task = real(name)
    with Verifier(task.reward, workers=0) as check:
        assert verify(task, check) == {"rows": FILES[name][1], "passed": FILES[name][1], "failed": []}
        rows = task.rows("all")
        assert task.gold is not None
        golds = [task.gold(row) for row in rows]
        wrong = [gold + "1" if name == "gsm8k" else _other(row) for gold, row in zip(golds, rows, strict=True)]
        for answers in (wrong, [""] * len(rows), [task.messages(row)[-1].content for row in rows]):
            if name == "gsm8k" and answers is not wrong:
                continue  # a text without the mark answers with its last number, which may be right by chance
            assert set(rewards_of(check, answers, rows)) == {-1.0}


def _other(row: Any) -> str:
    return str(next(label for label in row["choices"]["label"] if label != row["answerKey"]))


@pytest.mark.parametrize("name", FILES)
def test_real_splits_share_no_row(name: str) -> None:
    task = real(name)
    splits = {split: {json.dumps(row) for row in task.rows(split)} for split in ("train", "validation", "test")}
    for one, other in itertools.combinations(splits, 2):
        common = splits[one] & splits[other]
        assert not common or name != "mbpp"
        rows = [json.dumps(row) for row in task.rows("all")]
        assert all(rows.count(row) > 1 for row in common)  # only what the file itself holds twice
    assert all(len(task.rows(split)) >= 100 for split in splits)
    assert len(task.rows("test")) >= 200
    assert len(task.rows("all")) == FILES[name][1]


def test_mbpp_splits_are_the_official_ones() -> None:
    task = real("mbpp")
    ids = {split: [row["task_id"] for row in task.rows(split)] for split in ("train", "validation", "test")}
    assert ids == {"train": [*range(601, 801)], "validation": [*range(801, 901)], "test": [*range(11, 511)]}


def test_mbpp_reference_solutions_pass_and_others_fail() -> None:
    task = real("mbpp")
    rows = {row["task_id"]: row for row in task.rows("all")}
    sample = [rows[i] for i in (*range(1, 975, 65), 367, 927, 596, 126, 533)]  # trees by setup code, imports, types
    with Verifier(task.reward, workers=2, timeout_s=GUARD_S) as check:
        assert verify(task, check, sample) == {"rows": len(sample), "passed": len(sample), "failed": []}
        shifted = [*sample[1:], sample[0]]
        wrong = [f"```python\n{row['code']}\n```" for row in shifted]
        assert rewards_of(check, wrong, sample) == [-1.0] * len(sample)


# ---------------------------------------------------------------------------------------------------------------- gsm8k


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 48+24 = 72.\n#### 72", 72), ("#### 72.0", 72), ("#### $1,200.50", 1200.5), ("####-3", -3), ("#### 5%", 5),
        ("#### 72 clips", 72), ("#### 72.", 72), ("the answer is 72", 72), ("It is 7, no, 72.", 72), ("10-5 is 5", 5),
        ("take 10-7", 7), ("#### 7\nwait\n#### 7", 7), ("#### .5", 0.5), ("#### 1200", 1200),
        ("", None), ("none", None), ("####", None), ("72 ####", None), ("#### seven", None), ("#### 7 or 8", None),
        ("#### 7\n#### 8", None), ("#### 3/4", 0.75), ("#### 1,2", None), ("#### 1,2345", None), ("####\n72", 72),
    ],
)  # fmt: skip
def test_gsm8k_reads_one_number_as_the_answer(text: str, answer: float | None) -> None:
    found = gsm8k.extract(text)
    assert (None if found is None else float(found)) == answer


def test_gsm8k_prompt_does_not_answer_itself() -> None:
    row = {"question": "How many?", "answer": "#### 42"}
    assert gsm8k.reward(gsm8k.messages(row)[-1].content, row) == -1.0


# ------------------------------------------------------------------------------------------------------------------ arc


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"), (" (B) ", "B"), ("B.", "B"), ("B)", "B"), ("B. sunlight", "B"), ("B) A plant", "B"),
        ("B: water", "B"), ("The answer is B", "B"), ("I think the answer is (B).", "B"), ("Answer: B", "B"),
        ("It grows.\nAnswer: B\n", "B"), ("The answer is B.\n\nA plant needs light.", "B"),
        ("A. x\nThe answer is B.", "B"),
        ("", None), ("b", "B"), ("E", None), ("AB", None), ("A plant needs light", None), ("A or B", None),
        ("A, B", None), ("A. or B.", None), ("(A) or (B)", None), ("A\nB", None), ("A. x\nB. y\nC. z", None),
        ("The answer is A or B", None), ("The answer is A. The answer is B.", None), ("The answer is A, B", None),
        ("Answer: A/B", None), ("ABCD", None), ("The answer is A plant", None), ("light", None), ("A and B", None),
        ("not B", None), ("A/B/C/D", None),
    ],
)  # fmt: skip
def test_arc_reads_one_label_as_the_answer(text: str, answer: str | None) -> None:
    assert arc.extract(text, {"label": ["A", "B", "C", "D"], "text": ["soil", "sunlight", "air", "rock"]}) == answer


def test_arc_labels_may_be_numbers() -> None:
    row = {"question": "?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"}
    assert [arc.reward(text, row) for text in ("2", "(2)", "2. y", "1", "B", "12", "2 3")] == [1, 1, 1, -1, -1, -1, -1]
    assert "1. x\n2. y\n3. z" in arc.messages(row)[0].content


def test_arc_reads_the_label_beside_a_real_choice_and_none_from_a_line_of_all_of_them() -> None:
    for row in real("arc_challenge").rows("all")[::12]:
        labels, texts, key = row["choices"]["label"], row["choices"]["text"], row["answerKey"]
        text = texts[labels.index(key)]
        if "{" in text:  # a formula
            continue
        for right in (f"{key}. {text}", f"{text} ({key})", f"The answer to this question is {key}. {text}"):
            assert arc.extract(right, row["choices"]) == key, right
        pairs = [*zip(labels, texts, strict=True)]
        for mark, between in ((".", " "), (")", ", "), (".", " or ")):
            listed = between.join(f"{label}{mark} {choice}" for label, choice in pairs)
            assert arc.extract(listed, row["choices"]) is arc.extract(f"The answer is {listed}", row["choices"]) is None


# ----------------------------------------------------------------------------------------------------------------- mbpp

MBPP = {
    "task_id": 1,
    "text": "Write a function to square.",
    "code": "import math\nLIMIT, other = 3, 4\ndef square(x):\n    return helper(x)\ndef helper(x):\n    return x * x",
    "test_setup_code": "",
    "test_list": ["assert square(2) == 4", "assert math.isclose(square(1.5), 2.25) and LIMIT == 3"],
}


def test_mbpp_takes_only_the_solutions_own_names_from_a_candidate() -> None:
    assert mbpp.interface(MBPP) == (["import math"], ["LIMIT", "square"], [])


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ("LIMIT = 3\ndef square(x): return x ** 2", True),
        ("Sure!\n```python\nLIMIT = 3\ndef square(x): return x ** 2\n```\nIt squares.", True),
        ("```\nLIMIT = 3\ndef square(x): return x ** 2", True),
        ("Sure! LIMIT = 3\ndef square(x): return x ** 2", False),
        ("class math: isclose = lambda *a: True\nLIMIT = 3\ndef square(x): return 4", False),
        ("", False),
        ("assert square(2) == 4", False),
        ("```python\nraise SystemExit(0)\n```", False),
    ],
)
def test_mbpp_runs_a_block_or_the_whole_text(completion: str, passes: bool) -> None:
    assert mbpp.reward(completion, MBPP) == (1.0 if passes else -1.0)


# ------------------------------------------------------------------------------------------------------------- dispatch


def labelled(name: str, count: int) -> Task:
    return Task(
        name=name,
        rows=lambda split: [{"text": f"{name} {split} {i}"} for i in range(count)],
        messages=lambda row: user(row["text"]),
        reward="t2ray.tasks.tiny:reward_math",
        gold=None,
        max_tokens=4,
    )


def test_dispatch_asks_equally_often_for_every_label() -> None:
    task = dispatch([labelled("math", 30), labelled("code", 20)], labelled("chat", 50))
    rows = task.rows("train")
    assert Counter(row["label"] for row in rows) == {"math": 20, "code": 20, "others": 20}
    assert [row["label"] for row in rows[:4]] == ["math", "code", "others", "math"]
    assert rows == task.rows("train")
    question = task.messages(rows[1])[-1].content
    assert "math, code, others" in question and question.endswith("code train 0")
    assert {row["messages"][0]["content"].split()[1] for row in task.rows("test")} == {"test"}
    json.dumps(rows)


def test_dispatch_accepts_the_bare_label_alone() -> None:
    task = dispatch([builtin("math"), builtin("code")], builtin("others"))
    with Verifier(task.reward, workers=0) as check:
        row = task.rows("validation")[1]
        answers = ["code", " code\n", "math", "others", "", "code math", "Code", "code.", task.messages(row)[0].content]
        assert rewards_of(check, answers, [row] * 9) == [1.0, 1.0] + [-1.0] * 7
        assert verify(task, check, task.rows("test"))["failed"] == []


def test_dispatch_needs_domains_of_different_names() -> None:
    for tasks in ([], [labelled("math", 1), labelled("math", 1)], [labelled("others", 1)]):
        with pytest.raises(ConfigError, match="other domains of different names"):
            dispatch(tasks, labelled("chat", 1))


# ----------------------------------------------------------------------------------------------------- shuffled choices


def test_shuffling_moves_the_gold_with_its_text_and_every_order_comes_up() -> None:
    row = {"question": "?", "choices": {"text": ["u", "v", "w"], "label": ["1", "2", "3"]}, "answerKey": "2"}
    seen = {json.dumps(arc.shuffle(row, random.Random(seed))) for seed in range(99)}
    assert len(seen) == 6
    for text in seen:
        other = json.loads(text)
        labels, texts = other["choices"]["label"], other["choices"]["text"]
        assert labels == ["1", "2", "3"] and sorted(texts) == ["u", "v", "w"] and other["question"] == "?"
        assert texts[labels.index(other["answerKey"])] == "v"
    assert row["answerKey"] == "2" and row["choices"] == {"text": ["u", "v", "w"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("all of the above", True), ("None of these", True), ("both A and B", True), ("A or (C)", True),
        ("neither of the above", True), ("1 and 3", True), ("Both have roots.", False), ("all of their lunch", False),
        ("rocks above them", False), ("a and b", False), ("10 and 30", False), ("vitamin A and sugar", False),
    ],
)  # fmt: skip
def test_a_row_whose_choices_speak_of_one_another_stays_as_it_is(text: str, stays: bool) -> None:
    row = {"question": "?", "choices": {"text": ["u", "v", text], "label": ["A", "B", "C"]}, "answerKey": "C"}
    assert all(arc.shuffle(row, random.Random(seed)) == row for seed in range(20)) == stays


def test_every_real_gold_passes_after_a_shuffle_and_the_golds_become_even() -> None:
    task = real("arc_easy")
    examples = [task.shuffled(example, seed) for seed, example in enumerate(task.examples("all"))]
    assert [task.shuffled(x, i) for i, x in enumerate(task.examples("all"))] == examples
    assert task.gold is not None
    golds = [task.gold(x.row) for x in examples]
    assert all(arc.reward(gold, dict(x.row)) == 1 for gold, x in zip(golds, examples, strict=True))
    assert all(x.messages == task.messages(x.row) for x in examples)
    four = Counter(gold for gold, x in zip(golds, examples, strict=True) if len(x.row["choices"]["label"]) == 4)
    assert max(four[label] for label in "ABCD") < 1.1 * min(four[label] for label in "ABCD")


def test_a_task_without_choices_is_not_shuffled() -> None:
    task = builtin("math")
    example = task.examples("test", 1)[0]
    assert task.shuffled(example, 7) is example


def test_readings_are_what_verifiers_take_from_a_completion() -> None:
    letters = {"label": ["A", "B", "C"], "text": ["soil", "sunlight", "air"]}
    row = {"question": "?", "choices": letters, "answerKey": "B"}
    assert builtin("arc_easy").reading("So the answer is (b).", row) == "B"
    assert builtin("arc_easy").reading("A or B", row) is None
    assert builtin("gsm8k").reading("#### $1,200.50", {"answer": "#### 3"}) == "2401/2"
    assert builtin("math").reading(" 42\n", {}) == "42"


# ---------------------------------------------------------------------------------------------------------------- shots


def test_shots_are_solved_training_rows_by_the_seed_and_never_the_row_itself() -> None:
    task = builtin("math")
    shown = task.with_shots(3, 7)
    train = {task.messages(row): task.gold and task.gold(row) for row in task.rows("train")}
    example = shown.examples("test", 1)[0]
    turns = example.messages
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    assert all(train[(turns[i],)] == turns[i + 1].content for i in (0, 2, 4))
    assert turns[6:] == task.examples("test", 1)[0].messages
    assert shown.examples("test", 9)[8].messages[:6] == turns[:6]
    assert task.with_shots(3, 7).examples("test", 1) == [example] != task.with_shots(3, 8).examples("test", 1)
    own = next(row for row in task.rows("train") if task.messages(row) == turns[:1])
    asked = shown.messages(own)
    assert len(asked) == 7 and asked[6:] == turns[:1] and turns[0] not in asked[:6] and asked[:4] == turns[2:6]


def test_shots_need_golds_and_rows() -> None:
    with pytest.raises(ConfigError, match="task 'a' has no right answers; it cannot show 1"):
        labelled("a", 5).with_shots(1, 0)
    with pytest.raises(ConfigError, match="task 'a' has only 2 training rows; it cannot show 2"):
        replace(labelled("a", 2), gold=lambda row: "x").with_shots(2, 0)
