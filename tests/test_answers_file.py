"""What was answered: readings, baselines, warnings, the file of answers, and multiple choice by likelihood."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from t2ray.adapt.strategies import fixed
from t2ray.cli.main import main
from t2ray.core import Example, Mixture, SamplingParams, user
from t2ray.evals.answers import NONE, Answers, Baseline, choosing, lopsided, shares, short
from t2ray.evals.evaluate import evaluate
from t2ray.grades import Grade
from t2ray.testing import FakeGenerate, FakeScore

GOLDS = Counter(A=30, B=30, C=20, D=20)


@pytest.mark.parametrize(
    ("readings", "golds", "warns"),
    [
        (Counter(C=352, A=8), GOLDS, True),
        (Counter(C=61, A=39), GOLDS, True),
        (Counter(C=55, A=45), GOLDS, False),
        (Counter(A=64, B=36), GOLDS, False),
        (Counter({NONE: 60, "A": 40}), GOLDS, True),
        (Counter({"yes": 100}), Counter({"yes": 100}), False),
        (Counter({"yes": 100}), Counter({"yes": 80, "no": 20}), True),
        (Counter({"(A)": 60, "(B)": 40}), Counter({"(A)": 50, "(B)": 50}), False),
        (Counter({"(A)": 90, "(B)": 10}), Counter({"(A)": 50, "(B)": 50}), True),
        (Counter({"x": 60, "y": 40}), Counter(), True),
        (Counter(C=9), GOLDS, False),
        (Counter(), GOLDS, False),
    ],
)
def test_one_reading_for_most_answers_is_told_unless_it_is_right(
    readings: Counter[str], golds: Counter[str], warns: bool
) -> None:
    assert (lopsided(readings, golds) is not None) == warns


def test_the_warning_says_how_many_and_how_many_would_be_right() -> None:
    assert lopsided(Counter(C=352, A=8), GOLDS) == "352 of 360 answers are 'C'; of the right answers, 20% are"
    assert lopsided(Counter({NONE: 10}), GOLDS) == "10 of 10 answers hold no answer that the verifier can read"


def test_the_baselines_are_those_of_a_constant_and_of_a_random_answer() -> None:
    row = Baseline.of(["A", "B", "B", "D", None], [4, 4, 5, 4, 2]).row()
    assert row["majority"]["acc"] == 0.4 and row["majority"]["reading"] == "B" and row["majority"]["n"] == 5
    assert row["random"] == pytest.approx((3 / 4 + 1 / 5 + 1 / 2) / 5)
    assert row["golds"] == {"B": 2, "A": 1, "D": 1, NONE: 1}
    assert Baseline.of([], []).row() == {"majority": None, "random": None, "golds": {}}


def test_a_table_of_readings_has_the_golds_whatever_else_was_said() -> None:
    counts = {f"word {i}": 100 - i for i in range(20)} | {"A": 1}
    shown = shares(counts, ["A", "B"])
    assert shown["A"] == 1 and "B" not in shown and sum(shown.values()) == sum(counts.values())
    assert len(shown) == 12 and shown["..."] == sum(100 - i for i in range(10, 20))
    assert short("a\n b " + "c" * 99) == "a b " + "c" * 53 + "..."


def example(i: int) -> Example:
    return Example(id=f"t/test/{i}", messages=user("why? " * (i + 1)), row={"labels": ["A", "B", "C"], "gold": "B"})


def test_an_evaluation_gathers_every_answer_in_the_readings_of_the_verifier() -> None:
    async def verify(texts: Any, rows: Any) -> list[Grade]:
        return [Grade.of(1.0 if text == row["gold"] else -1.0) for text, row in zip(texts, rows, strict=True)]

    answers = Answers(
        "t", "base", lambda text, row: text if text in row["labels"] else None, lambda row: row["gold"], keep=True
    )
    examples = [example(i) for i in range(4)]
    generate = FakeGenerate(lambda prompt, mixture: ["B", "C", "no", "B"][prompt[-1].content.count("why") - 1])
    strategy, sampling = fixed(Mixture.base()), SamplingParams(max_tokens=8)
    job = evaluate("t", examples, strategy, generate, verify, sampling, answers=answers, batch_tokens=1)
    cell = asyncio.run(job)
    assert cell.readings == {"B": 2, "C": 1, NONE: 1} and cell.correct == (True, False, False, True)
    by_id = {answer.id: answer for answer in answers.rows}
    assert [by_id[x.id].reading for x in examples] == ["B", "C", None, "B"]
    assert [by_id[x.id].reward for x in examples] == [1.0, -1.0, -1.0, 1.0]
    assert by_id["t/test/2"].completion == "no" and by_id["t/test/2"].prompt == "why? why? why? "
    assert {answer.gold for answer in answers.rows} == {"B"}


def test_the_likeliest_choice_answers_and_the_first_of_equal_ones() -> None:
    score = FakeScore(lambda prompt, label, mixture: {"A": -3.0, "B": -1.0, "C": -1.0}[label])
    x = example(0)
    answer = asyncio.run(choosing(score, {x.messages: ("A", "C", "B")})(x.messages, Mixture.base(), SamplingParams()))
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("C", "stop", (-1.0,))
    assert score.calls == [(x.messages, ("A", "C", "B"), Mixture.base())]


# ---------------------------------------------------------------------------------------------------------- the command

ROW = {"question": "Which?", "choices": {"label": ["A", "B", "C"], "text": ["u", "v", "w"]}, "answerKey": "B"}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with twelve rows, and the words of the command over them."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(ROW | {"question": f"Which of {i}?"}) for i in range(12)]
    Path("rows.jsonl").write_text("\n".join(lines))
    return ["eval", "--tasks", "arc_easy=rows.jsonl", "--split", "all", "--json", "e.json"]


def test_eval_writes_the_answers_and_shows_baselines_and_readings(
    rows: list[str], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*rows, "--model", str(tiny_llama), "--answers", "a.parquet", "--max-tokens", "3"]) == 0
    table = pq.read_table("a.parquet").to_pydict()
    assert [*table] == ["task", "strategy", "id", "prompt", "completion", "reading", "gold", "reward"]
    assert table["id"] == [f"arc_easy/all/{i}" for i in range(12)] and set(table["gold"]) == {"B"}
    assert table["prompt"][3].startswith("Which of 3?\n\nA. u\nB. v")
    result = json.loads(Path("e.json").read_text())["tasks"]["arc_easy"]
    assert result["baselines"]["majority"]["acc"] == 1.0 and result["baselines"]["random"] == pytest.approx(1 / 3)
    readings = result["strategies"]["base"]["readings"]
    assert Counter(short(reading) for reading in table["reading"]) == readings
    out = capsys.readouterr().out
    assert "majority" in out and "100.0 B" in out and "33.3" in out
    assert len(result["warnings"]) == 1 and f"arc_easy base: {readings[NONE]} of 12" in out


def test_eval_scores_the_choices_and_shuffles_them_when_asked(rows: list[str], tiny_llama: Path) -> None:
    scored = [*rows, "--model", str(tiny_llama), "--form", "scored", "--answers", "a.parquet"]
    assert main(scored) == 0
    plain = pq.read_table("a.parquet").to_pydict()
    assert set(plain["reading"]) <= {"A", "B", "C"} and plain["completion"] == plain["reading"]
    assert main([*scored, "--shuffle", "7"]) == 0
    first = pq.read_table("a.parquet").to_pydict()
    assert set(first["gold"]) == {"A", "B", "C"} and first["prompt"] != plain["prompt"]
    assert main([*scored, "--shots", "1", "--limit", "2"]) == 0
    assert pq.read_table("a.parquet").to_pydict()["prompt"][0].count("Which of") == 2
    assert main([*scored, "--shuffle", "7"]) == 0
    assert pq.read_table("a.parquet").to_pydict() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--answers", "none/a.parquet"], "--answers none/a.parquet: there is no folder"),
        (["--answers", "."], "--answers . is a folder; name a file"),
        (["--shots", "-1"], "--shots -1: give a number of solved rows, at least 0"),
        (["--shots", "6"], "task 'arc_easy' has only 6 training rows; it cannot show 6"),
        (["--form", "scored", "--tasks", "math"], "--form scored: math is no multiple choice"),
    ],
)
def test_what_cannot_be_written_or_scored_is_told_before_anything_is_loaded(
    rows: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*rows, "--model", "nowhere", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("e.json").exists()
