"""Own data: files are read as they are, and a mistake in one is told with its file and line before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from t2ray.config.train import DomainConfig
from t2ray.core import ConfigError, DataError, Message, user
from t2ray.tasks.data import own, read

ROWS: list[dict[str, Any]] = [{"question": f"what is {i}?", "answer": str(i)} for i in range(25)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "own_rewards.py").write_text(
        "def right(completion, row):\n    return 1.0 if row['answer'] == completion else -1\n"
    )
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def domain(folder: Path, **changes: Any) -> DomainConfig:
    values = {"data": str(folder / "rows.jsonl"), "prompt": "Q: {question}", "reward": "own_rewards:right"}
    return DomainConfig(**(values | changes))


# -------------------------------------------------------------------------------------------------------------- reading


def test_the_three_formats_hold_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"what is {i}?,{i}\n" for i in range(25)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        assert read(str(tmp_path / name)).rows == ROWS
    assert read("rows.csv", folder=str(tmp_path)).rows == ROWS


def test_a_csv_field_may_hold_commas_quotes_and_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes('\ufeffa,b\r\n"x, ""y""\nz",1\r\n\r\nlast,2\r\n'.encode())
    table = read(str(tmp_path / "rows.csv"))
    assert table.rows == [{"a": 'x, "y"\nz', "b": "1"}, {"a": "last", "b": "2"}]
    assert table.places == ["line 3", "line 5"]


GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "no such data file; give a .jsonl, .csv, .parquet file or a hub data set's id"),
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
        ("rows.jsonl", GOOD + b"\n{broken}\n", "line 3: not valid JSON"),
        ("rows.jsonl", GOOD + b'{"a": 1', "line 2: not valid JSON"),
        ("rows.jsonl", GOOD + b'{"a": "\xff"}\n', "line 2: not valid JSON"),
        ("rows.jsonl", GOOD + b"[" * 100_000, "line 2: not valid JSON"),
        ("rows.jsonl", GOOD + b'["a", 1]\n', "line 2: a row is an object of columns, not list"),
        (
            "rows.jsonl",
            GOOD + b'{"a": 2.5}\n{"a": "3"}\n',
            "line 3: the column 'a' holds a str, but a number in line 1",
        ),
        ("rows.csv", b"", "holds no rows"),
        ("rows.csv", b"a,b\n", "holds no rows"),
        ("rows.csv", b"a,b\n1,2\n3\n", "line 3: 1 fields, but the header names 2"),
        ("rows.csv", b"a,a\n1,2\n", "line 1: the header"),
        ("rows.csv", b'a,b\n1,"2\n', "not valid CSV"),
        ("rows.csv", b"a,b\n1,\xff\n", "not valid CSV"),
        ("rows.parquet", b"PAR1 no more", "not a readable Parquet file"),
        ("rows.parquet", b"", "not a readable Parquet file"),
        ("rows.txt", b"text", "ends in '.txt'; a data file is one of .jsonl, .csv, .parquet"),
    ],
)
def test_a_bad_file_is_told_with_file_and_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(str(path))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_a_hub_name_says_how_to_use_a_file() -> None:
    with pytest.raises(DataError, match=r"cannot load .*someone/something.*give a local .jsonl"):
        read("someone/something", "train")


# ------------------------------------------------------------------------------------------------------------- a task


def test_a_template_makes_a_prompt_of_each_row(folder: Path) -> None:
    task = own(
        "quiz", domain(folder, prompt="{question} {{not a column}} {answer}", gold="answer", max_tokens=9), str(folder)
    )
    first = task.examples("train", 2)[1]
    assert first.id == "quiz/train/1"
    assert first.messages == user("what is 1? {not a column} 1")
    assert first.row == ROWS[1]
    assert task.gold is not None and task.gold(first.row) == "1"
    assert (task.name, task.max_tokens, task.reward) == ("quiz", 9, "own_rewards:right")


def test_a_messages_column_is_the_conversation(folder: Path) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    write(folder / "rows.jsonl", [{"chat": turns, "answer": "x"}])
    task = own("chat", domain(folder, prompt="chat"), str(folder))
    assert task.examples("train")[0].messages == tuple(Message(**turn) for turn in turns)
    assert task.gold is None


def test_every_tenth_row_is_held_out(folder: Path) -> None:
    task = own("quiz", domain(folder), str(folder))
    train, validation = ([*task.rows(split)] for split in ("train", "validation"))
    assert validation == [ROWS[9], ROWS[19]] == [*task.rows("test")]
    assert len(train) == 23 and all(row not in validation for row in train)
    assert [*task.rows("all")] == ROWS


def test_a_file_of_few_rows_validates_on_what_it_trains(folder: Path) -> None:
    write(folder / "rows.jsonl", ROWS[:1])
    task = own("one", domain(folder), str(folder))
    assert [*task.rows("train")] == [*task.rows("validation")] == ROWS[:1]


def test_validation_may_be_a_file_of_its_own(folder: Path) -> None:
    write(folder / "held.jsonl", [{"question": "new?", "answer": "yes"}])
    task = own("quiz", domain(folder, validation="held.jsonl"), str(folder))
    assert [*task.rows("train")] == ROWS
    assert [row["question"] for row in task.rows("validation")] == ["new?"]
    with pytest.raises(DataError, match="nosuch.jsonl"):
        own("quiz", domain(folder, validation="nosuch.jsonl"), str(folder))
    with pytest.raises(ConfigError, match="validation 'held'"):
        own("quiz", domain(folder, validation="held"), str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Q: {qestion}"}, "no column 'qestion'; it has answer, question"),
        ({"prompt": "Q: {question.__class__}"}, "no column 'question.__class__'"),
        ({"prompt": "Q: {}"}, "no column ''"),
        ({"prompt": "Q: {question"}, "write {column} for a column"),
        ({"prompt": "messages"}, "neither a template .* nor a column .*; it has answer, question"),
        ({"gold": "solution"}, "no column 'solution'; it has answer, question"),
        ({"reward": "own_rewards"}, "module:function"),
        ({"reward": "own_rewards:wrong"}, "no function 'wrong'; it has right"),
        ({"reward": "nosuch_rewards:right"}, "add nosuch_rewards.py"),
    ],
)
def test_a_mistake_in_the_domain_names_value_and_remedy(folder: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own("quiz", domain(folder, **changes), str(folder))


def test_a_row_without_the_prompts_column_is_told_with_its_line(folder: Path) -> None:
    write(folder / "rows.jsonl", [*ROWS[:3], {"answer": "3"}])
    with pytest.raises(DataError, match=r"rows.jsonl, line 4: the column 'question' is missing; the row has answer"):
        own("quiz", domain(folder), str(folder))
    write(folder / "rows.jsonl", [*ROWS[:1], {"question": None, "answer": "3"}])
    with pytest.raises(DataError, match=r"line 2: the column 'question' is missing"):
        own("quiz", domain(folder), str(folder))


@pytest.mark.parametrize("turns", ["Hi", [], ["Hi"], [{"role": "robot", "content": "Hi"}], [{"role": "user"}], 3])
def test_a_column_that_holds_no_messages_is_told_with_its_line(folder: Path, turns: Any) -> None:
    write(folder / "rows.jsonl", [{"chat": turns}])
    with pytest.raises(DataError, match=r"line 1: the column 'chat' must hold messages.*\"\{chat\}\""):
        own("chat", domain(folder, prompt="chat"), str(folder))
