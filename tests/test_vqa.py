"""Tasks with pictures: VQA's accuracy, its normal form of answers, and rows with pictures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pictures import picture

from t2ray.config.domain import DomainConfig
from t2ray.core import ConfigError, DataError, Image
from t2ray.tasks import builtin, vqa
from t2ray.tasks.data import own
from t2ray.tasks.text import settled
from t2ray.tasks.verifier import Verifier, verify
from t2ray.tasks.vqa import normal, reward

TEN = ["red"] * 3 + ["Red."] + ["blue"] * 2 + ["a blue"] + ["green", "two", "2"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red car.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", normal("don't know")),
        ("shouldn'tve", normal("shouldnt've")),
        ("it's", "it's"),
        ("1,000", "1000"),
        ("6.5", "6.5"),
        ("a-b", "b"),
        ("rock - paper", "rock paper"),
        ("yes!\n", "yes"),
        ("Dr. No?", "dr no"),
        ("", ""),
        ("a", "a"),
        ("A.", "a"),
        ("the a", "the a"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("3.", "3"),
        ("$5.00", "$5.00"),
        ("1/2", "1 2"),
        ("50 %", "50 %"),
        ("7-up", "7 up"),
        ("Nine O'Clock", "9 oclock"),
        ("'quoted'", "'quoted'"),
        ("red, blue", "red blue"),
        ("(red)", "red"),
        ("coca_cola", "coca cola"),
        ("ten\tdogs \n", "10 dogs"),
        ("twenty", "twenty"),
        ("... !", ""),
    ],
)
def test_an_answer_is_compared_as_vqas_evaluation_does(answer: str, expected: str) -> None:
    assert normal(answer) == expected


@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [
        ("red", 1.0),  # 4 people: each of the four leaves 3 others, the rest leave 4
        ("blue", (3 * 2 / 3 + 7) / 10),
        ("two", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("green", 9 / 3 / 10),
        ("black", 0.0),
        ("<think>blue?</think>red", 1.0),
        ("RED!", 1.0),
        ("The red", 1.0),
        ("<answer>red</answer>", 1.0),
        ("<think>red", 0.0),
        ("red or blue", 0.0),
        ("red, blue, green", 0.0),
        ("It is red.", 0.0),
        ("reddish", 0.0),
        ("r e d", 0.0),
        ("", 0.0),
        (".", 0.0),
        ("the", 0.0),
    ],
)
def test_accuracy_leaves_each_of_ten_people_out_in_turn(answer: str, accuracy: float) -> None:
    """Against the definition, person by person."""
    row = {"answers": TEN}
    assert reward(answer, row) == pytest.approx(2 * accuracy - 1)
    said = normal(settled(answer))
    each = [min(1, sum(normal(o) == said for j, o in enumerate(TEN) if j != i) / 3) for i in range(10)]
    assert reward(answer, row) == pytest.approx(2 * sum(each) / 10 - 1)


@pytest.mark.parametrize("gold", ["a", "?", "the", "."])
def test_no_answer_is_never_right(gold: str) -> None:
    """Of pictures of a letter or a mark people say no more than that, of which VQA's normal form leaves nothing."""
    for nothing in ("", " ", "?!", "<think>a"):
        assert vqa.same(nothing, {"answer": gold}) == reward(nothing, {"answers": [gold] * 10}) == -1.0
    assert reward("A", {"answers": ["a"] * 10}) == 1.0 > reward("the", {"answers": ["a"] * 10})


def rows_in(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "images").mkdir()
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes(picture(12, 8, i).data)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_where_people_disagree_the_right_answer_scores_what_is_best(tmp_path: Path) -> None:
    rows = [{"image": f"images/{i}.png", "question": "what?", "answers": TEN[i:] + ["odd"] * i} for i in range(4)]
    task = builtin("textvqa", rows_in(tmp_path, rows))
    with Verifier(task.reward, workers=0) as verifier:
        assert verify(task, verifier)["passed"] == 4
        grades = asyncio.run(verifier(["blue"] * 4, task.rows("all")))
    assert task.gold is not None and task.gold(rows[0]) == "red"
    assert [task.best(row) for row in rows] == pytest.approx([1.0, 0.8, 0.8, 0.8])
    assert grades[0].reward == pytest.approx(0.8)
    (message,) = task.examples("train")[0].messages
    assert message.images == (Image(path=f"{tmp_path}/images/0.png"),) and message.text.startswith("what?\n")


