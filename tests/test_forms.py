"""The tasks of answering in a form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2ray.core import DataError
from t2ray.tasks import builtin
from t2ray.tasks.forms import FORMS, messages, reward


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Gravity.", 1.0),
        ("one two three four five six seven eight nine ten eleven twelve", 1.0),
        ("one two three four five six seven eight nine ten eleven twelve thirteen", -1.0),
        ("a - b - c\n\n" * 4, 1.0),
        ("a - b - c\n\n" * 5, -1.0),
        ("", -1.0),
        ("...", -1.0),
        ("well-known low-cost solar-powered two-way radio-sets", 1.0),
        ("one-two three-four five-six seven-eight nine-ten eleven-twelve thirteen", -1.0),
        ("It isn't what it's called, they've said, isn't it?", -1.0),
        ("It costs $1,200.50 and weighs 3.5 kg, or 7%.", 1.0),
        ("<think>" + "one " * 50 + "</think>two", 1.0),
        ("<think>one two", -1.0),
        ("<think>" + "one " * 50, -1.0),
        ("one two</think>" + "one " * 13, -1.0),
        ("\u5149\u5408\u4f5c\u7528", 1.0),
        ("**bold** _and_ `code`", 1.0),
        ("- one\n- two\n- three", 1.0),
        ("1. a 2. b 3. c 4. d 5. e 6. f 7. g", -1.0),
        ("one\u00a0two\u200bthree" * 3, 1.0),
        ("\U0001f60a \u2014 !", -1.0),
    ],
)
def test_one_to_twelve_words_are_right(answer: str, expected: float) -> None:
    assert reward(answer, {"form": "brief"}) == expected


@pytest.mark.parametrize(
    ("answer", "as_json", "both"),
    [
        ('{"answer": "Gravity."}', 1.0, 1.0),
        (' {\n "answer":"two words"}\n', 1.0, 1.0),
        (json.dumps({"answer": "word " * 13}), 1.0, -1.0),
        ('<think>{"answer": 1}</think>{"answer": "yes"}', 1.0, 1.0),
        ("Gravity.", -1.0, -1.0),
        ('"Gravity"', -1.0, -1.0),
        ('["answer"]', -1.0, -1.0),
        ('{"answer": ""}', -1.0, -1.0),
        ('{"answer": "..."}', -1.0, -1.0),
        ('{"answer": 42}', -1.0, -1.0),
        ('{"answer": null}', -1.0, -1.0),
        ('{"answer": "a", "why": "b"}', -1.0, -1.0),
        ('{"Answer": "a"}', -1.0, -1.0),
        ('```json\n{"answer": "a"}\n```', -1.0, -1.0),
        ('{"answer": "a"} Done.', -1.0, -1.0),
        ('{"answer": "a"', -1.0, -1.0),
        ('{"answer":' * 100_000, -1.0, -1.0),
        ("", -1.0, -1.0),
        ('{"answer": "a",}', -1.0, -1.0),
        ("{'answer': 'a'}", -1.0, -1.0),
        ('{answer: "a"}', -1.0, -1.0),
        ('{"answer": true}', -1.0, -1.0),
        ('{"answer": ["a"]}', -1.0, -1.0),
        ('{"answer": {"answer": "a"}}', -1.0, -1.0),
        ('[{"answer": "a"}]', -1.0, -1.0),
        ('{"answer": "a"}{"answer": "b"}', -1.0, -1.0),
        ('Answer: {"answer": "a"}', -1.0, -1.0),
        ('{"answer": "\\u00e9t\\u00e9"}', 1.0, 1.0),
        ('{"answer": "a\nb"}', -1.0, -1.0),
        ('{"answer": "a\\nb"}', 1.0, 1.0),
        ('{"answer": "{\\"answer\\": 1}"}', 1.0, 1.0),
    ],
)
def test_an_object_with_the_answer_alone_is_right(answer: str, as_json: float, both: float) -> None:
    assert reward(answer, {"form": "json"}) == as_json
    assert reward(answer, {"form": "brief_json"}) == both


def test_each_form_is_asked_for_and_its_limit_holds() -> None:
    words = " ".join(["word"] * 20)
    assert [reward(text, {"form": "brief_20"}) for text in (words, words + " more")] == [1.0, -1.0]
    for form in FORMS:
        said = messages({"question": "Why?", "form": form})[0].content
        assert ("at most 12 words" in said, "at most 20" in said, "JSON" in said) == (
            form in ("brief", "brief_json"), form == "brief_20", "json" in form
        )  # fmt: skip


def test_rows_of_a_file_are_split_and_asked_without_their_choices(tmp_path: Path) -> None:
    path = tmp_path / "arc.jsonl"
    path.write_text("".join(json.dumps({"question": f"Why {i}?", "choices": {}}) + "\n" for i in range(8)))
    task = builtin("brief", str(path))
    assert [len(task.rows(split)) for split in ("train", "validation", "test")] == [4, 2, 2]
    assert task.examples("test")[0].messages[0].content == "Why 3?\n\nAnswer in at most 12 words."
    path.write_text('{"answer": "no question"}\n')
    with pytest.raises(DataError, match="the column 'question' is missing"):
        builtin("brief", str(path))
