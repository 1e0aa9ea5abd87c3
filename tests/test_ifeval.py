"""Every rule of IFEval by texts that follow it and texts that nearly do, and rows of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from t2ray.core import DataError
from t2ray.tasks import builtin
from t2ray.tasks.ifeval import RULES, reward
from t2ray.tasks.verifier import Verifier, verify

# (rule, parameters) -> texts that follow it, texts that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["dog", "cat"]},
     ["A Dog, a CAT.", "dogs and cats"], ["a dog", "", "d o g cat"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"},
     ["war and War", "war war war"], ["war", "peace", "wa r war"]),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 1, "relation": "less than"}, ["aXb"], ["a.b"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocket", "stone"], ["Rock!", "a rock", "rock-hard"]),
    ("keywords:letter_frequency", {"letter": "o", "let_frequency": 2, "let_relation": "at least"},
     ["foo", "O no"], ["of", "zero"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "exactly"}, ["#a"], ["a", "##"]),
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3},
     ["One. Two.", "Is it 3.14? Yes", "Mr. Fox met Dr. Who. They ran."], ["One. Two. Three.", "A! B? C"]),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2},
     ['He said "no." She left.', "Yes! No"], ["One.", "3.5 e.g. this", "Hm..."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"], ["a\n\nb", "a", "a\n***\n***\nb", "a\n***\nb\n***\nc"]),
    ("length_constraints:number_words", {"relation": "at most", "num_words": 3},
     ["one two three", "one, two!", "one"], ["one two three four", "", "  \n", "a-b c d"]),
    ("length_constraints:number_words", {"relation": "more than", "num_words": 2}, ["one two three"], ["one two"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
     ["a\n\nSo it is.", "a\n\n\n\n**So** it"], ["So\n\na", "a\n\nSome", "a\n\nb\n\nso", "a\nso"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"},
     [], ["a", "a\n\na"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name] of [place]"], ["[name]", "[] []", "["]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye.\nP.S. I am", "x\np. s. more", "x\nPS: y"], ["P.S.", "the ps2", "caps. x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S more"], ["x\nP.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n* b", "So:\n- a\n  - b\nEnd", "• a\n• b"], ["* a", "* a\n* b\n* c", "**a**\n**b**", "*\n*", "---\n* a"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes.", "Hm. My answer is maybe."],
     ["yes", "my answer is yes.", "My answer is"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**", "*a b*\n*c*"],
     ["*a*", "** **", "* a\n* b", "*a\nb*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1\na", "Section 1 Section 2", "SECTION A SECTION B"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n[1]\n```', '```\n{"a": "b"}\n```', '"a"'],
     ["{'a': 1}", 'Here: {"a": 1}', '{"a": 1', '```json\n{"a": 1}\n```\nDone.', ""]),
    ("detectable_format:title", {}, ["<<A poem>>\nx"], ["<A poem>", "<<>>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {},
     ["a\n******\nb", "a ****** b"], ["a", "a ****** a", "a ****** b ****** c", "a *** b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."},
     ["Say hi. Hi!", "say HI.\nHi"], ["Hi!", "So: Say hi."]),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, ["x. Is that all?", '"x. is that all?"\n'],
     ["Is that all? No.", "Is that", "that all?"]),
    ("startend:quotation", {}, ['"All of it."', ' "a b" '], ['"a', 'a"', '""', "'a'", '"a" b']),
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 2},
     ["ONE thing", "a NASA", "none"], ["ONE TWO", "I AM"]),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 1},
     ["an SOS"], ["Sos"]),
    ("change_case:english_capital", {}, ["ALL OF IT, 3 TIMES!"], ["ALL oF IT", "123"]),
    ("change_case:english_lowercase", {}, ["all of it, 3 times!"], ["all Of it", "123"]),
    ("punctuation:no_comma", {}, ["one two; three."], ["one, two", "1,000", "\u4e00\uff0c\u4e8c", "a\u3001b"]),
]  # fmt: skip


def row(rule: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "?", "instruction_id_list": [rule], "kwargs": [parameters | {"unused": None}]}


@pytest.mark.parametrize(("rule", "parameters", "follow", "do_not"), CASES)
def test_a_rule_holds_for_texts_that_follow_it_and_for_no_others(
    rule: str, parameters: dict[str, Any], follow: list[str], do_not: list[str]
) -> None:
    asked = row(rule, parameters)
    assert [text for text in follow if reward(text, asked) != 1] == []
    assert [text for text in do_not if reward(text, asked) != -1] == []


def test_every_rule_has_cases_and_nothing_follows_any() -> None:
    assert {rule for rule, *_ in CASES} == {*RULES}
    for rule, parameters, _, _ in CASES:
        assert [reward(text, row(rule, parameters)) for text in ("", " \n ", "...", "<think>all of it")] == [-1] * 4


def test_all_rules_of_a_row_must_hold_and_reasoning_does_not_count() -> None:
    both = {
        "prompt": "?",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [None, {"relation": "less than", "num_words": 4}],
    }
    texts = ["one two", "one, two", "one two three four", "<think>well, one, two, three, four</think>one two"]
    assert [reward(text, both) for text in texts] == [1, -1, -1, 1]


@pytest.mark.parametrize(
    ("rules", "kwargs", "message"),
    [
        (["no:rule"], [{}], "unknown rule 'no:rule'; there are keywords:existence"),
        (["punctuation:no_comma"], [], "1 rules and 0 kwargs"),
        ([], [], "at least one"),
        (["punctuation:no_comma"], [{"n": 1}], "takes no parameters, not n"),
        (["length_constraints:number_words"], [{"num_words": 3}], "takes relation, num_words, not num_words"),
        (["length_constraints:number_words"], [{"num_words": "3", "relation": "at most"}], "takes int for num_words"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "under"}], "no relation 'under'"),
        (["keywords:existence"], [{"keywords": "dog"}], "takes list for keywords, not 'dog'"),
        (["language:response_language"], [{"language": "de"}], "unknown rule 'language:response_language'"),
    ],
)
def test_a_row_that_no_rule_can_grade_is_an_error(rules: list[str], kwargs: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reward("text", {"prompt": "?", "instruction_id_list": rules, "kwargs": kwargs})


def test_a_file_is_checked_and_its_responses_verified_and_languages_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [row("punctuation:no_comma", {}) | {"response": f"number {i}"} for i in range(8)]
    rows.append(row("language:response_language", {"language": "de"}) | {"response": "ja"})
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    task = builtin("ifeval", str(path))
    assert task.notes == ("1 rows ask for a language, which no rule can tell; they are left out",)
    with Verifier(task.reward, workers=0) as check:
        assert verify(task, check)["passed"] == 8
    path.write_text(json.dumps(row("no:rule", {})) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: unknown rule"):
        builtin("ifeval", str(path))
    path.write_text(json.dumps(row("punctuation:no_comma", {})) + "\n")
    assert builtin("ifeval", str(path)).gold is None
