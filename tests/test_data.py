"""Own data: files are read as they are, and a mistake in one is told with its file and line before anything runs."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from t2ray.config.domain import DomainConfig
from t2ray.core import ConfigError, DataError, Message, user
from t2ray.tasks.columns import part
from t2ray.tasks.data import own
from t2ray.tasks.files import absolute, read
from t2ray.tasks.task import Task

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
    assert [place.rpartition(", ")[2] for place in table.places] == ["line 2", "line 5"]


GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "no such data file; give a file (.jsonl, .ndjson,"),
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
        ("rows.jsonl", GOOD + b"\n{broken}\n", "line 3: not valid JSON"),
        ("rows.jsonl", GOOD + b'{"a": 1', "line 2: not valid JSON"),
        ("rows.jsonl", GOOD + b'{"a": "\xff"}\n', "line 2: not valid JSON"),
        ("rows.jsonl", GOOD + b"[" * 100_000, "line 2: not valid JSON"),
        ("rows.jsonl", GOOD + b'["a", 1]\n', "line 2: a row is an object of columns, not list"),
        ("rows.jsonl", GOOD + b'{"a": 1, "a": 2}\n', "line 2: not valid JSON: the name 'a' stands twice in one object"),
        ("rows.json", b'[{"a": 1},\n {"a" 2}]\n', "line 2: not valid JSON: Expecting ':' delimiter"),
        ("rows.json", b'[{"a": 1}, 3]', "row 2: a row is an object of columns, not int"),
        ("rows.jsonl.gz", gzip.compress(GOOD + b"{broken}", mtime=0), "line 2: not valid JSON"),
        ("rows.csv", b"", "holds no rows"),
        ("rows.csv", b"a,b\n", "holds no rows"),
        ("rows.csv", b"a,b\n1,2\n3\n", "line 3: 1 fields, but the header names 2"),
        ("rows.csv", b'a,b\n1,"2\n', "line 2: not valid CSV"),
        ("rows.csv", b'a,b\n"say \\"hi\\"",2\n', "line 2: not valid CSV: ',' expected after"),
        ("rows.csv", b'a,b\n"1\n2",3\n4\n', "line 4: 1 fields, but the header names 2"),
        ("rows.csv", b"a,b\n1,2\n1,\xff\n", "line 3: not valid CSV: the byte 0xff is no UTF-8"),
        ("rows.parquet", b"PAR1 no more", "not a readable Parquet file"),
        ("rows.parquet", b"", "not a readable Parquet file"),
        ("rows.arrow", b"ARROW1 no more", "not a readable Arrow file"),
        ("rows.arrow", b"", "not a readable Arrow file"),
        ("rows.txt", b"text", "its name ends in '.txt'; a data file is one of .jsonl, .ndjson,"),
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


def test_a_bad_line_of_one_shard_is_told_with_its_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"{broken}\n")
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: not valid JSON"):
        read(str(tmp_path / "*.jsonl"))


def test_every_way_to_name_files_reads_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is read as a folder is: both go through the store."""
    shards = tmp_path / "data" / "shards"
    shards.mkdir(parents=True)
    for i in range(3):
        part = pyarrow.Table.from_pylist(ROWS[10 * i : 10 * (i + 1)])
        pyarrow.parquet.write_table(part, shards / f"train-{i:05}-of-00003.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), shards / "test-00000-of-00001.parquet")
    (shards / "README.md").write_text("about the data")
    monkeypatch.chdir(tmp_path)
    train = "data/shards/train-*.parquet"
    for source in ("data/shards", "data/shards/", train, "data/*/train*", "**/train-*.parquet", f"file://{shards}"):
        assert read(source).rows == ROWS, source
    assert read([f"data/shards/train-{i:05}-of-00003.parquet" for i in range(3)]).rows == ROWS
    assert read([train, "data/shards/test-*"]).rows == [*ROWS, *ROWS[:1]]
    assert read("data/shards", "test").rows == ROWS[:1]
    assert read("shards", folder=str(tmp_path / "data")).rows == ROWS
    assert read(train).places[10] == "data/shards/train-00001-of-00003.parquet, row 1"
    assert absolute(train) == str(tmp_path / train) and absolute("openai/gsm8k:main") == "openai/gsm8k:main"
    domain = {"data": "data/shards", "prompt": "{question}", "reward": "t2ray.tasks.equal:reward"}
    assert own("d", DomainConfig(**domain, validation="test"), ".").rows("validation") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no files of the split 'validation'; it has test, train"):
        read("data/shards", "validation")
    write(shards / "train-more.jsonl", ROWS)
    with pytest.raises(DataError, match=r"holds files of several kinds \(.jsonl, .parquet\); write a pattern"):
        read("data/shards")
    with pytest.raises(DataError, match=r"data/none-\*: no such data file"):
        read("data/none-*")
    with pytest.raises(DataError, match="data is not read from the web; download the file"):
        read("https://example.org/rows.jsonl")


@pytest.mark.parametrize("name", ["rows.ndjson", "rows.json", "rows.jsonl.gz", "rows.JSONL", "rows.jsonl.zst"])
def test_other_endings_hold_the_same_rows(name: str, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    with pyarrow.output_stream(tmp_path / name, compression="detect") as file:
        file.write(text)
    assert read(str(tmp_path / name)).rows == ROWS
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    assert read(str(tmp_path / "rows.json")).rows == ROWS
    (tmp_path / "rows.tsv").write_text("question\tanswer\nwhat, is 0?\t0\n")
    assert read(str(tmp_path / "rows.tsv")).rows == [{"question": "what, is 0?", "answer": "0"}]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    """A data set in several files is one folder, splits are folders in one; its JSON files are no rows."""
    import datasets

    more = [{"question": f"what is {n}?", "answer": str(n)} for n in range(100, 105)]
    train, test = datasets.Dataset.from_list(more), datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=train.select([4, 2]), test=test).save_to_disk(tmp_path / "splits")
    assert read(str(tmp_path / "one")).rows == more
    assert read(str(tmp_path / "one" / "data-00001-of-00002.arrow")).rows == more[3:]
    assert read(str(tmp_path / "splits")).rows == [more[4], more[2]]
    assert read(str(tmp_path / "splits"), "test").rows == ROWS
    with pytest.raises(DataError, match="splits has no split 'validation'; it has test, train$"):
        read(str(tmp_path / "splits"), "validation")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", train.data.schema) as file:
        file.write_table(train.data.table)
    assert read(str(tmp_path / "file.arrow")).rows == more


@pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": [{"filename": "gone.arrow"}]}'])
def test_a_damaged_folder_of_save_to_disk_is_one_line(state: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))) as error:
        read(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_cell_may_be_a_document(tmp_path: Path) -> None:
    long = "word " * 200_000
    (tmp_path / "rows.csv").write_text(f'a\n"{long}"\n')
    assert read(str(tmp_path / "rows.csv")).rows == [{"a": long}]


# ------------------------------------------------------------------------------------- columns that are used, and not


def made(tmp_path: Path, rows: list[dict[str, Any]], prompt: str = "{text}", gold: str | None = None) -> Task:
    write(tmp_path / "d.jsonl", rows)
    values = {"data": str(tmp_path / "d.jsonl"), "prompt": prompt, "reward": "t2ray.tasks.equal:reward", "gold": gold}
    return own("d", DomainConfig(**values), str(tmp_path))


def prompts(task: Task) -> list[str]:
    return [example.messages[-1].content for example in task.examples("train")]


def gold(task: Task) -> str:
    assert task.gold is not None
    return task.gold(task.rows("train")[0])


def test_a_column_that_nobody_uses_may_hold_anything(tmp_path: Path) -> None:
    odd: list[Any] = [1, "2b", None, [1], {"x": "\ud800"}, float("nan")]
    assert prompts(made(tmp_path, [{"text": "a", "id": value} for value in odd] + [{"text": "a"}])) == ["a"] * 7
    (tmp_path / "d.csv").write_text(",text,id,id\n0,a,1,2\n")
    table = read(str(tmp_path / "d.csv"))
    assert table.rows == [{"text": "a"}]
    nanoseconds = pyarrow.array([1], pyarrow.timestamp("ns", tz="Nowhere/City"))
    columns = {"text": pyarrow.array([b"12+30"]), "picture": pyarrow.array([b"\xff\xd8"]), "when": nanoseconds}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    table = read(str(tmp_path / "d.parquet"))
    assert table.rows == [{"text": "12+30", "picture": b"\xff\xd8"}] and [*table.unusable] == ["when"]


@pytest.mark.parametrize(
    ("rows", "prompt", "message"),
    [
        ([{"text": None}], "{text}", "line 1: the column 'text' is null"),
        ([{"text": "a"}, {"answer": 1}], "{text}", "line 2: the column 'text' is missing; the row has answer"),
        ([{"text": float("nan")}], "{text}", "line 1: the column 'text' is NaN"),
        ([{"text": " "}], "{text}", "line 1: the prompt is empty, because the column 'text' is"),
        ([{"text": ""}], "Q: {text}", "line 1: the prompt is empty"),
        ([{"text": ["a"]}], "Q: {text}", "line 1: the column 'text' holds a list, which is no text; name .*text.0"),
        ([{"text": {"a": 1}}], "{text}", "holds a mapping, which is no text; name a part of it, such as text.a"),
        ([{"text": "\ud800"}], "{text}", "holds half of a character"),
        ([{"text": "a"}], "{text:.2f}", "line 1: the column 'text' holds 'a', which '.2f' cannot format"),
        ([{"text": 1}, {"text": "a"}], "{text}", "line 2: the column 'text' holds a str, but a number in .*line 1"),
        ([{"q": {"text": "a"}}, {"q": {}}], "{q.text}", "line 2: the column 'q.text' is missing"),
        ([{"q": {"text": "a"}}, {"q": None}], "{q.text}", "line 2: the column 'q.text' is null"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(
    rows: list[dict[str, Any]], prompt: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl, .*{message}"):
        made(tmp_path, rows, prompt)


@pytest.mark.parametrize("prompt", ["{text!r}", "{text:{width}}", "{nosuch.text}", "{text[0]}"])
def test_a_template_that_cannot_be_filled_is_refused(prompt: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt '\{"):
        made(tmp_path, [{"text": "a", "width": 3}], prompt)


def test_bytes_that_are_no_text_are_refused_where_they_are_used(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"\xff\xd8"])}), tmp_path / "d.parquet")
    domain = DomainConfig(data=str(tmp_path / "d.parquet"), prompt="{text}", reward="t2ray.tasks.equal:reward")
    with pytest.raises(DataError, match=r"row 1: the column 'text' holds bytes that are no UTF-8 text"):
        own("d", domain, str(tmp_path))


def test_columns_are_found_by_dots_and_by_their_parts(tmp_path: Path) -> None:
    row = {
        "q.text": "dotted", "q": {"kind": {"of.it": "deep"}, "list": ["x", {"y": "z"}]}, "a:b": "colon", "n": 2.5,
        "meta": {"ground_truth": "72"},
    }  # fmt: skip
    paths = ("q.text", "q.kind.of.it", "q.list.1.y", "q.list[0]", "n")
    assert [part(row, path) for path in paths] == ["dotted", "deep", "z", "x", 2.5]
    task = made(tmp_path, [row], "{q.text} {q.list[1].y} {a:b} {n:.2f} {n} {q.text:>8}", "meta.ground_truth")
    assert prompts(task) == ["dotted z colon 2.50 2.5   dotted"] and gold(task) == "72"
    with pytest.raises(DataError, match="the column 'q' holds a mapping"):
        made(tmp_path, [row], gold="q", prompt="{n}")
    with pytest.raises(DataError, match="the column 'e' is empty; a right answer has text"):
        made(tmp_path, [{"n": 1, "e": ""}], gold="e", prompt="{n}")


def test_an_answer_at_the_end_of_messages_is_cut_off_and_becomes_the_gold(tmp_path: Path) -> None:
    def turns(*texts: str) -> list[dict[str, Any]]:
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]

    task = made(tmp_path, [{"m": turns("12+30", "42"), "b": "43"}] * 2, "m")
    assert task.examples("train")[0].messages == user("12+30") and gold(task) == "42"
    assert "2 of 2 rows end with the assistant's answer in 'm'; it is cut off" in task.notes[0]
    assert gold(made(tmp_path, [{"m": turns("12+30", "42"), "b": "43"}], "m", "b")) == "43"
    some = made(tmp_path, [{"m": turns("1+1", "2")}, {"m": turns("1+1", "2", "and 3?")}], "m")
    assert some.gold is None and [len(x.messages) for x in some.examples("train")] == [1, 3]
    # as a template of that column alone, as text in a cell, as parts
    assert prompts(made(tmp_path, [{"m": turns("hi", "yes")}], "{m}")) == ["hi"]
    assert prompts(made(tmp_path, [{"m": json.dumps(turns("hi", "yes"))}], "m")) == ["hi"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert prompts(made(tmp_path, [{"m": parts}], "m")) == ["ab"]
    for wrong in (turns("", "yes"), turns("a", "b")[1:], [*turns("a", "b"), *turns("c", "d")[1:]]):
        with pytest.raises(DataError, match="line 1: the column 'm' must hold a turn of the user"):
            made(tmp_path, [{"m": wrong}], "m")
    with pytest.raises(DataError, match="line 1: the column 'm' is null"):
        made(tmp_path, [{"m": None}], "m")


def test_rows_are_known_by_their_places(tmp_path: Path) -> None:
    task = made(tmp_path, [{"text": str(i)} for i in range(20)])
    assert task.places is not None
    for split in ("train", "validation", "test", "all"):
        lines = [int(place.rpartition(" ")[2]) for place in task.places(split)]
        assert lines == [int(row["text"]) + 1 for row in task.rows(split)]


def test_rows_are_read_without_torch(tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", ROWS)
    code = "import sys; from t2ray.tasks.files import read; read(sys.argv[1]); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code, tmp_path / "d.jsonl"], capture_output=True, text=True).stdout
        == "False\n"
    )


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
    with pytest.raises(ConfigError, match="validation 'held' is no"):
        own("quiz", domain(folder, validation="held"), str(folder))


def test_rows_for_tests_may_choose_no_expert_and_without_any_the_task_says_so(folder: Path) -> None:
    assert not own("quiz", domain(folder), str(folder)).test_is_unseen
    write(folder / "last.jsonl", [{"question": "last?", "answer": "yes"}])
    task = own("quiz", domain(folder, test="last.jsonl"), str(folder))
    assert task.test_is_unseen and [row["question"] for row in task.rows("test")] == ["last?"]
    assert len(task.rows("validation")) == 2 and len(task.rows("train")) == 23
    with pytest.raises(ConfigError, match="test 'held' is no"):
        own("quiz", domain(folder, test="held"), str(folder))
    with pytest.raises(ValueError, match="a built-in task has its own test rows"):
        DomainConfig(task="math", test="last.jsonl")


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
    with pytest.raises(DataError, match=r"line 2: the column 'question' is null"):
        own("quiz", domain(folder), str(folder))


@pytest.mark.parametrize("turns", ["Hi", [], ["Hi"], [{"role": "robot", "content": "Hi"}], [{"role": "user"}], 3])
def test_a_column_that_holds_no_messages_is_told_with_its_line(folder: Path, turns: Any) -> None:
    write(folder / "rows.jsonl", [{"chat": turns}])
    with pytest.raises(DataError, match=r"line 1: the column 'chat' must hold messages.*\"\{chat\}\""):
        own("chat", domain(folder, prompt="chat"), str(folder))