def test_easy_vqa_is_read_beside_its_pictures(tmp_path: Path) -> None:
    rows_in(tmp_path, [{"image": f"images/{i}.png", "question": "round?", "answer": "yes"} for i in range(4)])
    task = builtin("easy_vqa", str(tmp_path))
    with Verifier(task.reward, workers=0) as verifier:
        assert verify(task, verifier)["passed"] == 4
        assert [g.reward for g in asyncio.run(verifier(["Yes.", "no"], task.rows("all")[:2]))] == [1.0, -1.0]


@pytest.mark.parametrize("task", ["easy_vqa", "okvqa", "textvqa"])
def test_all_questions_about_a_picture_are_in_one_split(task: str, tmp_path: Path) -> None:
    """Half of the pictures are for training, a quarter each for validation and tests."""
    asked = [{"image": f"images/{i % 4}.png", "question": f"{i}?", "answer": "red", "answers": TEN} for i in range(12)]
    file = rows_in(tmp_path, asked)
    parts = {name: builtin(task, file).rows(name) for name in ("train", "validation", "test", "all")}
    seen = {name: {Path(row["image"].path).name for row in rows} for name, rows in parts.items()}
    assert seen == {"train": {"0.png", "2.png"}, "validation": {"1.png"}, "test": {"3.png"},
                    "all": {f"{i}.png" for i in range(4)}}  # fmt: skip
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 6, "validation": 3, "test": 3, "all": 12}


def test_a_verifier_sees_no_pictures() -> None:
    with Verifier("test_vqa:columns", workers=0) as verifier:
        rows = [{"image": picture(4, 4), "several": (picture(4, 4),), "answer": "x", "empty": ()}]
        assert asyncio.run(verifier(["answer,empty"], rows))[0].reward == 1.0


def columns(completion: str, row: dict[str, Any]) -> float:
    return 1.0 if ",".join(row) == completion else -1.0


def test_a_domain_of_ones_own_shows_a_column_of_pictures(tmp_path: Path) -> None:
    file = rows_in(tmp_path, [{"q": f"{i}?", "pics": [f"images/{i}.png", "images/0.png"]} for i in range(4)])
    domain = DomainConfig(data=file, prompt="Q: {q}", image="pics", reward="t2ray.tasks.equal:reward")
    (message,) = own("eyes", domain, str(tmp_path)).examples("train")[1].messages
    assert message.content == (Image(path=f"{tmp_path}/images/1.png"), Image(path=f"{tmp_path}/images/0.png"), "Q: 1?")


def test_a_column_of_bytes_and_one_as_the_hub_has_it_are_pictures(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = picture(6, 4).data
    table = pyarrow.table({"q": ["a", "b"], "raw": [data, data], "hub": [{"bytes": data, "path": "x.png"}] * 2})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for column in ("raw", "hub"):
        domain = DomainConfig(
            data=str(tmp_path / "rows.parquet"), prompt="{q}", image=column, reward="t2ray.tasks.equal:reward"
        )
        (message,) = own("eyes", domain, str(tmp_path)).examples("train")[0].messages
        assert message.content == (Image(data=data), "a")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("images/9.png", r"line 1: the column 'image' names the picture .*images/9.png, and there is no such file"),
        (None, r"line 1: the column 'image' holds 'None' \(NoneType\), which is no picture; give the path"),
        (7, r"line 1: the column 'image' holds '7' \(int\), which is no picture"),
    ],
)
def test_a_row_without_its_picture_is_named(cell: object, message: str, tmp_path: Path) -> None:
    file = rows_in(tmp_path, [{"image": cell, "question": "?", "answers": TEN}])
    with pytest.raises(DataError, match=message):
        builtin("okvqa", file)


def test_pictures_of_a_built_in_task_are_its_own() -> None:
    with pytest.raises((ConfigError, ValueError), match="image belongs to data of one's own"):
        DomainConfig(task="easy_vqa", image="image")
    with pytest.raises(DataError, match="easy_vqa is on no hub"):
        builtin("easy_vqa")
